"""Real engine processes from real launch plans: readiness, responses, stop, and the reasons of failures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.config.models import (
    Config,
    EnginesConfig,
    InferenceConfig,
    LlamaCppConfig,
    ModelConfig,
    ModelsConfig,
    VllmConfig,
)
from llm_api_server.engines import readiness
from llm_api_server.engines.base import Engine, LaunchPlan, ModelProblem
from llm_api_server.engines.select import engines_by_model

pytestmark = pytest.mark.anyio


@dataclass
class Running:
    engine: Engine
    plan: LaunchPlan
    process: subprocess.Popen[bytes]
    log: Path

    async def ready(self) -> None:
        """Wait as the manager does: for the first response or the end of the process."""
        waiting = asyncio.create_task(self.engine.wait_ready(self.plan))
        while not waiting.done() and self.process.poll() is None:
            await asyncio.wait([waiting], timeout=0.1)
        if not waiting.done():
            waiting.cancel()
            pytest.fail(self.reason(self.process.returncode))
        await waiting

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        response = await readiness.request(self.plan.address, "POST", path, body)
        return response.status, json.loads(response.body)

    async def ended(self) -> int:
        return await asyncio.to_thread(self.process.wait)

    def reason(self, exit_code: int) -> str:
        return self.engine.explain_failure(self.log.read_text(errors="replace"), exit_code)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose path is short enough for unix sockets."""
    path = tmp_path_factory.mktemp("e")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@asynccontextmanager
