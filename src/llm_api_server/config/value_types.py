"""Types of option values besides plain ones: durations, sizes, networks. Each error shows a valid value."""

from __future__ import annotations

import ipaddress
import re
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
