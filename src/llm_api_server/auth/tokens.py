"""Short-lived tokens (JWT, RFC 7519) that stand for a key with the same or fewer permissions."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

import jwt
import msgspec

from llm_api_server.auth.access import Key
from llm_api_server.errors import InvalidKey, InvalidRequest
from llm_api_server.types import PERMISSIONS, Permission

ISSUER = AUDIENCE = "llm-api-server"
_ALGORITHM = "HS256"
_WILDCARDS = frozenset("*?[")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Claims(msgspec.Struct):
    """Claims of a token. `exp` is in Unix seconds."""

    sub: str
    exp: int
    permissions: list[Permission]
    models: list[str]


class TokenSigner:
    """Issuer and verifier of tokens. `now` returns Unix seconds."""

    def __init__(self, secret: str, max_lifetime: float, *, now: Callable[[], float] = time.time) -> None:
        self._secret = secret
        self._max_lifetime = max_lifetime
        self._now = now

    def issue(
        self,
        key: Key,
        permissions: Iterable[str] | None = None,
        models: Iterable[str] | None = None,
        expires_in: float | None = None,
    ) -> tuple[str, int]:
        """Return a token and the Unix time of its expiry. An argument left out means all that the key allows.

        Raises `InvalidRequest`, with `param`, if the arguments exceed the rights of the key.
        """
        claims = Claims(
            sub=key.key_id,
            exp=int(self._now() + self._lifetime(expires_in)),
            permissions=_narrow_permissions(key, permissions),
            models=_narrow_models(key, models),
        )
        payload = {**msgspec.to_builtins(claims), "iss": ISSUER, "aud": AUDIENCE, "iat": int(self._now())}
        return jwt.encode(payload, self._secret, algorithm=_ALGORITHM), claims.exp

    def narrow(self, key: Key, claims: Claims) -> Key:
        """Return `key` reduced to the rights and the validity of its token."""
        return msgspec.structs.replace(
            key,
            permissions=_common(key, claims.permissions),
            models=tuple(pattern for pattern in claims.models if _covers(key, pattern)),
            expires_at=min(claims.exp, key.expires_at or claims.exp),
        )

    def _lifetime(self, expires_in: float | None) -> float:
        if expires_in is None:
            return self._max_lifetime
        if not 1 <= expires_in <= self._max_lifetime:
            raise InvalidRequest(
                f"'expires_in' must be between 1 and {self._max_lifetime:g} seconds.", param="expires_in"
            )
        return expires_in

    def read(self, token: str) -> Claims:
        """Verify a token and return its claims. Raises `InvalidKey`."""
        # The expiry is checked below, against `self._now`.
        options: jwt.types.Options = {
            "require": ["exp", "iat", "sub", "iss", "aud"],
            "verify_exp": False,
            "verify_iat": False,
        }
        try:
            payload = jwt.decode(
                token, self._secret, algorithms=[_ALGORITHM], audience=AUDIENCE, issuer=ISSUER, options=options
            )
            claims = msgspec.convert(payload, Claims)
        except (jwt.InvalidTokenError, msgspec.ValidationError, ValueError) as error:
            raise InvalidKey("Incorrect token provided. Get a new one from /auth/token.") from error
        if claims.exp <= self._now():
            raise InvalidKey("This token has expired. Get a new one from /auth/token.")
        return claims


def _narrow_permissions(key: Key, requested: Iterable[str] | None) -> list[Permission]:
    if requested is None:
        return sorted(key.permissions)
    wanted = sorted(set(requested))
    if unknown := [name for name in wanted if name not in PERMISSIONS]:
        raise InvalidRequest(
            f"Unknown permission '{unknown[0][:64]}'; known are {', '.join(sorted(PERMISSIONS))}.", param="permissions"
        )
    granted = _common(key, msgspec.convert(wanted, list[Permission]))
    if missing := [name for name in wanted if name not in granted]:
        raise InvalidRequest(f"Your key does not have the permission '{missing[0]}'.", param="permissions")
    return sorted(granted)


def _common(key: Key, permissions: Iterable[Permission]) -> frozenset[Permission]:
    return frozenset(permission for permission in permissions if key.may(permission))


def _narrow_models(key: Key, requested: Iterable[str] | None) -> list[str]:
    if requested is None:
        return list(key.models)
    wanted = list(dict.fromkeys(requested))
    if any(_SURROGATE.search(pattern) for pattern in wanted):
        raise InvalidRequest("A model's name contains a lone surrogate, which is no character.", param="models")
    if missing := [pattern for pattern in wanted if not _covers(key, pattern)]:
        raise InvalidRequest(f"Your key may not use the model '{missing[0][:256]}'.", param="models")
    return wanted


def _covers(key: Key, pattern: str) -> bool:
    """Return whether `key` may use every model that `pattern` matches.

    Only the key's own patterns and plain names are known to be covered.
    """
    if pattern in key.models or "*" in key.models:
        return True
    return not _WILDCARDS & set(pattern) and key.may_use(pattern)
