"""Pictures in chat requests: checked, fetched, and sent to the engine as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_api_server.config.models import InferenceConfig
from llm_api_server.gateway.proxy import front_door
from llm_api_server.ipc.run_dir import RunDir
from tests.gateway_worker import PNG, Gateway, make_config, run_gateway
from tests.pictures import data_url, image_part, png_of_stated_size
from tests.web import PICTURE, Web, make_certificate, ok

pytestmark = pytest.mark.anyio


async def test_pictures_are_checked_and_never_fetched_by_default(gateway: Gateway) -> None:
    async def ask(url: str, model: str = "m") -> httpx.Response:
        parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
        return await gateway.client.post(
            "/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": parts}]}
        )

    assert (await ask(PNG)).status_code == 200
    blind = await ask(PNG, "org/blind")
    assert (blind.status_code, blind.json()["error"]["param"]) == (400, "messages[0].content[1].image_url.url")
    for url in ("http://169.254.169.254/x", "https://x.test/a.png", "file:///etc/passwd", "data:image/png;base64,AAAA",
                "data:image/png;base64,%%%", "data:image/png,xx", "HTTP://x.test/"):  # fmt: skip
        assert (await ask(url)).status_code == 400, url
    assert len(gateway.engine_log()) == 1


async def test_pictures_by_url_reach_the_engine_as_data(
    run_dir: RunDir, engine_socket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = Web(make_certificate(tmp_path))
    await web.start()
    monkeypatch.setattr(front_door, "MediaFetcher", lambda _: web.fetcher(max_bytes=10_000))
    web.responses["/large.png"] = [ok(PICTURE + bytes(20_000))]
    async with run_gateway(run_dir, engine_socket, make_config(run_dir)) as gateway:

        async def ask(*urls: str, **more: Any) -> httpx.Response:
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            body = {"model": "m", "messages": [{"role": "user", "content": parts}], **more}
            return await gateway.client.post("/v1/chat/completions", json=body)

        seen = web.url("/a.png")
        assert (await ask(seen, PNG, seen)).status_code == 200
        streamed = await ask(seen, stream=True)
        refused = [await ask(seen, url) for url in (web.url("/no.png"), web.url("/large.png"), "http://a.example.com/")]
        blind = await ask(seen, model="org/blind")
        bodies = gateway.engine_bodies()
    await web.stop()
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert [response.status_code for response in (*refused, blind)] == [400] * 4
    assert {response.json()["error"]["param"] for response in refused} == {"messages[0].content[1].image_url.url"}
    assert len(web.asked) == 6  # each picture of a request once, and none for a model without vision
    urls = [[part["image_url"]["url"] for part in body["messages"][0]["content"]] for body in bodies]
    assert urls == [[data_url(PICTURE), PNG, data_url(PICTURE)], [data_url(PICTURE)]]


@pytest.mark.parametrize(
    ("sides", "status"), [([100], 200), ([101], 400), ([60, 60], 200), ([60, 60, 60], 400), ([30_000], 400)]
)
async def test_pictures_are_limited_by_their_decoded_size(
    run_dir: RunDir, engine_socket: Path, sides: list[int], status: int
) -> None:
    config = make_config(run_dir, inference=InferenceConfig(max_image_pixels=10_000))
    pictures = [png_of_stated_size(side, side) for side in sides]
    body = {"model": "m", "messages": [{"role": "user", "content": [image_part(picture) for picture in pictures]}]}
    async with run_gateway(run_dir, engine_socket, config) as gateway:
        response = await gateway.client.post("/v1/chat/completions", json=body)
        reached = len(gateway.engine_log())
    assert (response.status_code, reached) == (status, int(status == 200))
    if status == 400:
        error = response.json()["error"]
        assert "10,000 pixels" in error["message"]
        assert error["param"] == f"messages[0].content[{len(sides) - 1}].image_url.url"