async def started(folder: Path, model: ModelConfig, engines: EnginesConfig | None = None) -> AsyncIterator[Running]:
    config = Config(
        models=ModelsConfig(available={"the-name": model}),
        inference=InferenceConfig(max_total_tokens=2048, max_batch_size=2),
        engines=engines or EnginesConfig(llama_cpp=LlamaCppConfig(threads=1)),
        source=folder / "config.yaml",
    )
    engine, entry = engines_by_model(config)["the-name"]
    plan = engine.plan("the-name", entry, folder / "e.sock")
    log = folder / "engine.log"
    with log.open("wb") as output:
        environment = dict(os.environ) | plan.env
        process = subprocess.Popen(plan.argv, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        yield Running(engine, plan, process, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def test_llama_cpp_chats_embeds_and_stops_cleanly(smollm2_gguf: Path, folder: Path) -> None:
    async with started(folder, ModelConfig(path=str(smollm2_gguf))) as running:
        await running.ready()
        assert stat.S_IMODE((folder / "e.sock").stat().st_mode) == 0o600

        messages = [{"role": "user", "content": "Say hello."}]
        status, chat = await running.post("/v1/chat/completions", {"messages": messages, "max_tokens": 4})
        assert status == 200
        assert chat["model"] == "the-name"
        assert chat["usage"]["completion_tokens"] == 4
        assert chat["choices"][0]["message"]["content"]

        status, embeddings = await running.post("/v1/embeddings", {"input": ["hello", "a longer one"]})
        assert status == 200
        assert [len(item["embedding"]) for item in embeddings["data"]] == [576, 576]

        running.process.send_signal(signal.SIGTERM)
        assert await running.ended() == 0
        assert not (folder / "e.sock").exists()


async def test_llama_cpp_never_truncates_a_prompt_silently(smollm2_gguf: Path, folder: Path) -> None:
    async with started(folder, ModelConfig(path=str(smollm2_gguf), max_tokens=256)) as running:
        await running.ready()
        status, body = await running.post("/v1/completions", {"prompt": "word " * 400, "max_tokens": 4})
        assert status == 400
        assert body["error"]["type"] == "exceed_context_size_error"
        assert body["error"]["n_ctx"] == 256


async def test_llama_cpp_embeds_inputs_longer_than_its_default_batch(smollm2_gguf: Path, folder: Path) -> None:
    async with started(folder, ModelConfig(path=str(smollm2_gguf))) as running:
        await running.ready()
        status, body = await running.post("/v1/embeddings", {"input": "word " * 700})
        assert status == 200
        assert body["usage"]["prompt_tokens"] > 512


async def test_llama_cpp_is_stopped_by_its_memory_limit(smollm2_gguf: Path, folder: Path) -> None:
    """Nothing satisfies this schema, and llama.cpp allocates without end in search of it."""
    async with started(folder, ModelConfig(path=str(smollm2_gguf), max_tokens=512)) as running:
        await running.ready()
        schema = {"allOf": [{"type": "integer"}, {"type": "string"}]}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        messages = [{"role": "user", "content": "hi"}]
        with contextlib.suppress(OSError, EOFError, ValueError):  # a response of any kind, or none
            await running.post("/v1/chat/completions", {"messages": messages, "response_format": wanted})
        if running.process.poll() is not None:
            assert "memory" in running.reason(running.process.returncode)
            return
        status = Path(f"/proc/{running.process.pid}/status").read_text()
        (peak,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        assert int(peak) * 1024 < json.loads(running.plan.argv[-1])["memory_limit"]
        assert (await running.post("/v1/completions", {"prompt": "x", "max_tokens": 1}))[0] == 200


async def test_llama_cpp_replaces_a_stale_socket(smollm2_gguf: Path, folder: Path) -> None:
    async with started(folder, ModelConfig(path=str(smollm2_gguf))) as first:
        await first.ready()
        first.process.kill()
        await first.ended()
    assert (folder / "e.sock").exists()
    async with started(folder, ModelConfig(path=str(smollm2_gguf))) as second:
        await second.ready()


async def test_llama_cpp_options_reach_the_engine(smollm2_gguf: Path, folder: Path) -> None:
    args = {"cache_type_k": "q8_0", "cache_type_v": "q8_0", "sampling.temp": 0, "n_parallel": 3}
    async with started(folder, ModelConfig(path=str(smollm2_gguf), engine_args=args)) as running:
        await running.ready()
        props = json.loads((await readiness.request(running.plan.address, "GET", "/props")).body)
        assert props["total_slots"] == 3
        assert props["default_generation_settings"]["params"]["temperature"] == 0


@pytest.mark.parametrize("slots", [1, 3, 7])
async def test_llama_cpp_embeds_with_any_number_of_slots(smollm2_gguf: Path, folder: Path, slots: int) -> None:
    """A batch that the slots cannot share evenly makes llama.cpp abort."""
    model = ModelConfig(path=str(smollm2_gguf), max_tokens=256, engine_args={"n_parallel": slots})
    async with started(folder, model) as running:
        await running.ready()
        inputs = [f"{'word ' * length} end" for length in range(1, 12)]
        status, body = await running.post("/v1/embeddings", {"input": inputs})
        assert status == 200
        assert [item["index"] for item in body["data"]] == list(range(11))


@pytest.mark.parametrize(
    ("engine_args", "reason"),
    [
        ({"n_ctxx": 1}, "engine_args: llama.cpp has no option 'n_ctxx'; did you mean n_ctx"),
        ({"pooling_type": "median"}, "it is one of unspecified, none, mean, cls, last, rank"),
    ],
)
async def test_llama_cpp_names_the_wrong_option(
    smollm2_gguf: Path, folder: Path, engine_args: dict[str, Any], reason: str
) -> None:
    async with started(folder, ModelConfig(path=str(smollm2_gguf), engine_args=engine_args)) as running:
        assert reason in running.reason(await running.ended())


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        # The same length each, so that the header keeps its length.
        (b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00lorem", "architecture 'lorem'"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_x.weight", "blk.0.attn_q.weight"),
    ],
)
async def test_llama_cpp_explains_a_failed_load(
    smollm2_gguf: Path, folder: Path, old: bytes, new: bytes, reason: str
) -> None:
    content = smollm2_gguf.read_bytes()
    assert old in content
    broken = folder / "broken.gguf"
    broken.write_bytes(content.replace(old, new, 1))
    async with started(folder, ModelConfig(path=str(broken))) as running:
        exit_code = await running.ended()
        assert exit_code == 3
        shown = running.reason(exit_code)
        assert reason in shown
        assert str(folder) not in shown


async def test_bad_files_are_refused_before_a_process_starts(smollm2_gguf: Path, folder: Path) -> None:
    cut = folder / "cut.gguf"
    cut.write_bytes(smollm2_gguf.read_bytes()[:-1000])
    other = folder / "other.gguf"
    other.write_bytes(b"<html>404</html>" * 100)
    for path, reason in ((cut, "cut off"), (other, "not a GGUF file"), (folder / "none.gguf", "does not exist")):
        with pytest.raises(ModelProblem, match=reason) as caught:
            async with started(folder, ModelConfig(path=str(path))):
                pass
        assert str(folder) not in str(caught.value)


async def test_missing_llama_cpp_is_explained(smollm2_gguf: Path, folder: Path) -> None:
    async with started(folder, ModelConfig(path=str(smollm2_gguf))) as running:
        running.process.kill()
        await running.ended()
    bare = subprocess.run(
        [running.plan.argv[0], "-I", "-S", *running.plan.argv[2:]], capture_output=True, text=True, check=False
    )
    assert bare.returncode == 2
    assert "cannot import xllamacpp" in running.engine.explain_failure(bare.stdout, bare.returncode)


@pytest.mark.vllm
@pytest.mark.timeout(300)
async def test_vllm_chats_and_stops(smollm2_folder: Path, vllm_python: Path, folder: Path) -> None:
    engines = EnginesConfig(vllm=VllmConfig(python=str(vllm_python)))
    async with started(folder, ModelConfig(path=str(smollm2_folder)), engines) as running:
        await running.ready()
        messages = [{"role": "user", "content": "Say hello."}]
        body = {"model": "the-name", "messages": messages, "max_tokens": 4}
        status, chat = await running.post("/v1/chat/completions", body)
        assert status == 200
        assert chat["usage"]["completion_tokens"] == 4
        running.process.send_signal(signal.SIGTERM)
        assert await running.ended() == 0


@pytest.mark.vllm
@pytest.mark.timeout(300)
async def test_vllm_embeds(minilm_folder: Path, vllm_python: Path, folder: Path) -> None:
    engines = EnginesConfig(vllm=VllmConfig(python=str(vllm_python)))
    async with started(folder, ModelConfig(path=str(minilm_folder)), engines) as running:
        await running.ready()
        status, body = await running.post("/v1/embeddings", {"model": "the-name", "input": "hello"})
        assert status == 200
        assert len(body["data"][0]["embedding"]) == 384


@pytest.mark.vllm
@pytest.mark.timeout(300)
async def test_vllm_names_the_unknown_architecture(smollm2_folder: Path, vllm_python: Path, folder: Path) -> None:
    model = folder / "model"
    model.mkdir()
    for file in smollm2_folder.iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((smollm2_folder / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config | {"model_type": "lorem", "architectures": ["LoremLM"]}))
    engines = EnginesConfig(vllm=VllmConfig(python=str(vllm_python)))
    async with started(folder, ModelConfig(path=str(model)), engines) as running:
        shown = running.reason(await running.ended())
        assert "lorem" in shown.lower()
        assert str(folder) not in shown
