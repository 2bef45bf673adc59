"""Takes keys, tokens and control characters out of texts, for logs and configuration problems. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

MASK = "***"

_SECRETS = re.compile(
    r"""
    (?P<keep>
        (?<![A-Za-z0-9])sk-                                  # the form of our keys and OpenAI's
      | \b[Bb]earer[ \t]+
      | \beyJ(?=[\w-]+\.[\w-]+\.)                            # a JWT begins with the Base64 of '{"'
      | \b(?:x-api-key|api[_-]?key|secret[_-]?key)["']?[ \t]*[:=][ \t]*["']?
    )
    [\w.~+/=-]{6,}
    """,
    re.VERBOSE | re.IGNORECASE,
)
#: C0 and C1 controls and the Unicode line ends: what could begin a line of its own or drive a terminal.
_CONTROLS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


#: A text without any of these, in lower case, has nothing of `_SECRETS`: quick to see, unlike the rest.
_HINTS = ("sk-", "bearer", "eyj", "api", "secret")


class Redactor:
    """Takes out what looks like a key or token, and the given `secrets` whatever they look like."""

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
    """`text` with its control characters shown as escapes, so that it stays on its line."""
    if text.isprintable():  # quick to see, and true of nearly all
        return text
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
