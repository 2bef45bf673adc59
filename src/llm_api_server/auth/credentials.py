"""The API key or token that a request carries. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from llm_api_server.errors import InvalidKey


def secret_of(headers: Mapping[bytes, bytes]) -> str:
    """Return the secret of `Authorization: Bearer KEY`, or of `x-api-key` as Anthropic's clients send it.

    Raises `InvalidKey` if there is none.
    """
    scheme, _, credentials = headers.get(b"authorization", b"").decode("latin-1").strip().partition(" ")
    if scheme.lower() == "bearer" and (secret := credentials.strip()):
        return secret
    if secret := headers.get(b"x-api-key", b"").decode("latin-1").strip():
        return secret
    raise InvalidKey(
        "You didn't provide an API key. Send it in the Authorization header: 'Authorization: Bearer YOUR_KEY'."
    )
