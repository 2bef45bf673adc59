"""Reading and replacing text fields of a multipart/form-data body (RFC 7578), for the audio endpoints. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.wire.request import RequestFacts

_MAX_PARTS = 64
_MAX_FIELD_BYTES = 4096
_BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,70})"|([^\s;,"]{1,70}))', re.IGNORECASE)
_NAME = re.compile(rb'[;\s]name="([^"\r\n]*)"', re.IGNORECASE)


@dataclass(frozen=True)
class _Part:
    """Name of a part, and the byte offsets of its content in the body."""

    name: str
    start: int
    end: int


class Form:
    """A multipart/form-data body. The constructor raises `InvalidRequest` for any other body."""

    def __init__(self, content_type: str, body: bytes) -> None:
        boundary = _BOUNDARY.search(content_type)
        if not content_type.lower().startswith("multipart/form-data") or boundary is None:
            raise InvalidRequest("Send a multipart/form-data body with a 'file' and a 'model' to this endpoint.")
        self._body = body
        self._delimiter = b"--" + (boundary[1] or boundary[2]).encode("latin-1")
        self._parts = {part.name: part for part in self._find_parts()}

    def read(self) -> RequestFacts:
        """Raise `InvalidRequest` for a form without a file, or with a wrong text field."""
        if "file" not in self._parts:
            raise InvalidRequest("Missing required parameter: 'file'.", param="file")
        stream = (self._text("stream") or "").lower() in ("true", "1")
        return RequestFacts(request=None, model=self._text("model") or None, stream=stream)

    def with_fields(self, changes: dict[str, str]) -> bytes:
        """Return the body with text fields replaced or added."""
        body = self._body
        replaced = [self._parts[name] for name in changes if name in self._parts]
        for part in sorted(replaced, key=lambda part: part.start, reverse=True):
            body = body[: part.start] + changes[part.name].encode() + body[part.end :]
        added = b"".join(
            self._delimiter + f'\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
            for name, value in changes.items()
            if name not in self._parts
        )
        return added + body if added else body

    def _text(self, name: str) -> str | None:
        part = self._parts.get(name)
        if part is None:
            return None
        if part.end - part.start > _MAX_FIELD_BYTES:
            raise InvalidRequest(f"Invalid '{name}': give at most {_MAX_FIELD_BYTES} bytes.", param=name)
        try:
            return self._body[part.start : part.end].decode().strip()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"Invalid '{name}': it is not UTF-8 text.", param=name) from error

    def _find_parts(self) -> list[_Part]:
        parts: list[_Part] = []
        position = self._body.find(self._delimiter)
        while position >= 0 and len(parts) < _MAX_PARTS:
            header_start = position + len(self._delimiter)
            if self._body.startswith(b"--", header_start):
                return parts
            header_end = self._body.find(b"\r\n\r\n", header_start, header_start + _MAX_FIELD_BYTES)
            position = self._body.find(b"\r\n" + self._delimiter, header_start)
            if header_end < 0 or position < 0:
                break
            name = _NAME.search(self._body, header_start, header_end)
            # An empty part ends with the line end that also closes its header.
            content = min(header_end + 4, position)
            if name is not None:
                parts.append(_Part(name[1].decode(errors="replace"), content, position))
            position += 2
        raise InvalidRequest(f"The multipart body of your request is incomplete or has more than {_MAX_PARTS} parts.")
