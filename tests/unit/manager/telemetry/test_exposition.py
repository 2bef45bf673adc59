"""Engines' own metrics carry the name of the model, and one family has all models."""

from __future__ import annotations

from llm_api_server.manager.telemetry.exposition import _engine_families, text_of

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


def test_labels_and_families() -> None:
    lines = text_of(_engine_families([("a", VLLM), ("b", VLLM), ("c", LLAMA), ("gone", "")])).splitlines()
    assert 'vllm:prompt_tokens_total{engine="0",model="a"} 12.0' in lines
    assert 'vllm:prompt_tokens_total{engine="0",model="b"} 12.0' in lines
    assert 'vllm:ttft_seconds_bucket{engine="0",le="+Inf",model="b"} 2.0' in lines
    assert 'llamacpp:prompt_tokens_total{model="c"} 3.0' in lines
    assert lines.count("# TYPE vllm:prompt_tokens_total counter") == 1
    assert not any("python_info" in line or "_created" in line or "model_name" in line for line in lines)


def test_what_is_no_metrics_text_is_left_out() -> None:
    assert text_of(_engine_families([("a", "vllm:x{ 1"), ("c", LLAMA)])).count("llamacpp:prompt_tokens_total{") == 1
