"""Pictures and URLs are found wherever an engine would look, however the body spells them."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.media import find_media

IMAGES = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF....WEBP", b"BM12"]


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def in_message(part: dict[str, Any]) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode()


@pytest.mark.parametrize("content", IMAGES)
def test_known_image_types_pass_and_are_found(content: bytes) -> None:
    found = find_media(in_message({"type": "image_url", "image_url": {"url": data_url(content)}}))
    assert [(media.kind, media.param) for media in found] == [("image", "messages[0].content[0].image_url.url")]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}},
        {"type": "image_url", "image_url": "https://x.test/a.png"},
        {"type": "input_image", "image_url": "file:///etc/passwd"},
        {"image_url": {"url": "FTP://x.test/a"}},
        {"type": "audio_url", "audio_url": {"url": "http://x.test/a.wav"}},
        {"type": "video_url", "video_url": {"url": "http://x.test/a.mp4"}},
        {"type": "image", "source": {"type": "url", "url": "http://x.test/a.png"}},
        {"type": "input_file", "file_url": "http://x.test/a.pdf"},
        {"type": "image_url", "image_url": {"url": " data:image/png;base64,iVBORw0KGgo="}},
        {"type": "image_url", "image_url": {"url": data_url(b"<svg/>")}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "!!!!"}},
    ],
)
def test_urls_and_bad_data_are_refused(part: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        find_media(in_message(part))
    assert (caught.value.param or "").startswith("messages[0].content[0]")


def test_escapes_hide_nothing() -> None:
    body = b'{"messages":[{"role":"user","content":[{"image\\u005furl":"http://x.test/a.png"}]}]}'
    with pytest.raises(InvalidRequest):
        find_media(body)


@pytest.mark.parametrize("key", ["input", "documents", "items", "data_1"])
def test_other_endpoints_are_searched_too(key: str) -> None:
    body = json.dumps({key: {"content": [{"type": "image_url", "image_url": {"url": "http://x.test/a.png"}}]}}).encode()
    with pytest.raises(InvalidRequest):
        find_media(body)


def test_urls_in_texts_and_tool_schemas_are_no_media() -> None:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": 'see http://x.test/image_url" and "source"'}],
            "tools": [{"function": {"parameters": {"properties": {"image_url": {"url": "http://x.test"}}}}}],
        }
    )
    assert find_media(body.encode()) == []
