"""Unknown URLs, and the one that a client with a wrong base URL means. Pure."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from llm_api_server.errors import UnknownEndpoint

_VERSION = "/v1"
#: Every path below it names a model.
_MODELS = "/v1/models/"
#: Longer paths are not those of a wrong base URL.
_MAX_SEGMENTS = 12


def unknown_url(method: str, path: str, known: AbstractSet[str]) -> UnknownEndpoint:
    """Return the error for a path without a route; it names the path that was meant."""
    meant = meant_path(path, known)
    hint = f"Did you mean {meant}? Check the base URL of your client" if meant else "See /docs for the endpoints"
    return UnknownEndpoint(f"Unknown request URL: {method} {path}. {hint}.")


def meant_path(path: str, known: AbstractSet[str]) -> str | None:
    """Return the path among `known` that `path` ends with, apart from case, slashes and `/v1`; None if there is none.

    Wrong base URLs end in `/`, in `/v1/v1` or in no `/v1`, or have a prefix such as `/api`.
    """
    segments = [segment for segment in path.split("/") if segment]
    for start in range(len(segments) if len(segments) <= _MAX_SEGMENTS else 0):
        end = "/" + "/".join(segments[start:])
        for candidate in (end, _VERSION + end):
            if candidate.startswith(_MODELS) and candidate != path:
                return candidate
            if candidate.lower() in known and candidate.lower() != path:
                return candidate.lower()
    return None
