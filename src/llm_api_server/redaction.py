"""Removal of keys, tokens and control characters from texts, for logs and configuration problems."""

from __future__ import annotations

import re
from collections.abc import Iterable

MASK = "***"

_SECRETS = re.compile(
    r"""
    (?P<keep>
        (?<![A-Za-z0-9])sk-                                  # keys of this server and of OpenAI
      | \b[Bb]earer[ \t]+
      | \beyJ(?=[\w-]+\.[\w-]+\.)                            # a JWT starts with the Base64 of '{"'
      | \b(?:x-api-key|api[_-]?key|secret[_-]?key)["']?[ \t]*[:=][ \t]*["']?
    )
    [\w.~+/=-]{6,}
    """,
    re.VERBOSE | re.IGNORECASE,
)
#: C0 and C1 controls and Unicode line ends, which could start a line or control a terminal, and lone surrogates, which
#: no encoding carries.
_CONTROLS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
#: Every match of `_SECRETS` contains one of these in lower case; searching for them is faster than the pattern.
_HINTS = ("sk-", "bearer", "eyj", "api", "secret")


class Redactor:
    """Callable that masks everything that looks like a key or token, and the given `secrets`."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        words = sorted({re.escape(secret) for secret in secrets if secret}, key=len, reverse=True)
        self._known = re.compile("|".join(words)) if words else None

    def __call__(self, text: str) -> str:
        if self._known is not None:
            text = self._known.sub(MASK, text)
        lower = text.lower()
        if not any(hint in lower for hint in _HINTS):
            return text
        return _SECRETS.sub(rf"\g<keep>{MASK}", text)


def one_line(text: str) -> str:
    """Return `text` with control characters and lone surrogates as escapes: one line that every encoding carries."""
    if text.isprintable():  # fast, and true of nearly all texts
        return text
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
