"""The text of `/metrics`: counters, the state of the server, and the metrics of the engines by model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.model_status import DeviceStatus, ModelStatus
from llm_api_server.manager.telemetry.counters import Counters
from llm_api_server.manager.telemetry.exposition import Exposition, Snapshot, _engine_families, text_of
from llm_api_server.types import ModelState

VLLM = """# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="internal"} 12.0
# TYPE vllm:prompt_tokens_created gauge
vllm:prompt_tokens_created{engine="0",model_name="internal"} 1.7e+09
# TYPE vllm:ttft_seconds histogram
vllm:ttft_seconds_bucket{engine="0",le="0.1",model_name="internal"} 1.0
vllm:ttft_seconds_bucket{engine="0",le="+Inf",model_name="internal"} 2.0
vllm:ttft_seconds_count{engine="0",model_name="internal"} 2.0
vllm:ttft_seconds_sum{engine="0",model_name="internal"} 0.5
# TYPE python_info gauge
python_info{version="3.11"} 1.0
"""
LLAMA = """# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 3
"""


def test_metrics_of_engines_are_merged_by_family_with_the_name_of_the_model() -> None:
    lines = text_of(_engine_families([("a", VLLM), ("b", VLLM), ("c", LLAMA), ("gone", "")])).splitlines()
    assert 'vllm:prompt_tokens_total{engine="0",model="a"} 12.0' in lines
    assert 'vllm:prompt_tokens_total{engine="0",model="b"} 12.0' in lines
    assert 'vllm:ttft_seconds_bucket{engine="0",le="+Inf",model="b"} 2.0' in lines
    assert 'llamacpp:prompt_tokens_total{model="c"} 3.0' in lines
    assert lines.count("# TYPE vllm:prompt_tokens_total counter") == 1
    assert not any("python_info" in line or "_created" in line or "model_name" in line for line in lines)


def test_an_invalid_text_of_an_engine_is_left_out() -> None:
    assert text_of(_engine_families([("a", "vllm:x{ 1"), ("c", LLAMA)])).count("llamacpp:prompt_tokens_total{") == 1


@pytest.mark.anyio
async def test_the_text_has_counters_gauges_and_processes_without_engines_that_are_gone(tmp_path: Path) -> None:
    counters = Counters()
    counters.load_over("m", "failed")

    async def snapshot() -> Snapshot:
        return Snapshot(
            models=[ModelStatus("m", ModelState.READY, "vllm", "org/m", in_flight=2, queued=3, memory_bytes=7)],
            devices=[DeviceStatus(id="gpu:0", name="GPU", total=100, limit=90, taken={"m": 40}, foreign=5, free=45)],
            engines=[InstanceInfo("i", "m", "vllm", f"unix:{tmp_path / 'gone'}")],
            workers=[os.getpid(), 2**22 + 1],  # the second does not exist
            is_store_up=False,
            waiting_reports=4,
        )

    lines = (await Exposition(counters, snapshot).text()).splitlines()
    for line in (
        'llm_api_server_model_loads_total{model="m",result="failed"} 1.0',
        'llm_api_server_requests_running{model="m"} 2.0',
        'llm_api_server_requests_waiting{model="m"} 3.0',
        'llm_api_server_model_state{model="m",state="ready"} 1.0',
        'llm_api_server_device_memory_bytes{device="gpu:0",kind="taken"} 40.0',
        "llm_api_server_workers 2.0",
        "llm_api_server_store_up 0.0",
        "llm_api_server_store_waiting_reports 4.0",
    ):
        assert line in lines
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    for process in ("manager", "workers"):
        assert float(values[f'llm_api_server_process_cpu_seconds_total{{process="{process}"}}']) > 0
        assert float(values[f'llm_api_server_process_open_fds{{process="{process}"}}']) > 2
