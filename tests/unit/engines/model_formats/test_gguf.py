"""GGUF headers of complete, truncated and damaged files: facts or a reason, never a crash."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_api_server.engines.base import ModelProblem
from llm_api_server.engines.model_formats.gguf import read_facts, read_header
from tests.gguf_files import LLAMA, write_gguf


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("version", [2, 3])
def test_facts_of_a_whole_file(tmp_path: Path, version: int) -> None:
    facts = read_facts(write_gguf(tmp_path / "m.gguf", version=version))
    assert facts.architecture == "llama"
    assert facts.context_length == 4096
    assert facts.vocabulary == 3
    assert facts.has_chat_template
    assert facts.pooling_type is None
    # 2 layers of 2 heads of 64/4 numbers, for keys and for values
    assert facts.kv_values_per_token == 2 * 2 * (16 + 16)


def test_heads_per_layer_and_explicit_lengths(tmp_path: Path) -> None:
    metadata = LLAMA | {
        "llama.attention.head_count_kv": [0, 3],
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 4,
    }
    assert read_facts(write_gguf(tmp_path / "m.gguf", metadata)).kv_values_per_token == 3 * (8 + 4)


def test_pooling_and_vision_encoder_are_read(tmp_path: Path) -> None:
    metadata = LLAMA | {"llama.pooling_type": 4, "clip.has_vision_encoder": True}
    facts = read_facts(write_gguf(tmp_path / "m.gguf", metadata))
    assert facts.pooling_type == 4
    assert facts.has_vision_encoder


def test_the_end_of_the_data_is_the_end_of_a_whole_file(model: Path) -> None:
    header, size = read_header(model)
    assert header.data_end == size == model.stat().st_size


def test_a_file_truncated_within_its_tensors_is_reported_with_its_size(model: Path) -> None:
    whole = model.read_bytes()
    model.write_bytes(whole[:-40])
    with pytest.raises(ModelProblem, match=f"cut off: {len(whole) - 40} of {len(whole)} bytes"):
        read_facts(model)


def test_a_file_truncated_anywhere_is_a_problem(model: Path) -> None:
    whole = model.read_bytes()
    for length in range(len(whole)):
        model.write_bytes(whole[:length])
        with pytest.raises(ModelProblem, match=r"cut off|not a GGUF|empty"):
            read_facts(model)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_damaged_headers_never_crash_the_reader(model: Path, data: st.DataObject) -> None:
    damaged = bytearray(write_gguf(model).read_bytes())
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] = data.draw(st.integers(0, 255))
    model.write_bytes(damaged)
    try:
        size = read_facts(model).file_bytes
    except ModelProblem:
        return
    assert size == len(damaged)


def test_absurd_counts_are_refused_before_use(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60) + bytes(64))
    with pytest.raises(ModelProblem, match="claims"):
        read_facts(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "byte order"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture"),
    ],
)
def test_foreign_files_are_refused_with_a_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelProblem, match=reason):
        read_facts(path)


def test_a_missing_file_and_a_folder_have_different_messages(tmp_path: Path) -> None:
    with pytest.raises(ModelProblem, match=r"does not exist; check models\.available"):
        read_facts(tmp_path / "none.gguf")
    with pytest.raises(ModelProblem, match="folder"):
        read_facts(tmp_path)


def test_split_files_count_together_and_must_be_complete(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ModelProblem, match="part 2 of 2 of the model's file is missing"):
        read_facts(first)
    second = write_gguf(tmp_path / "m-00002-of-00002.gguf", {"split.no": 1})
    assert read_facts(first).file_bytes == first.stat().st_size + second.stat().st_size
    with pytest.raises(ModelProblem, match="must name the first"):
        read_facts(second)


def test_headers_longer_than_the_first_read(tmp_path: Path) -> None:
    metadata = LLAMA | {"tokenizer.ggml.tokens": ["word" * 20] * 60_000, "tokenizer.ggml.scores": list(range(5000))}
    assert read_facts(write_gguf(tmp_path / "m.gguf", metadata)).vocabulary == 60_000
