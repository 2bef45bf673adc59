"""Pictures, sound and video inside request bodies: found anywhere an engine would look, and only as data. Pure.

An engine that is given a URL fetches it from inside the server's network, so only `data:` URLs pass
(CVE-2025-6242 is what happens otherwise). `openai.py` calls `find_media` before any engine sees the body.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.pictures import BrokenPicture, read_size

MediaKind = Literal["image", "audio", "video", "file"]

#: Members of a body that engines look for media in; a tool's schema or metadata may hold any URL.
_SEARCHED = (
    "messages", "input", "system", "documents", "query", "queries", "items", "text_1", "text_2", "data_1", "data_2",
)  # fmt: skip
_URL_KEYS: dict[str, MediaKind] = {
    "image_url": "image",
    "audio_url": "audio",
    "video_url": "video",
    "file_url": "file",
}


class Media(msgspec.Struct, frozen=True):
    """One picture, sound or file and where it stands in the body, in which it takes `size` bytes.

    `pixels` of a picture, once it is decoded.
    """

    param: str
    kind: MediaKind
    pixels: int = 0
    size: int = 0


def find_media(body: bytes) -> list[Media]:
    """Everything in `body` that is not text. Raises `InvalidRequest` for URLs and for data that is not what it says."""
    if not (b'_url"' in body or b'"source"' in body or b'input_audio"' in body or b"\\u" in body):
        return []  # an escape (`\u`) may hide a key
    content = msgspec.json.decode(body)
    found: list[Media] = []
    for key in _SEARCHED:
        if key in content:
            found.extend(_walk(content[key], key))
    return found


def check_pixels(media: Sequence[Media], limit: int) -> None:
    """Raises `InvalidRequest` where the pictures of a request together would take too much memory."""
    pixels = 0
    for one in media:
        pixels += one.pixels
        if pixels > limit:
            raise InvalidRequest(
                f"At most {limit:,} pixels are allowed in all images of a request together; with this one there are "
                f"{pixels:,}. Send smaller or fewer images.",
                param=one.param,
            )


def _walk(value: Any, param: str) -> Iterator[Media]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, f"{param}[{index}]")
    elif isinstance(value, dict):
        yield from _read_part(value, param)
        for key, item in value.items():
            if isinstance(item, dict | list):
                yield from _walk(item, f"{param}.{key}")


def _read_part(part: dict[str, Any], param: str) -> Iterator[Media]:
    for key, kind in _URL_KEYS.items():
        url = part.get(key)
        if isinstance(url, dict):
            url = url.get("url")
            key = f"{key}.url"  # noqa: PLW2901 - names the place in the message
        if isinstance(url, str):
            pixels = _read_url(url, kind, f"{param}.{key}")
            yield Media(f"{param}.{key}", kind, pixels, len(url))
    source = part.get("source")
    if isinstance(source, dict) and part.get("type") in ("image", "document"):
        yield _read_anthropic_source(source, "image" if part["type"] == "image" else "file", f"{param}.source")
    if isinstance(part.get("input_audio"), dict):
        yield Media(f"{param}.input_audio", "audio", size=_length(part["input_audio"].get("data")))


def _read_anthropic_source(source: dict[str, Any], kind: MediaKind, param: str) -> Media:
    pixels = 0
    if isinstance(source.get("url"), str):
        pixels = _read_url(source["url"], kind, f"{param}.url")
    elif kind == "image" and isinstance(source.get("data"), str):
        pixels = _read_image(source["data"], f"{param}.data")
    return Media(param, kind, pixels, _length(source.get("url")) + _length(source.get("data")))


def _length(data: Any) -> int:
    return len(data) if isinstance(data, str) else 0


def _read_url(url: str, kind: MediaKind, param: str) -> int:
    """The pixels of a picture."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        raise InvalidRequest(
            f"Only data: URLs are accepted here, for example data:{kind}/...;base64,... "
            "(this server fetches nothing from the network on a client's behalf).",
            param=param,
        )
    header, comma, data = rest.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise InvalidRequest("The data: URL must carry base64, as in data:image/png;base64,...", param=param)
    return _read_image(data, param) if kind == "image" else 0


def _read_image(data: str, param: str) -> int:
    try:
        content = binascii.a2b_base64(data, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("The image is not valid base64.", param=param) from error
    try:
        size = read_size(content)
    except BrokenPicture as error:
        raise InvalidRequest("The image is damaged or cut off: its size cannot be read.", param=param) from error
    if size is None:
        raise InvalidRequest("The data is not a PNG, JPEG, GIF, WebP or BMP image.", param=param)
    return size[0] * size[1]
