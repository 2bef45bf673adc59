"""Types of option values besides plain ones: durations, sizes, networks, secrets. Each error names the remedy."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

Seconds = Annotated[float, Field(ge=0)]
Days = Annotated[int, Field(ge=1, le=36500)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def _parse_size(value: Any) -> Any:
    """Parse `16GiB`, `500 MB` or a number of bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]i?)?b?", value.strip().lower())
    if match is None:
        raise ValueError("give a size such as 16GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


Size = Annotated[int, BeforeValidator(_parse_size), Field(ge=0)]


def _parse_network(value: Any) -> Any:
    """Normalise a network or a single address."""
    if not isinstance(value, str):
        return value
    try:
        return str(ipaddress.ip_network(value.strip()))
    except ValueError as error:
        raise ValueError(f"give a network such as 10.0.0.0/8 or an address: {error}") from error


Network = Annotated[str, BeforeValidator(_parse_network)]

#: Characters that files and forms leave at the ends of a text: white space, byte order mark, zero-width characters.
_BLANKS = "".join(map(chr, range(0x21))) + "\x7f\x85\xa0\u200b\u200c\u200d\u2028\u2029\u2060\u3000\ufeff"
_QUOTES = "\"'`"


def _parse_secret(value: Any) -> Any:
    """Strip the ends. Raises `ValueError` for what `Authorization: Bearer SECRET` cannot carry.

    Letters beyond ASCII pass: clients send them as UTF-8 (obs-text of RFC 9110, section 5.5).
    """
    if not isinstance(value, str):
        return value
    secret = value.strip(_BLANKS)
    if re.match(r"bearer\s", secret, re.IGNORECASE):
        raise ValueError("give the key alone, without 'Bearer' in front")
    if len(secret) > 1 and secret[0] == secret[-1] and secret[0] in _QUOTES:
        raise ValueError("the value itself is in quotes, as some .env files keep them; remove them")
    _check_characters(secret, lambda character: unicodedata.category(character)[0] not in "CZ")
    return secret


def _parse_header_value(value: Any) -> Any:
    """Strip the ends. Raises `ValueError` for characters other than those of ASCII that a header value may have."""
    if not isinstance(value, str):
        return value
    text = value.strip(_BLANKS)
    _check_characters(text, lambda character: " " <= character <= "~")
    return text


def _check_characters(text: str, is_allowed: Callable[[str], bool]) -> None:
    for position, character in enumerate(text, 1):
        if not is_allowed(character):
            name = {" ": "a space", "\n": "a line break", "\r": "a line break", "\t": "a tab"}.get(character)
            name = name or f"U+{ord(character):04X} {unicodedata.name(character, '')}".rstrip()
            raise ValueError(f"no header can carry this value: its character {position} is {name}; remove it")


def _parse_header_name(value: Any) -> Any:
    """Raise `ValueError` unless `value` is a token of RFC 9110, section 5.6.2."""
    if isinstance(value, str) and not re.fullmatch(r"[!#$%&'*+.^`|~\w-]+", value, re.ASCII):
        raise ValueError("is no name of a header; names have letters, digits and '-'")
    return value


#: Key that clients send.
Secret = Annotated[str, BeforeValidator(_parse_secret)]
#: Key that this server sends.
SentSecret = Annotated[str, BeforeValidator(lambda value: _parse_header_value(_parse_secret(value)))]
HeaderName = Annotated[str, BeforeValidator(_parse_header_name)]
HeaderValue = Annotated[str, BeforeValidator(_parse_header_value)]
