"""Sizing and plans of llama.cpp for invented machines and files, and reasons of failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.config.models import InferenceConfig, ModelConfig
from llm_api_server.devices.host import Host
from llm_api_server.engines.base import DeviceAllocation, LaunchPlan, ModelProblem, Placement
from llm_api_server.engines.llama_cpp.adapter import LlamaCppEngine
from llm_api_server.engines.settings import EngineSettings
from tests.gguf_files import LLAMA, write_gguf

GIB = 1024**3
#: 32 layers of 8 heads of 128 numbers for keys and values: 128 KiB per token, as of an 8B model.
LARGE = LLAMA | {
    "llama.context_length": 131072,
    "llama.block_count": 32,
    "llama.embedding_length": 4096,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
}
HOST = Host(16 * GIB, 6, has_nvidia=False)


def engine_with(host: Host = HOST, **inference: Any) -> LlamaCppEngine:
    return LlamaCppEngine(EngineSettings(inference=InferenceConfig(**inference)), host)


def job_of(plan: LaunchPlan) -> dict[str, Any]:
    job: dict[str, Any] = json.loads(plan.argv[-1])
    return job


def params_of(engine: LlamaCppEngine, model: ModelConfig) -> dict[str, Any]:
    params: dict[str, Any] = job_of(engine.plan("name", model, Path("/run/e.sock")))["params"]
    return params


@pytest.fixture
def small(tmp_path: Path) -> str:
    return str(write_gguf(tmp_path / "small.gguf"))


@pytest.fixture
def large(tmp_path: Path) -> str:
    return str(write_gguf(tmp_path / "large.gguf", LARGE))


def test_a_small_model_gets_its_whole_context_in_four_slots(small: str) -> None:
    params = params_of(engine_with(), ModelConfig(path=small))
    assert (params["n_ctx"], params["n_parallel"]) == (4 * 4096, 4)
    assert params["model.path"] == small
    assert params["model_alias"] == ["name"]
    assert params["hostnames"] == ["/run/e.sock"]
    assert params["cpuparams.n_threads"] == 6
    assert params["ctx_shift"] is False


def test_an_unconfigured_context_is_what_fits_in_a_quarter_of_memory(large: str) -> None:
    engine, model = engine_with(), ModelConfig(path=large)
    assert engine.inspect(model).context_length == 4 * GIB // (128 * 1024)
    job = job_of(engine.plan("name", model, Path("/run/e.sock")))
    assert job["params"]["n_parallel"] == 1
    assert any("instead of the model's 131072" in note for note in job["notes"])


def test_a_small_machine_still_gives_4096_tokens(large: str) -> None:
    engine = engine_with(Host(1 * GIB, 1, has_nvidia=False))
    assert engine.inspect(ModelConfig(path=large)).context_length == 4096


def test_slots_are_reduced_if_their_caches_do_not_fit_and_the_log_has_a_note(large: str) -> None:
    engine = engine_with(max_total_tokens=4096, max_batch_size=32)
    job = job_of(engine.plan("name", ModelConfig(path=large), Path("/run/e.sock")))
    assert job["params"]["n_parallel"] == 8
    assert job["params"]["n_ctx"] == 8 * 4096
    assert job["notes"] == ["8 slots instead of 32: one's cache is 512 MiB, and caches get a quarter of memory"]


def test_a_smaller_cache_type_leaves_room_for_more_slots(large: str) -> None:
    args = {"cache_type_k": "q8_0", "cache_type_v": "GGML_TYPE_Q8_0"}
    engine = engine_with(max_total_tokens=4096, max_batch_size=32)
    params = params_of(engine, ModelConfig(path=large, engine_args=args))
    assert params["n_parallel"] == 15
    assert params["cache_type_k"] == "q8_0"


@pytest.mark.parametrize(
    ("max_tokens", "max_total_tokens", "expected"),
    [(None, None, 4096), (1024, None, 1024), (None, 512, 512), (1024, 512, 512), (100_000, 100_000, 4096)],
)
def test_the_context_is_the_smallest_limit(
    small: str, max_tokens: int | None, max_total_tokens: int | None, expected: int
) -> None:
    engine = engine_with(max_total_tokens=max_total_tokens)
    assert engine.inspect(ModelConfig(path=small, max_tokens=max_tokens)).context_length == expected


def test_the_needed_memory_comes_with_an_explanation(large: str) -> None:
    need = engine_with().inspect(ModelConfig(path=large, max_tokens=131072)).need
    assert need is not None
    assert (need.kind, need.count) == ("ram", 1)
    assert need.min_bytes > 16 * GIB
    assert "16.0 GiB of cache for 131072 tokens" in need.note


def test_layers_for_a_gpu_need_its_memory_and_others_see_none(large: str) -> None:
    host = Host(64 * GIB, 6, has_nvidia=True)
    on_gpu = ModelConfig(path=large, max_tokens=1024, engine_args={"n_gpu_layers": 99}, gpus=[1])
    need = engine_with(host).inspect(on_gpu).need
    assert need is not None
    assert (need.kind, need.gpus) == ("gpu", (1,))
    placement = Placement((DeviceAllocation("gpu1", need.min_bytes, 80 * GIB, 1),))
    assert engine_with(host).plan("x", on_gpu, Path("/s"), placement).env["CUDA_VISIBLE_DEVICES"] == "1"
    on_cpu = ModelConfig(path=large, max_tokens=1024)
    need = engine_with(host).inspect(on_cpu).need
    assert need is not None
    assert need.kind == "ram"
    assert not engine_with(host).plan("x", on_cpu, Path("/s")).env["CUDA_VISIBLE_DEVICES"]


def test_a_chat_model_embeds_as_well(small: str) -> None:
    params = params_of(engine_with(), ModelConfig(path=small))
    assert params["embedding"] is True
    assert params["pooling_type"] == "mean"
    assert params["n_ubatch"] == params["n_batch"] == 2048


def test_a_vocabulary_too_large_for_memory_makes_batches_smaller(tmp_path: Path) -> None:
    metadata = LLAMA | {"tokenizer.ggml.tokens": ["w"] * 100_000}
    path = str(write_gguf(tmp_path / "m.gguf", metadata))
    params = params_of(engine_with(Host(8 * GIB, 4, has_nvidia=False)), ModelConfig(path=path))
    assert params["n_batch"] == 1024  # 512 MiB hold the results of 1,342 tokens


@pytest.mark.parametrize("slots", [1, 3, 5, 7, 11, 12, 31])
def test_slots_share_a_batch_evenly_if_the_engine_embeds(small: str, slots: int) -> None:
    params = params_of(engine_with(max_batch_size=slots), ModelConfig(path=small))
    assert params["n_parallel"] == slots
    assert params["n_ubatch"] == params["n_batch"] >= 2048
    assert params["n_batch"] % slots == 0


def test_task_generate_does_not_embed_and_takes_short_steps(small: str) -> None:
    params = params_of(engine_with(), ModelConfig(path=small, task="generate"))
    assert params["embedding"] is False
    assert "pooling_type" not in params
    assert params["n_batch"] == 512


def test_an_embedding_file_takes_whole_inputs_with_its_own_pooling(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": "bert",
        "bert.context_length": 512,
        "bert.pooling_type": 2,
        "bert.block_count": 2,
        "bert.embedding_length": 64,
    }
    model = ModelConfig(path=str(write_gguf(tmp_path / "m.gguf", metadata)))
    engine = engine_with()
    params = params_of(engine, model)
    assert params["embedding"] is True
    assert "pooling_type" not in params
    assert params["n_ubatch"] == 512
    plan = engine.plan("name", model, Path("/run/e.sock"))
    assert plan.warmup is not None
    assert plan.warmup.path == "/v1/embeddings"


def test_a_generative_architecture_with_a_pooling_type_embeds(tmp_path: Path) -> None:
    path = str(write_gguf(tmp_path / "m.gguf", LLAMA | {"llama.pooling_type": 3}))
    assert params_of(engine_with(), ModelConfig(path=path))["n_ubatch"] == 4096
    assert params_of(engine_with(), ModelConfig(path=path, task="generate"))["embedding"] is False


def test_rank_pooling_reranks(tmp_path: Path) -> None:
    path = str(write_gguf(tmp_path / "m.gguf", LLAMA | {"llama.pooling_type": 4}))
    plan = engine_with().plan("name", ModelConfig(path=path), Path("/run/e.sock"))
    assert job_of(plan)["params"]["pooling_type"] == "rank"
    assert plan.warmup is None


def test_engine_args_override_and_sizes_follow_them(small: str) -> None:
    model = ModelConfig(path=small, engine_args={"n_ctx": 8192, "n_parallel": 8, "use_jinja": False})
    engine = engine_with()
    params = params_of(engine, model)
    assert (params["n_ctx"], params["n_parallel"], params["use_jinja"]) == (8192, 8, False)
    assert engine.inspect(model).context_length == 1024


@pytest.mark.parametrize("name", ["hostnames", "port", "model.path", "api_keys"])
def test_engine_args_cannot_move_the_server(small: str, name: str) -> None:
    with pytest.raises(ModelProblem, match=f"{name} is set by the server"):
        engine_with().plan("name", ModelConfig(path=small, engine_args={name: "x"}), Path("/run/e.sock"))


def test_optimize_first_token_off_keeps_no_prefixes_and_warms_nothing_up(small: str) -> None:
    engine = engine_with(optimize_first_token=False)
    params = params_of(engine, ModelConfig(path=small))
    assert (params["cache_prompt"], params["cache_ram_mib"]) == (False, 0)
    assert engine.plan("name", ModelConfig(path=small), Path("/run/e.sock")).warmup is None


def test_a_projector_with_a_vision_encoder_gives_vision(small: str, tmp_path: Path) -> None:
    seeing = write_gguf(tmp_path / "v.gguf", {"general.architecture": "clip", "clip.has_vision_encoder": True})
    hearing = write_gguf(tmp_path / "a.gguf", {"general.architecture": "clip", "clip.has_audio_encoder": True})
    engine = engine_with()
    assert engine.inspect(ModelConfig(path=small)).vision is False
    assert engine.inspect(ModelConfig(path=small, mmproj=str(seeing))).vision is True
    assert engine.inspect(ModelConfig(path=small, mmproj=str(hearing))).vision is False
    assert params_of(engine, ModelConfig(path=small, mmproj=str(seeing)))["mmproj.path"] == str(seeing)
    with pytest.raises(ModelProblem, match="does not exist"):
        engine.inspect(ModelConfig(path=small, mmproj=str(tmp_path / "none.gguf")))


def test_the_child_runs_isolated_in_the_configured_python_with_the_models_environment(small: str) -> None:
    model = ModelConfig(path=small, env={"GGML_X": "1"}, api_key="sk-not-for-argv")
    plan = LlamaCppEngine(EngineSettings("/opt/python"), HOST, threads=3).plan("name", model, Path("/run/e.sock"))
    assert plan.argv[:2] == ["/opt/python", "-I"]
    assert Path(plan.argv[2]).name == "llama_cpp_server.py"
    assert plan.env == {"GGML_X": "1"}
    assert plan.address == "unix:/run/e.sock"
    assert not any("sk-not-for-argv" in word for word in plan.argv)
    assert job_of(plan)["params"]["cpuparams_batch.n_threads"] == 3


def test_a_changed_file_is_read_again(small: str) -> None:
    engine = engine_with()
    assert engine.inspect(ModelConfig(path=small)).context_length == 4096
    write_gguf(Path(small), LLAMA | {"llama.context_length": 2048, "x": "longer"})
    assert engine.inspect(ModelConfig(path=small)).context_length == 2048


@pytest.mark.parametrize(
    ("log", "exit_code", "reason"),
    [
        (
            (
                "0.00.1.2 E llama_model_load: error loading model: error loading model architecture: "
                "unknown model architecture: 'foo'\n0.00.1.3 E srv init: exiting due to model loading error\n"
                "llama.cpp: Failed to init server, please check the input params."
            ),
            3,
            "llama.cpp does not know the model architecture 'foo'",
        ),
        ("llama.cpp: engine_args: llama.cpp has no option 'x'", 2, "engine_args: llama.cpp has no option 'x'"),
        ("0.1.2.3 E alloc_buffer: unable to allocate CUDA0 buffer", 3, "not enough memory: lower max_tokens or "),
        (
            "0.0.0.1 E llama_model_load: error loading model: missing tensor 'a' in /home/me/models/x.gguf\n",
            3,
            "llama.cpp cannot load the model: missing tensor 'a' in x.gguf",
        ),
        ("/build/ggml.c:12: GGML_ASSERT(n > 0) failed", 134, "llama.cpp stopped itself: GGML_ASSERT(n > 0) failed"),
        ("0.0.0.1 I all is well", 137, "llama.cpp was killed, most likely because the machine ran out of memory"),
        ("", -11, "llama.cpp crashed (SIGSEGV); see the model's log"),
        ("", 1, "llama.cpp ended with exit code 1; see the model's log"),
        ("", None, "llama.cpp ended without giving a reason; see the model's log"),
    ],
)
def test_the_reason_is_found_in_the_log(log: str, exit_code: int | None, reason: str) -> None:
    assert engine_with().explain_failure(log, exit_code).startswith(reason)


@pytest.mark.parametrize(
    ("task", "tasks"),
    [("auto", ("generate", "embed")), ("generate", ("generate",)), ("embed", ("embed",)), ("rank", ("rank",))],
)
def test_tasks_of_a_model(small: str, task: Any, tasks: Any) -> None:
    facts = engine_with().inspect(ModelConfig(path=small, task=task))
    assert (facts.tasks, facts.embedding_tasks) == (tasks, ())


def test_task_rank_ranks(small: str) -> None:
    assert params_of(engine_with(), ModelConfig(path=small, task="rank"))["pooling_type"] == "rank"
