"""Pictures through a real server to a real vLLM: the response names their content, and bad ones are refused.

The model is tiny and knows only coloured figures (`scripts/train_tiny_vlm.py`).
"""

from __future__ import annotations

import base64
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from openai import OpenAI

from tests.pictures import SAMPLES, data_url, figure, image_part, png_of_stated_size
from tests.running import KEY, Server, running
from tests.waiting import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODEL = "Qwen-VL-Chat"
BLIND = "SmolLM2-135M-Instruct"
TINY_VLM = Path(__file__).parents[1] / "fixtures" / "tiny-vlm"
RED_CIRCLE, BLUE_SQUARE, GREEN_TRIANGLE = figure("red circle"), figure("blue square"), figure("green triangle")
TEXT = {"type": "text", "text": "这张图片里有什么？"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path, vllm_python: Path) -> Iterator[Server]:
    config = {
        "server": {"timeout": 400},
        "models": {
            "default": MODEL,
            "preload": [MODEL],
            "max_loaded": 2,
            "available": {MODEL: {"path": str(TINY_VLM)}, BLIND: {"path": str(smollm2_folder)}},
        },
        "inference": {"max_input_tokens": 250},
        "engines": {"vllm": {"python": str(vllm_python)}},
    }
    with running(tmp_path_factory.mktemp("vision"), config) as server:
        # A stream that waits for a load has its status already: errors of the engine would be events.
        wait_until(lambda: server.models()[MODEL]["state"] == "ready", timeout=300)
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0, timeout=500) as client:
        yield client


def sample(name: str) -> bytes:
    (path,) = SAMPLES.glob(name.replace(" ", "-") + "-*")
    return path.read_bytes()


def messages(*pictures: bytes, **more: Any) -> Any:
    return [{"role": "user", "content": [TEXT, *(image_part(picture, **more) for picture in pictures)]}]


def ask(client: OpenAI, *pictures: bytes, **more: Any) -> str:
    response = client.chat.completions.create(
        model=MODEL, messages=messages(*pictures, **more), max_tokens=40, temperature=0
    )
    return response.choices[0].message.content or ""


def test_response_names_the_picture(client: OpenAI) -> None:
    assert ask(client, RED_CIRCLE) == "red circle"
    assert ask(client, BLUE_SQUARE) == "blue square"
    assert ask(client) == "no picture"


def test_several_pictures_are_named_in_their_order(client: OpenAI) -> None:
    assert ask(client, RED_CIRCLE, BLUE_SQUARE) == "red circle, blue square"
    assert ask(client, BLUE_SQUARE, RED_CIRCLE) == "blue square, red circle"
    assert ask(client, GREEN_TRIANGLE, BLUE_SQUARE, RED_CIRCLE) == "green triangle, blue square, red circle"


@pytest.mark.parametrize("sample", sorted(SAMPLES.iterdir()), ids=lambda path: path.suffix)
def test_every_image_format_is_decoded(client: OpenAI, sample: Path) -> None:
    colour, shape, _ = sample.stem.split("-")
    content: Any = [TEXT, image_part(sample.read_bytes(), sample.suffix[1:])]
    response = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], temperature=0
    )
    assert response.choices[0].message.content == f"{colour} {shape}"


@pytest.mark.parametrize("detail", ["auto", "low", "high"])
def test_detail_is_accepted(client: OpenAI, detail: str) -> None:
    assert ask(client, RED_CIRCLE, detail=detail) == "red circle"


def test_stream_names_the_same(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=messages(RED_CIRCLE, BLUE_SQUARE),
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "red circle, blue square"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens > 8


def test_curl_example_of_the_documentation(server: Server) -> None:
    body = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "你是一个有用的AI助手，能够理解图像和文本。"},
            {"role": "user", "content": [TEXT, image_part(sample("red circle"), "jpeg")]},
        ],
        "temperature": 0.7,
        "max_tokens": 500,
        "seed": 1,
    }
    command = ["curl", "-sS", f"{server.url}/v1/chat/completions", "-X", "POST", "-d", json.dumps(body)]
    command += ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}"]
    response = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert response["choices"][0]["message"]["content"] == "red circle"


def test_python_example_of_the_documentation(client: OpenAI) -> None:
    base64_image = base64.b64encode(sample("red circle")).decode("utf-8")
    response = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "你是一个有用的AI助手，能够理解图像和文本。"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "请描述这张图片并分析其中的主要内容。"},
                    {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64_image}"}},
                ],
            },
        ],
        temperature=0.7,
        max_tokens=1000,
        seed=1,
    )
    assert response.choices[0].message.content == "red circle"


@pytest.mark.parametrize("name", ["yellow square", "green circle"])
def test_anthropic_image_block(server: Server, name: str) -> None:
    """Count tokens first: vLLM once responded with 500 to a picture that it had counted before."""
    source: Any = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(figure(name)).decode()}
    content: Any = [{"type": "image", "source": source}, {"type": "text", "text": "What is in the picture?"}]
    turns: Any = [{"role": "user", "content": content}]
    with anthropic.Anthropic(api_key=KEY, base_url=server.url, max_retries=0) as client:
        tokens = client.messages.count_tokens(model=MODEL, messages=turns).input_tokens
        message = client.messages.create(model=MODEL, max_tokens=40, messages=turns, extra_body={"temperature": 0})
    assert [block.text for block in message.content if block.type == "text"] == [name]
    assert message.usage.input_tokens == tokens


