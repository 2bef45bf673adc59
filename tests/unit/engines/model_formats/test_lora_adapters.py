"""LoRA adapters: vLLM's options for them, and refusal of those that do not fit."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.config.models import Config, ModelConfig, ModelsConfig
from llm_api_server.devices.host import Host
from llm_api_server.engines.base import ModelProblem
from llm_api_server.engines.llama_cpp.adapter import LlamaCppEngine
from llm_api_server.engines.model_formats.hf_folder import FolderFacts, read_folder
from llm_api_server.engines.model_formats.lora_adapters import adapter_options
from llm_api_server.engines.remote import RemoteEngine
from llm_api_server.engines.select import engines_by_model
from llm_api_server.engines.settings import EngineSettings
from llm_api_server.engines.vllm.adapter import VllmEngine
from tests.gguf_files import write_gguf
from tests.unit.engines.model_formats.test_hf_folder import write_folder

HOST = Host(16 * 1024**3, 4, has_nvidia=False)
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
Q_PROJ = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"


def write_adapter(
    folder: Path, config: dict[str, Any] | None = None, *, width: int = 576, layer: int = 29, **more: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps((CONFIG if config is None else config) | more))
    tensor = {"dtype": "F32", "shape": [8, width], "data_offsets": [0, 32 * width]}
    header = json.dumps({Q_PROJ.format(layer): tensor}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32 * width))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> FolderFacts:
    folder = tmp_path / "base"
    folder.mkdir()
    return read_folder(write_folder(folder))


def test_every_adapter_is_a_lora_module_of_its_name(tmp_path: Path, base: FolderFacts) -> None:
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two", r=24)
    options = adapter_options({"a": str(one), "b=c, d": str(two)}, base)
    assert options == {
        "enable_lora": True,
        "lora_modules": [{"name": "a", "path": str(one)}, {"name": "b=c, d", "path": str(two)}],
        "max_lora_rank": 32,
        "max_loras": 2,
        "max_cpu_loras": 2,
    }
    assert adapter_options({}, base) == {}


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (64, 64), (300, 320), (512, 512)])
def test_the_rank_is_rounded_up_to_one_that_vllm_allows(tmp_path: Path, rank: int, allowed: int) -> None:
    folder = write_adapter(tmp_path / "one", r=rank)
    assert adapter_options({"a": str(folder)}, None)["max_lora_rank"] == allowed


def test_the_largest_rank_of_a_pattern_counts(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "one", rank_pattern={"v_proj": 64})
    assert adapter_options({"a": str(folder)}, None)["max_lora_rank"] == 64


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"r": 0}, "no rank"),
        ({"r": "8"}, "no rank"),
        ({"r": 1024}, "between 1 and 512"),
        ({"rank_pattern": {"v_proj": 1024}}, "no rank"),
        ({"peft_type": "IA3"}, "type is IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_unsupported_adapters_are_refused_before_a_load(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    folder = write_adapter(tmp_path / "one", **config)
    with pytest.raises(ModelProblem, match=rf"^adapter 'mine': .*{reason}"):
        adapter_options({"mine": str(folder)}, None)


def test_missing_and_broken_files_are_reported_without_their_folder(tmp_path: Path, base: FolderFacts) -> None:
    folder = write_adapter(tmp_path / "one")
    weights = folder / "adapter_model.safetensors"

    def problem() -> str:
        with pytest.raises(ModelProblem) as caught:
            adapter_options({"mine": str(folder)}, base)
        assert str(tmp_path) not in str(caught.value)
        return str(caught.value)

    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is cut off" in problem()
    weights.unlink()
    assert "has no weights" in problem()
    (folder / "adapter_config.json").write_text("{")
    assert "its adapter_config.json cannot be read" in problem()
    (folder / "adapter_config.json").unlink()
    assert "its folder has no adapter_config.json" in problem()
    folder.rmdir()
    assert "its folder has no adapter_config.json" in problem()


def test_weights_in_pytorchs_format_are_accepted(tmp_path: Path, base: FolderFacts) -> None:
    folder = write_adapter(tmp_path / "one")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert adapter_options({"mine": str(folder)}, base)["max_lora_rank"] == 8


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"width": 2048}, "its hidden size is 2048, the model's is 576"),
        ({"layer": 30}, "it has a layer 30, the model has 30 layers"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    tmp_path: Path, base: FolderFacts, shape: dict[str, int], reason: str
) -> None:
    folder = write_adapter(tmp_path / "one", CONFIG | {"base_model_name_or_path": "/x/Llama-1B"}, **shape)
    with pytest.raises(ModelProblem, match=f"made for another model, Llama-1B: {reason}"):
        adapter_options({"mine": str(folder)}, base)


def test_modules_outside_the_decoder_may_have_other_sizes(tmp_path: Path, base: FolderFacts) -> None:
    folder = write_adapter(tmp_path / "one", width=99)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"base_model.model.model.", b"base_model.mode.visual."))
    assert adapter_options({"mine": str(folder)}, base)


def test_adapters_are_found_under_models_dir(tmp_path: Path) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    write_folder(tmp_path / "models" / "base")
    adapter = write_adapter(tmp_path / "models" / "adapters" / "one")
    entry = ModelConfig(path="base", adapters={"mine": "adapters/one"})
    config = Config(models=ModelsConfig(available={"m": entry}), source=tmp_path / "config.yaml")
    _, resolved = engines_by_model(config)["m"]
    engine = VllmEngine(EngineSettings(), HOST)
    engine.inspect(resolved)
    argv = engine.plan("m", resolved, Path("/run/e.sock")).argv
    assert "--enable-lora" in argv
    assert json.loads(argv[argv.index("--lora-modules") + 1]) == {"name": "mine", "path": str(adapter)}
    assert argv[argv.index("--max-lora-rank") + 1] == "8"


def test_adapters_cannot_be_given_in_engine_args_as_well(tmp_path: Path) -> None:
    write_folder(tmp_path)
    adapter = write_adapter(tmp_path / "one")
    args = {"lora-modules": ["x=/y"]}
    model = ModelConfig(path=str(tmp_path), adapters={"mine": str(adapter)}, engine_args=args)
    with pytest.raises(ModelProblem, match="lora_modules is set by the server"):
        VllmEngine(EngineSettings(), HOST).plan("m", model, Path("/run/e.sock"))
    alone = ModelConfig(path=str(tmp_path), engine_args=args)
    assert "--lora-modules" in VllmEngine(EngineSettings(), HOST).plan("m", alone, Path("/run/e.sock")).argv


def test_a_broken_adapter_is_a_problem_of_its_model(tmp_path: Path) -> None:
    write_folder(tmp_path)
    model = ModelConfig(path=str(tmp_path), adapters={"mine": str(tmp_path / "none")})
    with pytest.raises(ModelProblem, match="adapter 'mine'"):
        VllmEngine(EngineSettings(), HOST).inspect(model)


def test_only_vllm_serves_adapters(tmp_path: Path) -> None:
    gguf = str(write_gguf(tmp_path / "m.gguf"))
    with pytest.raises(ModelProblem, match=r"adapters need vLLM; llama\.cpp takes engine_args"):
        LlamaCppEngine(EngineSettings(), HOST).inspect(ModelConfig(path=gguf, adapters={"mine": "x"}))
    with pytest.raises(ModelProblem, match="adapters need vLLM"):
        RemoteEngine().inspect(ModelConfig(path="https://x.test/v1", adapters={"mine": "x"}))
