"""Pictures and URLs are found wherever an engine would look, however the body spells them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.media.content_parts import Media, check_images, find_media, inline
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.gateway.wire.request import read_request
from tests.pictures import SAMPLES, data_url, png


def in_message(part: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize("sample", sorted(SAMPLES.iterdir()), ids=lambda path: path.suffix)
def test_images_of_known_types_are_found(sample: Path) -> None:
    (found,) = find_media(in_message({"type": "image_url", "image_url": {"url": data_url(sample.read_bytes())}}))
    assert (found.kind, found.param) == ("image", "messages[0].content[0].image_url.url")
    assert found.pixels > 1000


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": data_url(png(3, 5))}},
        {"type": "input_image", "image_url": data_url(png(3, 5))},
        {"type": "image", "source": {"type": "base64", "data": data_url(png(3, 5)).partition(",")[2]}},
        {"type": "image", "source": {"type": "url", "url": data_url(png(3, 5))}},
    ],
)
def test_pixels_are_counted_in_every_kind_of_part(part: dict[str, Any]) -> None:
    assert [media.pixels for media in find_media(in_message(part))] == [15]


def test_limits_hold_for_all_images_of_a_request() -> None:
    media = [Media("a", "image", 60), Media("b", "audio"), Media("c", "image", 40)]
    check_images(media, limit=2, pixels=100)
    for limits in ({"limit": 2, "pixels": 99}, {"limit": 1, "pixels": 100}):
        with pytest.raises(InvalidRequest) as caught:
            check_images(media, **limits)
        assert caught.value.param == "c"


@pytest.mark.parametrize("end", ["", "AAAA", "!!!!"])
def test_only_the_beginning_of_a_long_image_is_decoded(end: str) -> None:
    """What follows the size is the engine's to read."""
    url = data_url(png(3, 5) + bytes(90_000)) + end
    assert [media.pixels for media in find_media(in_message({"image_url": url}))] == [15]


def test_an_image_with_its_size_at_the_end_is_decoded_whole() -> None:
    filling = b"\xff\xe1\xff\xff" + bytes(65533)
    frame = b"\xff\xc0\0\x11\x08\0\x05\0\x03" + bytes(10)
    url = data_url(b"\xff\xd8" + filling * 3 + frame + b"\xff\xda")
    assert [media.pixels for media in find_media(in_message({"image_url": url}))] == [15]


def test_urls_of_images_that_may_be_fetched_are_found_and_replaced() -> None:
    url = "https://x.test/a.png"
    parts = [
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "input_image", "image_url": url},
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "text", "text": url},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "metadata": {"image_url": url}}
    found = find_media(body, may_fetch=True)
    assert [(one.kind, one.url) for one in found] == [("image", url)] * 3
    replaced = json.loads(inline(json.dumps(body).encode(), {url: "data:x"}))
    assert replaced == {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}},
                    {"type": "input_image", "image_url": "data:x"},
                    {"type": "image", "source": {"type": "url", "url": "data:x"}},
                    parts[3],
                ],
            }
        ],
        "metadata": {"image_url": url},
    }
    for refused in ({"video_url": {"url": url}}, {"image_url": "http://x.test/a.png"}, {"image_url": "/etc/passwd"}):
        with pytest.raises(InvalidRequest):
            find_media(in_message(refused), may_fetch=True)


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
        {"type": "image_url", "image_url": {"url": data_url(b"just some text")}},
        {"type": "image_url", "image_url": {"url": data_url(png()[:20])}},
        {"type": "image_url", "image_url": {"url": data_url(b"")}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "!!!!"}},
    ],
)
def test_urls_and_bad_data_are_refused(part: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        find_media(in_message(part))
    assert (caught.value.param or "").startswith("messages[0].content[0]")


def test_escaped_keys_are_found() -> None:
    body = b'{"messages":[{"role":"user","content":[{"image\\u005furl":"http://x.test/a.png"}]}]}'
    with pytest.raises(InvalidRequest):
        read_request(ENDPOINTS["/v1/chat/completions"], body)


@pytest.mark.parametrize("key", ["input", "documents", "items", "data_1"])
def test_members_of_all_endpoints_are_searched(key: str) -> None:
    body = {key: {"content": [{"type": "image_url", "image_url": {"url": "http://x.test/a.png"}}]}}
    with pytest.raises(InvalidRequest):
        find_media(body)


def test_urls_in_texts_and_tool_schemas_are_no_media() -> None:
    body = {
        "messages": [{"role": "user", "content": 'see http://x.test/image_url" and "source"'}],
        "tools": [{"function": {"parameters": {"properties": {"image_url": {"url": "http://x.test"}}}}}],
    }
    assert find_media(body) == []
