"""Which tokens a configuration accepts beside keys. What reads them is imported only where there are any.

It brings the library `cryptography` along: six megabytes that most workers need not hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_api_server.config.models import AuthConfig, Config

if TYPE_CHECKING:
    from llm_api_server.auth.issuers import Issuers
    from llm_api_server.auth.tokens import TokenSigner


def token_signer(auth: AuthConfig) -> TokenSigner | None:
    """For tokens of our own; None where they are off."""
    if not auth.are_tokens_on or auth.secret_key is None:
        return None
    from llm_api_server.auth.tokens import TokenSigner  # noqa: PLC0415 - see above

    return TokenSigner(auth.secret_key, auth.token_timeout)


def token_issuers(config: Config) -> Issuers | None:
    """For tokens of identity providers; None where none is configured."""
    if not config.auth.issuers:
        return None
    from llm_api_server.auth.issuers import Issuers  # noqa: PLC0415 - see above

    return Issuers(config)
