"""Plans of vLLM for invented machines, and reasons of failures found in its log."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from llm_api_server.config.models import InferenceConfig, ModelConfig
from llm_api_server.devices.host import Host
from llm_api_server.engines.base import ModelProblem
from llm_api_server.engines.settings import EngineSettings
from llm_api_server.engines.vllm.adapter import VllmEngine
from tests.fake_vllm import fake_vllm
from tests.unit.engines.model_formats.test_hf_folder import LLAMA, write_folder

GIB = 1024**3
CPU, GPU = Host(16 * GIB, 4, has_nvidia=False), Host(64 * GIB, 16, has_nvidia=True)


def engine_on(host: Host, **inference: Any) -> VllmEngine:
    return VllmEngine(EngineSettings("/opt/vllm/python", InferenceConfig(**inference)), host)


def argv_of(engine: VllmEngine, model: ModelConfig) -> list[str]:
    return engine.plan("name", model, Path("/run/e.sock")).argv


def value_of(argv: list[str], flag: str) -> str | None:
    return argv[argv.index(flag) + 1] if flag in argv else None


def test_a_gpu_plan_has_the_flags_of_the_same_meaning() -> None:
    model = ModelConfig(
        path="org/model",
        max_tokens=4096,
        quantization="awq",
        tensor_parallel_size=2,
        gpu_memory_utilization=0.8,
        trust_remote_code=True,
    )
    argv = argv_of(engine_on(GPU, max_batch_size=32), model)
    assert argv[:3] == ["/opt/vllm/python", "-m", "vllm.entrypoints.openai.api_server"]
    for flag, value in {
        "--model": "org/model",
        "--served-model-name": "name",
        "--uds": "/run/e.sock",
        "--max-model-len": "4096",
        "--max-num-seqs": "32",
        "--tensor-parallel-size": "2",
        "--quantization": "awq",
        "--gpu-memory-utilization": "0.8",
        "--max-num-batched-tokens": "8192",
    }.items():
        assert value_of(argv, flag) == value
    assert {"--trust-remote-code", "--enable-prefix-caching"} <= set(argv)
    assert not {"--enforce-eager", "--kv-cache-memory-bytes", "--compilation-config"} & set(argv)


def test_options_without_configuration_are_left_to_vllm() -> None:
    argv = argv_of(engine_on(GPU), ModelConfig(path="org/model"))
    left = {"--max-model-len", "--quantization", "--gpu-memory-utilization", "--trust-remote-code"}
    assert not left & set(argv)


def test_slots_equal_the_sequences_that_vllm_runs(tmp_path: Path) -> None:
    for folder in (Path("org/model"), write_folder(tmp_path)):
        for machine, usual in ((GPU, 256), (CPU, 4)):
            model = ModelConfig(path=str(folder))
            assert value_of(argv_of(engine_on(machine), model), "--max-num-seqs") == str(usual)
            assert engine_on(machine).inspect(model).slots == usual
            assert engine_on(machine, max_batch_size=9).inspect(model).slots == 9
            limited = model.model_copy(update={"engine_args": {"max_num_seqs": 3}})
            assert engine_on(machine, max_batch_size=9).inspect(limited).slots == 3


def test_a_cpu_plan_is_eager_with_a_cache_in_bytes(tmp_path: Path) -> None:
    engine = engine_on(CPU, max_batch_size=8)
    plan = engine.plan("name", ModelConfig(path=str(write_folder(tmp_path)), max_tokens=2048), Path("/run/e.sock"))
    assert value_of(plan.argv, "--kv-cache-memory-bytes") == str((2048 + 128) * 8 * 30 * 3 * 64 * 2 * 2)
    assert value_of(plan.argv, "--compilation-config") == '{"custom_ops": ["none"]}'
    assert "--enforce-eager" in plan.argv
    assert plan.env["OMP_NUM_THREADS"] == "4"


def test_a_cpu_cache_is_bounded_but_holds_one_full_context(tmp_path: Path) -> None:
    huge = LLAMA | {
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 2**17,
    }
    model = ModelConfig(path=str(write_folder(tmp_path, huge)))
    engine = engine_on(CPU)
    context = engine.inspect(model).context_length
    assert context is not None
    argv = argv_of(engine, model)
    assert value_of(argv, "--max-model-len") == str(context)
    assert context * 80 * 8 * 128 * 4 <= int(value_of(argv, "--kv-cache-memory-bytes") or 0) <= 4 * GIB


def test_local_folders_are_served_offline_and_hub_ids_are_not(tmp_path: Path) -> None:
    engine = engine_on(GPU)
    local = engine.plan("name", ModelConfig(path=str(write_folder(tmp_path))), Path("/run/e.sock"))
    hub = engine.plan("name", ModelConfig(path="org/model", env={"HF_TOKEN": "t"}), Path("/run/e.sock"))
    assert local.env["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in hub.env
    assert hub.env["HF_TOKEN"] == "t"
    assert local.env["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize(
    ("config", "task", "expected"),
    [
        ({"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512}, "auto", ["pooling"]),
        (LLAMA, "embed", ["pooling", "embed"]),
        (LLAMA, "auto", []),
        (LLAMA | {"architectures": ["Qwen3ForSequenceClassification"]}, "auto", ["pooling"]),
    ],
)
def test_embedding_models_run_pooling(tmp_path: Path, config: dict[str, Any], task: Any, expected: list[str]) -> None:
    argv = argv_of(engine_on(CPU), ModelConfig(path=str(write_folder(tmp_path, config)), task=task))
    assert [v for v in (value_of(argv, "--runner"), value_of(argv, "--convert")) if v] == expected
    assert ("--enable-prefix-caching" in argv) is not bool(expected)


def test_an_embedding_instance_of_a_chat_model_has_the_same_cache_on_a_cpu(tmp_path: Path) -> None:
    """By default vLLM would reserve gigabytes for it."""
    huge = LLAMA | {"num_hidden_layers": 80, "head_dim": 128, "max_position_embeddings": 2**17}
    chat = ModelConfig(path=str(write_folder(tmp_path, huge)))
    embedder = chat.model_copy(update={"task": "embed"})
    engine = engine_on(CPU)
    for flag in ("--kv-cache-memory-bytes", "--max-model-len"):
        value = value_of(argv_of(engine, embedder), flag)
        assert value is not None
        assert value == value_of(argv_of(engine, chat), flag)
    assert "--max-model-len" not in argv_of(engine_on(GPU), embedder)


QWEN_RANKER = {"hf_overrides": {"architectures": ["Qwen3ForSequenceClassification"]}}


@pytest.mark.parametrize(
    ("config", "options", "tasks", "embedding_tasks"),
    [
        (LLAMA, {}, ("generate",), ("embed", "rank", "score", "pool")),
        (LLAMA, {"task": "embed"}, ("embed", "rank", "score", "pool"), ()),
        (LLAMA, {"task": "rank"}, ("rank", "score", "classify", "pool"), ()),
        (LLAMA, {"engine_args": QWEN_RANKER}, ("rank", "score", "classify", "pool"), ()),
        (LLAMA, {"engine_args": {"runner": "pooling"}}, ("embed", "rank", "score", "pool"), ()),
        ({"architectures": ["BertModel"]}, {}, ("embed", "rank", "score", "pool"), ()),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}},
            {},
            ("rank", "score", "classify", "pool"),
            (),
        ),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "good", "1": "bad"}},
            {},
            ("classify", "pool"),
            (),
        ),
    ],
)
def test_tasks_of_a_model(
    tmp_path: Path, config: dict[str, Any], options: dict[str, Any], tasks: Any, embedding_tasks: Any
) -> None:
    facts = engine_on(CPU).inspect(ModelConfig(path=str(write_folder(tmp_path, config)), **options))
    assert (facts.tasks, facts.embedding_tasks) == (tasks, embedding_tasks)


def test_a_chat_model_ranks_as_a_classifier(tmp_path: Path) -> None:
    for path in (str(write_folder(tmp_path)), "org/model"):
        argv = argv_of(engine_on(CPU), ModelConfig(path=path, task="rank"))
        assert (value_of(argv, "--runner"), value_of(argv, "--convert")) == ("pooling", "classify")


def test_the_warm_up_suits_the_task(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path))
    chat = engine_on(CPU).plan("name", ModelConfig(path=folder), Path("/run/e.sock")).warmup
    embed = engine_on(CPU).plan("name", ModelConfig(path=folder, task="embed"), Path("/run/e.sock")).warmup
    assert chat is not None
    assert embed is not None
    assert (chat.path, chat.body["model"]) == ("/v1/completions", "name")
    assert embed.path == "/v1/embeddings"
    engine = engine_on(CPU, optimize_first_token=False)
    assert engine.plan("name", ModelConfig(path=folder), Path("/run/e.sock")).warmup is None


def test_parsers_come_with_automatic_tool_choice(tmp_path: Path) -> None:
    template = "{% if tools %}<tool_call>{% endif %}<think></think>"
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    write_folder(folder, LLAMA | {"model_type": "qwen3"}, chat_template__jinja=template)
    argv = argv_of(engine_on(CPU), ModelConfig(path=str(folder), type="qwen"))
    assert value_of(argv, "--tool-call-parser") == "hermes"
    assert value_of(argv, "--reasoning-parser") == "qwen3"
    assert "--enable-auto-tool-choice" in argv


def test_a_model_without_tools_gets_no_parsers(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path, chat_template__jinja="{{ messages }}"))
    argv = argv_of(engine_on(CPU), ModelConfig(path=folder))
    assert not {"--tool-call-parser", "--reasoning-parser", "--enable-auto-tool-choice"} & set(argv)


def engine_with(folder: Path, tool: list[str], reasoning: list[str]) -> VllmEngine:
    """Return an adapter whose vLLM registers these parsers."""
    python = fake_vllm(folder, tool, reasoning)
    return VllmEngine(EngineSettings(str(python)), CPU)


@pytest.fixture
def qwen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a model folder whose family has the parsers hermes and qwen3."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    template = "{% if tools %}<tool_call>{% endif %}<think></think>"
    return write_folder(folder, LLAMA | {"model_type": "qwen3"}, chat_template__jinja=template)


@pytest.mark.parametrize(
    ("tool", "reasoning", "kept"),
    [
        (["hermes"], ["qwen3"], {"--tool-call-parser", "--enable-auto-tool-choice", "--reasoning-parser"}),
        (["hermes"], ["other"], {"--tool-call-parser", "--enable-auto-tool-choice"}),
        (["other"], ["qwen3"], {"--reasoning-parser"}),
        (["other"], ["other"], set()),
    ],
)
def test_a_family_parser_that_vllm_lacks_is_left_out(
    tmp_path: Path, qwen: Path, tool: list[str], reasoning: list[str], kept: set[str]
) -> None:
    engine, model = engine_with(tmp_path, tool, reasoning), ModelConfig(path=str(qwen))
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    try:
        engine.inspect(model)
        argv = argv_of(engine, model)
    finally:
        logger.remove(sink)
    every = {"--tool-call-parser", "--enable-auto-tool-choice", "--reasoning-parser"}
    assert every & set(argv) == kept
    missing = [name for name, known in (("hermes", tool), ("qwen3", reasoning)) if name not in known]
    assert [any(f"'{name}'" in line for line in lines) for name in missing] == [True] * len(missing)
    assert len(lines) == len(missing)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"tool_call_parser": "hermess"}, "no tool parser 'hermess'; did you mean 'hermes'?"),
        ({"--reasoning-parser": "gwen3"}, "no reasoning parser 'gwen3'; did you mean 'qwen3'?"),
        ({"tool-call-parser": ["hermes"]}, "no tool parser"),
    ],
)
def test_a_configured_parser_that_vllm_lacks_is_a_problem(
    tmp_path: Path, qwen: Path, args: dict[str, Any], problem: str
) -> None:
    engine = engine_with(tmp_path, ["hermes", "mistral"], ["qwen3"])
    with pytest.raises(ModelProblem, match=re.escape(problem)):
        engine.inspect(ModelConfig(path=str(qwen), engine_args=args))


@pytest.mark.parametrize(
    "args",
    [
        {"tool_call_parser": "mistral", "reasoning_parser": None},
        {"tool_call_parser": "mine", "tool_parser_plugin": "/opt/mine.py"},
        {"reasoning-parser": "mine", "--reasoning-parser-plugin": "/opt/mine.py"},
    ],
)
def test_parsers_that_may_exist_are_accepted(tmp_path: Path, qwen: Path, args: dict[str, Any]) -> None:
    engine = engine_with(tmp_path, ["hermes", "mistral"], ["qwen3"])
    engine.inspect(ModelConfig(path=str(qwen), engine_args=args))


def test_automatic_tool_choice_goes_with_the_parser_in_use(tmp_path: Path, qwen: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    write_folder(plain, chat_template__jinja="{{ messages }}")
    own = argv_of(engine_on(CPU), ModelConfig(path=str(plain), engine_args={"tool-call-parser": "xlam"}))
    assert "--enable-auto-tool-choice" in own
    assert value_of(own, "--tool-call-parser") == "xlam"
    off = {"tool_call_parser": None, "reasoning_parser": None}
    without = argv_of(engine_on(CPU), ModelConfig(path=str(qwen), engine_args=off))
    assert not {"--tool-call-parser", "--reasoning-parser", "--enable-auto-tool-choice"} & set(without)
    refused = argv_of(engine_on(CPU), ModelConfig(path=str(qwen), engine_args={"enable_auto_tool_choice": False}))
    assert "--no-enable-auto-tool-choice" in refused


def test_engine_args_override_and_remove_defaults() -> None:
    args = {"max-num-seqs": 4, "enable_prefix_caching": False, "max_num_batched_tokens": None, "seed": 0}
    argv = argv_of(engine_on(GPU, max_batch_size=32), ModelConfig(path="org/model", engine_args=args))
    assert value_of(argv, "--max-num-seqs") == "4"
    assert argv.count("--max-num-seqs") == 1
    assert "--no-enable-prefix-caching" in argv
    assert "--max-num-batched-tokens" not in argv
    assert value_of(argv, "--seed") == "0"


@pytest.mark.parametrize("name", ["uds", "host", "served-model-name", "--api-key"])
def test_engine_args_cannot_move_the_server(name: str) -> None:
    with pytest.raises(ModelProblem, match="is set by the server"):
        argv_of(engine_on(GPU), ModelConfig(path="org/model", engine_args={name: "x"}))


def test_context_and_vision_are_known_without_a_load(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, LLAMA | {"vision_config": {}})
    facts = engine_on(GPU, max_total_tokens=4096).inspect(ModelConfig(path=str(folder)))
    assert (facts.context_length, facts.vision) == (4096, True)
    hub = engine_on(GPU).inspect(ModelConfig(path="org/model"))
    assert (hub.context_length, hub.vision) == (None, None)


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        ({"vision_config": {}}, {"image": 16, "video": 0, "audio": 0}),
        ({"vision_config": {}, "video_token_id": 2}, {"image": 16, "video": 1, "audio": 0}),
        ({"vision_config": {}, "audio_config": {}}, {"image": 16, "video": 0, "audio": 1}),
        ({}, None),
        ({"audio_config": {}}, None),
    ],
)
@pytest.mark.parametrize("host", [CPU, GPU])
def test_media_per_request_are_limited(
    tmp_path: Path, host: Host, config: dict[str, Any], limits: dict[str, int] | None
) -> None:
    model = ModelConfig(path=str(write_folder(tmp_path, LLAMA | config)))
    argv = argv_of(engine_on(host), model)
    said = value_of(argv, "--limit-mm-per-prompt")
    assert (json.loads(said) if said else None) == limits
    assert value_of(argv, "--mm-processor-cache-gb") == ("0" if limits else None)


def test_the_image_size_limit_is_that_of_the_configuration() -> None:
    plan = engine_on(GPU, max_image_pixels=300_000_000).plan("name", ModelConfig(path="org/model"), Path("/run/e.sock"))
    assert plan.env["VLLM_MAX_IMAGE_PIXELS"] == "300000000"


def test_engine_args_override_the_media_limits(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path, LLAMA | {"vision_config": {}}))
    argv = argv_of(engine_on(GPU), ModelConfig(path=folder, engine_args={"limit-mm-per-prompt": {"image": 40}}))
    assert argv.count("--limit-mm-per-prompt") == 1
    assert value_of(argv, "--limit-mm-per-prompt") == '{"image": 40}'


def test_a_missing_path_is_not_repeated_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(ModelProblem) as caught:
        engine_on(GPU).inspect(ModelConfig(path=str(tmp_path / "none")))
    assert str(caught.value) == "the model's path does not exist; check models.available.NAME.path"


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(ModelProblem, match="needs the folder"):
        engine_on(GPU).inspect(ModelConfig(path=str(file)))


@pytest.mark.parametrize(
    ("log", "exit_code", "reason"),
    [
        (
            (
                "(EngineCore pid=7) ERROR 11-22 15:48:00 [core.py:9] ValueError: No valid tokenizer in /srv/models/x\n"
                "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n"
            ),
            1,
            "vLLM: No valid tokenizer in x",
        ),
        (
            "api_server.py: error: unrecognized arguments: --no-such-flag 3\n",
            2,
            "vLLM does not accept engine_args: unrecognized arguments: --no-such-flag 3",
        ),
        (
            (
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
                "  Value error, The checkpoint you are trying to load has model type `foo`. [type=value_error]\n"
            ),
            1,
            "The checkpoint you are trying to load has model type `foo`.",
        ),
        (
            (
                "/opt/python: Error while finding module specification for 'vllm.entrypoints.openai.api_server' "
                "(ModuleNotFoundError: No module named 'vllm')\n"
            ),
            1,
            "vLLM is not installed where engines.vllm.python points; run `make vllm`",
        ),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …\n",
            1,
            "not enough memory on the device: Tried to allocate 2",
        ),
        ("INFO 11-22 15:48:00 [x.py:1] all is well\n", 137, "vLLM was killed, most likely because"),
    ],
)
def test_the_reason_is_found_in_the_log(log: str, exit_code: int, reason: str) -> None:
    assert engine_on(GPU).explain_failure(log, exit_code).startswith(reason)
