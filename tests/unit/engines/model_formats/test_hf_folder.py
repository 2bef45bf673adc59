"""Hugging Face folders: facts of complete ones, reasons for incomplete ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.engines.base import ModelProblem
from llm_api_server.engines.model_formats.hf_folder import read_folder

TINY_VLM = Path(__file__).parents[3] / "fixtures" / "tiny-vlm"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
}


def write_safetensors(path: Path, size: int = 64) -> None:
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "F32", "shape": [16], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def write_folder(folder: Path, config: dict[str, Any] | None = None, **files: str) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA if config is None else config))
    write_safetensors(folder / "model.safetensors")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_facts_of_a_chat_model(tmp_path: Path) -> None:
    facts = read_folder(write_folder(tmp_path, chat_template__jinja="{{ tools }}"))
    assert facts.context_length == 8192
    assert facts.model_type == "llama"
    assert facts.template == "{{ tools }}"
    assert facts.kv_values_per_token == 30 * 3 * 64 * 2
    assert facts.weight_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert (facts.is_generative, facts.is_embedding, facts.has_vision) == (True, False, False)


def test_a_vision_model_has_its_lengths_in_text_config(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_config": {},
        "text_config": LLAMA | {"max_position_embeddings": 4096},
    }
    facts = read_folder(write_folder(tmp_path, config))
    assert facts.has_vision
    assert facts.context_length == 4096


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (False, False, False)),
        ({"vision_config": {}, "image_token_id": 1}, (True, False, False)),
        ({"vision_config": {}, "video_token_id": 2}, (True, True, False)),
        ({"img_processor": {}, "audio_processor": {}}, (True, False, True)),
        ({"audio_config": {}}, (False, False, True)),
        ({"thinker_config": {"vision_config": {}, "audio_config": {}, "video_token_index": 3}}, (True, True, True)),
    ],
)
def test_modalities_are_read_from_the_configuration(
    tmp_path: Path, config: dict[str, Any], expected: tuple[bool, bool, bool]
) -> None:
    facts = read_folder(write_folder(tmp_path, LLAMA | config))
    assert (facts.has_vision, facts.has_video, facts.has_audio) == expected


@pytest.mark.parametrize(
    ("name", "content", "has_vision"),
    [
        ("preprocessor_config.json", {"feature_extractor_type": "WhisperFeatureExtractor"}, False),
        ("preprocessor_config.json", {"image_processor_type": "MolmoImageProcessor"}, True),
        ("processor_config.json", {"feature_extractor": {}}, False),
        ("processor_config.json", {"image_processor": {}}, True),
    ],
)
def test_an_image_processor_means_vision(tmp_path: Path, name: str, content: dict[str, Any], has_vision: bool) -> None:
    write_folder(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert read_folder(tmp_path).has_vision is has_vision


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config", "thinker_config"])
def test_the_text_configuration_may_be_nested(tmp_path: Path, key: str) -> None:
    nested = {"text_config": LLAMA} if key == "thinker_config" else LLAMA
    facts = read_folder(write_folder(tmp_path, {"architectures": ["XForConditionalGeneration"], key: nested}))
    assert (facts.context_length, facts.kv_values_per_token) == (8192, 30 * 3 * 64 * 2)


def test_the_tiny_model_of_the_tests_is_read_right() -> None:
    facts = read_folder(TINY_VLM)
    assert (facts.model_type, facts.architectures) == ("idefics3", ("Idefics3ForConditionalGeneration",))
    assert (facts.has_vision, facts.has_video, facts.has_audio, facts.is_generative) == (True, False, False, True)
    assert (facts.context_length, facts.kv_values_per_token) == (2048, 3 * 4 * 32 * 2)
    assert "<image>" in (facts.template or "")
    assert facts.weight_bytes < 5_000_000


def test_the_context_of_a_sentence_model_is_that_of_its_own_file(tmp_path: Path) -> None:
    config = {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512}
    sentence = {"modules__json": "[]", "sentence_bert_config__json": '{"max_seq_length": 256}'}
    facts = read_folder(write_folder(tmp_path, config, **sentence))
    assert facts.is_embedding
    assert facts.context_length == 256


def test_the_template_may_be_in_the_tokenizers_configuration(tmp_path: Path) -> None:
    listed = json.dumps({"chat_template": [{"name": "tool_use", "template": "{{ tools }}"}]})
    facts = read_folder(write_folder(tmp_path, tokenizer_config__json=listed))
    assert facts.template is not None
    assert "tools" in facts.template


def test_latent_attention_keeps_one_vector_per_layer(tmp_path: Path) -> None:
    config = LLAMA | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert read_folder(write_folder(tmp_path, config)).kv_values_per_token == 30 * (512 + 64)


def test_mistrals_own_layout(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"max_seq_len": 32768, "vision_encoder": {}}')
    write_safetensors(tmp_path / "consolidated.safetensors")
    facts = read_folder(tmp_path)
    assert (facts.model_type, facts.context_length, facts.has_vision) == ("mistral", 32768, True)


def test_the_template_of_mistrals_tokenizer_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    write_safetensors(tmp_path / "consolidated.safetensors")
    assert read_folder(tmp_path).template is None
    write_folder(tmp_path)
    assert read_folder(tmp_path).template == ""
    (tmp_path / "tekken.json").write_text("{}")
    assert read_folder(tmp_path).template is None


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_tokens_that_parsers_need_are_found_in_the_tokenizer(tmp_path: Path, ensure_ascii: bool) -> None:
    added = [{"content": "<think>"}, {"content": "<｜tool▁calls▁begin｜>"}, {"content": "my[TOOL_CALLS]"}]
    tokenizer = json.dumps({"added_tokens": added}, ensure_ascii=ensure_ascii)
    assert read_folder(write_folder(tmp_path)).tokens is None
    facts = read_folder(write_folder(tmp_path, tokenizer__json=tokenizer))
    assert facts.tokens == frozenset({"<think>", "<｜tool▁calls▁begin｜>"})


def test_without_config_json_it_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelProblem, match=r"has no config\.json"):
        read_folder(tmp_path)


@pytest.mark.parametrize(("text", "reason"), [("{", "cannot be read"), ("[]", "not a JSON object")])
def test_a_damaged_config_json(tmp_path: Path, text: str, reason: str) -> None:
    write_folder(tmp_path, config__json=text)
    with pytest.raises(ModelProblem, match=reason):
        read_folder(tmp_path)


def test_missing_weights(tmp_path: Path) -> None:
    (write_folder(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ModelProblem, match="has no weights"):
        read_folder(tmp_path)


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}
    write_folder(tmp_path, model__safetensors__index__json=json.dumps(index))
    with pytest.raises(ModelProblem, match=r"2 of 3 weight files are missing, model-2\.safetensors"):
        read_folder(tmp_path)


def test_a_weight_file_truncated_anywhere_is_a_problem(tmp_path: Path) -> None:
    file = write_folder(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelProblem, match=r"model\.safetensors is (cut off|damaged)"):
            read_folder(tmp_path)


def test_a_header_of_nonsense(tmp_path: Path) -> None:
    file = write_folder(tmp_path) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 4) + b'["x"]'[:4] + bytes(50))
    with pytest.raises(ModelProblem, match="damaged"):
        read_folder(tmp_path)
