"""Images, audio and video inside request bodies, wherever an engine would look for them. Pure.

An engine fetches URLs from inside the server's network, so only `data:` URLs may reach it (see CVE-2025-6242).
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.media.image_size import BrokenImage, read_size

MediaKind = Literal["image", "audio", "video", "file"]

#: Members of a body that engines look for media in; a tool's schema or metadata may hold any URL.
_SEARCHED = (
    "messages", "input", "system", "documents", "query", "queries", "items", "text_1", "text_2", "data_1", "data_2",
)  # fmt: skip
#: Base64 characters that are decoded first; a multiple of four.
_FIRST_CHARS = 64 * 1024
_LONGEST_SCHEME = 16
_URL_KEYS: dict[str, MediaKind] = {
    "image_url": "image",
    "audio_url": "audio",
    "video_url": "video",
    "file_url": "file",
}


class Media(msgspec.Struct, frozen=True):
    """Image, sound or file in a body; `param` is its JSON path and `size` its bytes in the body.

    `pixels` is the decoded size of an image. An image with a `url` must be fetched first.
    """

    param: str
    kind: MediaKind
    pixels: int = 0
    size: int = 0
    url: str | None = None


def may_have_media(body: bytes) -> bool:
    """Return False if `find_media` would find nothing. An escape may hide a key."""
    # Not `in`: CPython first tries bytes as a number there, which raises and clears an exception.
    find = body.find
    return find(b'_url"') >= 0 or find(b'"source"') >= 0 or find(b'input_audio"') >= 0 or find(b"\\u") >= 0


def find_media(content: Mapping[str, Any], *, may_fetch: bool = False) -> list[Media]:
    """Return all media of a decoded body.

    Raises `InvalidRequest` for data of another kind than announced and for URLs, except those of images with https: if
    `may_fetch`.
    """
    found: list[Media] = []
    for key in _SEARCHED:
        if key in content:
            found.extend(_walk(content[key], key))
    for one in found:
        if one.url is not None and not may_fetch:
            raise _not_data(one.kind, one.param)
    return found


def inline(body: bytes, data: Mapping[str, str]) -> bytes:
    """Return `body` with its URLs replaced by the fetched data."""
    content = msgspec.json.decode(body)
    for key in _SEARCHED:
        if key in content:
            _replace(content[key], data)
    return msgspec.json.encode(content)


def _replace(value: Any, data: Mapping[str, str]) -> None:
    """Replace the URLs that `_walk` finds."""
    for item in value if isinstance(value, list) else ():
        _replace(item, data)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key in _URL_KEYS and isinstance(item, str):
            value[key] = data.get(item, item)
        elif (key in _URL_KEYS or key == "source") and isinstance(item, dict) and isinstance(item.get("url"), str):
            item["url"] = data.get(item["url"], item["url"])
        elif isinstance(item, dict | list):
            _replace(item, data)


def check_images(media: Sequence[Media], *, limit: int, pixels: int) -> None:
    """Raise `InvalidRequest` if a request has too many images, or too many pixels in all of them."""
    _check_pixels(media, pixels)
    images = [one for one in media if one.kind == "image"]
    if len(images) > limit:
        raise InvalidRequest(f"At most {limit} images are allowed in a request.", param=images[limit].param)


def _check_pixels(media: Sequence[Media], limit: int) -> None:
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
            key = f"{key}.url"  # noqa: PLW2901 - the JSON path for the message
        if isinstance(url, str):
            yield _read_url(url, kind, f"{param}.{key}")
    source = part.get("source")
    if isinstance(source, dict) and part.get("type") in ("image", "document"):
        yield _read_anthropic_source(source, "image" if part["type"] == "image" else "file", f"{param}.source")
    if isinstance(part.get("input_audio"), dict):
        yield Media(f"{param}.input_audio", "audio", size=_length(part["input_audio"].get("data")))


def _read_anthropic_source(source: dict[str, Any], kind: MediaKind, param: str) -> Media:
    if isinstance(source.get("url"), str):
        return _read_url(source["url"], kind, f"{param}.url")
    pixels = 0
    if kind == "image" and isinstance(source.get("data"), str):
        pixels = _read_image(source["data"], 0, f"{param}.data")
    return Media(param, kind, pixels, _length(source.get("data")))


def _length(data: Any) -> int:
    return len(data) if isinstance(data, str) else 0


def _read_url(url: str, kind: MediaKind, param: str) -> Media:
    scheme = url[: max(url.find(":", 0, _LONGEST_SCHEME), 0)].lower()
    if scheme == "https" and kind == "image":
        return Media(param, kind, url=url)
    if scheme != "data":
        raise _not_data(kind, param)
    comma = url.find(",")
    if comma < 0 or not url[len("data:") : comma].lower().endswith(";base64"):
        raise InvalidRequest("The data: URL must carry base64, as in data:image/png;base64,...", param=param)
    return Media(param, kind, _read_image(url, comma + 1, param) if kind == "image" else 0, len(url))


def _not_data(kind: MediaKind, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"Only data: URLs are accepted here, for example data:{kind}/...;base64,... "
        "(this server does not fetch such URLs for clients).",
        param=param,
    )


def _read_image(text: str, start: int, param: str) -> int:
    """Return the pixels of the base64 image in `text` from `start` on."""
    # The size is nearly always in the first bytes.
    try:
        size = read_size(_decoded(text[start : start + _FIRST_CHARS], param))
    except BrokenImage:
        try:
            size = read_size(_decoded(text[start:], param))
        except BrokenImage as error:
            raise InvalidRequest("The image is damaged or cut off: its size cannot be read.", param=param) from error
    if size is None:
        raise InvalidRequest("The data is not a PNG, JPEG, GIF, WebP or BMP image.", param=param)
    return size[0] * size[1]


def _decoded(data: str, param: str) -> bytes:
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("The image is not valid base64.", param=param) from error
