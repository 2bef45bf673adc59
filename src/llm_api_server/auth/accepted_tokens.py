"""Tokens that a configuration accepts in addition to keys.

Their modules are imported only if the configuration has any: they import `cryptography`, 6 MB that most workers can
do without.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm_api_server.config.models import AuthConfig

if TYPE_CHECKING:
    from llm_api_server.auth.issuers import Issuers
    from llm_api_server.auth.tokens import TokenSigner


def token_signer(auth: AuthConfig) -> TokenSigner | None:
    """Return the signer of the server's own tokens, or None if they are off."""
    if not auth.are_tokens_on or auth.secret_key is None:
        return None
    from llm_api_server.auth.tokens import TokenSigner  # noqa: PLC0415 - see above

    return TokenSigner(auth.secret_key, auth.token_timeout)


def token_issuers(auth: AuthConfig, folder: Path) -> Issuers | None:
    """Return the configured identity providers, or None. `folder` is the base of relative paths of key files."""
    if not auth.issuers:
        return None
    from llm_api_server.auth.issuers import Issuers  # noqa: PLC0415 - see above

    return Issuers(auth.issuers, folder)
