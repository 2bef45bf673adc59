"""Needs of vLLM models for GPU memory and RAM, and plans for a placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_api_server.config.models import ModelConfig
from llm_api_server.devices.host import Host
from llm_api_server.engines.base import DeviceAllocation, ModelProblem, Need, Placement
from llm_api_server.engines.settings import EngineSettings
from llm_api_server.engines.vllm.adapter import VllmEngine
from tests.unit.engines.model_formats.test_hf_folder import LLAMA, write_folder

GIB = 1024**3
CPU, GPU = Host(16 * GIB, 4, has_nvidia=False), Host(64 * GIB, 16, has_nvidia=True)
SOCKET = Path("/run/e.sock")


def engine_on(host: Host) -> VllmEngine:
    return VllmEngine(EngineSettings(), host)


def need_of(host: Host, **entry: Any) -> Need:
    model = ModelConfig(**{"path": "org/model", **entry})
    need = engine_on(host).inspect(model).need
    assert need is not None
    return need


def plan_of(placement: Placement, **entry: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Return the flags with their values, and the environment."""
    model = ModelConfig(**{"path": "org/model", **entry})
    plan = engine_on(GPU).plan("m0", model, SOCKET, placement)
    pairs = zip(plan.argv, [*plan.argv[1:], ""], strict=True)
    return {word: following for word, following in pairs if word.startswith("--")}, plan.env


def allocation(index: int, taken: float, total: float) -> DeviceAllocation:
    return DeviceAllocation(f"gpu{index}", int(taken * GIB), int(total * GIB), index)


def test_the_default_share_is_soft() -> None:
    need = need_of(GPU)
    assert (need.kind, need.count, need.share, need.is_share_soft, need.measures_memory) == ("gpu", 1, 0.9, True, True)


@pytest.mark.parametrize("host", [CPU, GPU])
def test_the_need_of_a_hub_id_notes_that_its_weights_are_unknown(host: Host, tmp_path: Path) -> None:
    assert "whose size is not known before they are downloaded" in need_of(host).note
    assert "not known" not in need_of(host, path=str(write_folder(tmp_path, LLAMA))).note


@pytest.mark.parametrize("entry", [{"gpu_memory_utilization": 0.4}, {"engine_args": {"gpu-memory-utilization": 0.4}}])
def test_a_configured_share_is_not_soft(entry: dict[str, Any]) -> None:
    need = need_of(GPU, **entry)
    assert (need.share, need.is_share_soft) == (0.4, False)


def test_devices_are_counted_over_tensors_and_stages_and_share_the_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, LLAMA)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    need = need_of(
        GPU, path=str(folder), tensor_parallel_size=2, engine_args={"pipeline_parallel_size": 2}, gpus=[0, 3]
    )
    assert (need.count, need.gpus) == (4, (0, 3))
    assert need.min_bytes == weights // 4 + GIB


def test_on_a_cpu_the_need_includes_weights_cache_and_overhead(tmp_path: Path) -> None:
    need = need_of(CPU, path=str(write_folder(tmp_path, LLAMA)), max_tokens=1024)
    assert need.kind == "ram"
    assert need.min_bytes > 1.5 * GIB
    assert "of cache" in need.note


def test_the_plan_names_the_devices_and_the_share_that_holds_on_all() -> None:
    placement = Placement((allocation(1, 20, 24), allocation(3, 60, 80)))
    flags, env = plan_of(placement, tensor_parallel_size=2)
    assert (env["CUDA_DEVICE_ORDER"], env["CUDA_VISIBLE_DEVICES"]) == ("PCI_BUS_ID", "1,3")
    assert flags["--gpu-memory-utilization"] == "0.75"
    assert "--kv-cache-memory-bytes" not in flags


def test_beside_another_instance_the_cache_is_given_in_bytes(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path, LLAMA))
    flags, _ = plan_of(Placement((allocation(0, 10, 24),), is_shared=True), path=folder)
    assert 6.9 * GIB < int(flags["--kv-cache-memory-bytes"]) < 7 * GIB
    flags, _ = plan_of(Placement((allocation(0, 2, 24),), is_shared=True), path=folder)
    assert "--kv-cache-memory-bytes" not in flags, "too little to say: vLLM measures"
    theirs = {"kv_cache_memory_bytes": 123}
    flags, _ = plan_of(Placement((allocation(0, 10, 24),), is_shared=True), path=folder, engine_args=theirs)
    assert flags["--kv-cache-memory-bytes"] == "123"


def test_sleep_is_enabled_by_configuration(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path, LLAMA))
    wanted, other = ModelConfig(path=folder, sleep=True), ModelConfig(path=folder)
    engine = engine_on(GPU)
    assert engine.inspect(wanted).sleep_footprint is not None
    assert "--enable-sleep-mode" in engine.plan("m0", wanted, SOCKET).argv
    assert engine.inspect(other).sleep_footprint is None
    assert "--enable-sleep-mode" not in engine.plan("m1", other, SOCKET).argv
    assert engine.plan("m0", wanted, SOCKET).env["VLLM_SERVER_DEV_MODE"] == "1", "it has the endpoints"


def test_vllm_does_not_sleep_on_a_cpu(tmp_path: Path) -> None:
    model = ModelConfig(path=str(write_folder(tmp_path, LLAMA)), sleep=True)
    engine = engine_on(CPU)
    assert engine.inspect(model).sleep_footprint is None
    assert "--enable-sleep-mode" not in engine.plan("m0", model, SOCKET).argv


def test_devices_cannot_be_chosen_by_environment() -> None:
    model = ModelConfig(path="org/model", env={"CUDA_VISIBLE_DEVICES": "1"})
    with pytest.raises(ModelProblem, match=r"gpus: \[0, 1\]"):
        engine_on(GPU).inspect(model)