def test_responses_input_image(client: OpenAI) -> None:
    content: Any = [
        {"type": "input_text", "text": "What is in the picture?"},
        {"type": "input_image", "image_url": data_url(BLUE_SQUARE), "detail": "auto"},
    ]
    response = client.responses.create(
        model=MODEL, input=[{"role": "user", "content": content}], temperature=0, max_output_tokens=40
    )
    assert response.output_text == "blue square"


def test_models_list_states_vision(server: Server) -> None:
    with server.client() as http:
        listed = {model["id"]: model["vision"] for model in http.get("/v1/models").json()["data"]}
    assert listed == {MODEL: True, BLIND: False}


def url_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


BAD_PARTS = {
    "a PNG cut off": (image_part(RED_CIRCLE[: len(RED_CIRCLE) // 2]), "truncated"),
    "a JPEG cut off": (image_part(sample("red circle")[:1500], "jpeg"), "truncated"),
    "a header only": (image_part(RED_CIRCLE[:33]), "Failed to load image"),
    "a text named PNG": (image_part(b"This is not a picture."), "not a PNG, JPEG, GIF, WebP or BMP"),
    "half a header": (image_part(RED_CIRCLE[:20]), "damaged or cut off"),
    "100 megapixels": (image_part(png_of_stated_size(10_000, 10_000)), "100,000,000"),
    "no base64": (url_part("data:image/png;base64,@@@@"), "base64"),
    "nothing": (url_part("data:image/png;base64,"), "not a PNG"),
    "an unknown scheme": (url_part("gopher://x.test/red.png"), "data: URLs"),
    "a file": (url_part("file:///etc/passwd"), "data: URLs"),
    "a remote address": (url_part("http://169.254.169.254/latest/meta-data"), "data: URLs"),
    "a video": ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, "video"),
    "a sound": ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "audio"),
    "tensors": ({"type": "image_embeds", "image_embeds": "AAAA"}, "image_embeds"),
    "an unknown kind": ({"type": "picture", "picture": "AAAA"}, "Unsupported chat content part"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_picture_is_refused_and_the_engine_stays_up(client: OpenAI, name: str, stream: bool) -> None:
    part, reason = BAD_PARTS[name]
    content: Any = [TEXT, part]
    with pytest.raises(openai.BadRequestError, match=f"(?i){reason}"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}], stream=stream)
    assert ask(client, RED_CIRCLE) == "red circle"


def test_too_many_pictures_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"At most 16 image\(s\) may be provided in one prompt\.$"):
        ask(client, *[RED_CIRCLE] * 17)
    assert ask(client, *[RED_CIRCLE] * 3) == "red circle, red circle, red circle"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_pictures_count_as_input_tokens(server: Server, path: str) -> None:
    """The configured limit is above the words alone and the pictures alone, and below both together."""
    is_responses = path == "/v1/responses"
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(RED_CIRCLE).decode()}
    picture: dict[str, Any] = image_part(RED_CIRCLE)
    if is_responses:
        picture = {"type": "input_image", "image_url": data_url(RED_CIRCLE)}
    elif path == "/v1/messages":
        picture = {"type": "image", "source": source}
    words = {"type": "input_text" if is_responses else "text", "text": "the " * 200}
    statuses = []
    with server.client() as http:
        for content in ([words], [picture] * 14, [words] + [picture] * 14):
            turns = [{"role": "user", "content": content}]
            body = {"model": MODEL, "input": turns} if is_responses else {"model": MODEL, "messages": turns}
            limit = "max_output_tokens" if is_responses else "max_tokens"
            response = http.post(path, json={**body, limit: 5})
            statuses.append(response.status_code)
    assert statuses == [200, 200, 400]
    assert "At most 250 input tokens" in response.text


def test_picture_for_a_model_without_vision(server: Server, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot see images") as caught:
        client.chat.completions.create(model=BLIND, messages=messages(RED_CIRCLE))
    assert (caught.value.code, caught.value.param) == ("not_supported", "messages[0].content[1].image_url.url")
    assert server.models()[BLIND]["state"] == "stopped"


@pytest.mark.parametrize("option", ["mm_processor_kwargs", "media_io_kwargs"])
def test_clients_cannot_change_image_preprocessing(client: OpenAI, option: str) -> None:
    with pytest.raises(openai.BadRequestError, match=option):
        client.chat.completions.create(
            model=MODEL, messages=messages(RED_CIRCLE), extra_body={option: {"size": {"longest_edge": 100_000}}}
        )
    assert ask(client, RED_CIRCLE) == "red circle"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [url_part("URL")]}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "URL"}]}]},
        ),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "URL"}]}]}),
        (
            "/v1/messages",
            {
                "max_tokens": 5,
                "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "URL"}}]}],
            },
        ),
        ("/tokenize", {"messages": [{"role": "user", "content": [url_part("URL")]}]}),
    ],
)
def test_nothing_is_fetched_from_the_network(server: Server, path: str, body: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, server.client() as http:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/red.png"
        content = json.dumps({"model": MODEL, **body}).replace("URL", url)
        response: httpx.Response = http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        assert "data: URLs" in response.text
        with pytest.raises(BlockingIOError):
            listener.accept()
