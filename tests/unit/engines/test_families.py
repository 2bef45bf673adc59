"""Parsers by family, name and template: the right ones for models people run, none for those that know no tools."""

from __future__ import annotations

import pytest

from llm_api_server.engines.families import Clues, Parsers, family_of, parsers_for
from llm_api_server.types import ModelType

HERMES = "{% if tools %}<tool_call>{% endif %}"
HERMES_THINK = HERMES + "<think></think>"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen/qwen2.5-7b-instruct", Parsers("hermes", None)),
        ("qwen/qwen3-8b", Parsers("hermes", "qwen3")),
        ("qwen/qwen3-30b-a3b-instruct-2507", Parsers("hermes", None)),
        ("qwen/qwen3-coder-30b-a3b-instruct", Parsers("qwen3_coder", None)),
        ("deepseek-ai/deepseek-v3.1", Parsers("deepseek_v31", "deepseek_v3")),
        ("deepseek-ai/deepseek-r1", Parsers("deepseek_v3", "deepseek_r1")),
        ("mistralai/mistral-small-3.2-24b", Parsers("mistral", None)),
        ("openai/gpt-oss-20b", Parsers("openai", "openai_gptoss")),
        ("zai-org/glm-4.5-air", Parsers("glm45", "glm45")),
        ("google/gemma-3-4b-it", Parsers(None, None)),
        ("baai/bge-m3", Parsers(None, None)),
    ],
)
def test_hub_ids_are_known_by_name(name: str, expected: Parsers) -> None:
    clues = Clues(name)
    assert parsers_for(family_of("auto", clues), clues) == expected


@pytest.mark.parametrize(
    ("declared", "clues", "expected"),
    [
        # The seed's own example: built on Qwen3, thinks like R1.
        ("qwen", Clues("deepseek-r1-0528-qwen3-8b", "qwen3", HERMES_THINK), Parsers("hermes", "deepseek_r1")),
        ("auto", Clues("my-model", "qwen3", HERMES_THINK), Parsers("hermes", None)),
        ("auto", Clues("qwen3-4b", "qwen3", HERMES_THINK), Parsers("hermes", "qwen3")),
        ("auto", Clues("qwen3-4b", "qwen3", HERMES), Parsers("hermes", None)),
        ("auto", Clues("x", "llama", "{{ tools }}<|python_tag|>"), Parsers("llama3_json", None)),
        ("auto", Clues("x", "deepseek_v3", "tools <｜tool▁calls▁begin｜> ```json"), Parsers("deepseek_v3", None)),
        ("auto", Clues("x", "deepseek_v3", "tools <｜tool▁calls▁begin｜>"), Parsers("deepseek_v31", None)),
        ("mistral", Clues("x", "mistral", ""), Parsers("mistral", None)),
    ],
)
def test_the_template_has_the_last_word(declared: ModelType, clues: Clues, expected: Parsers) -> None:
    assert parsers_for(family_of(declared, clues), clues) == expected


def test_a_template_without_tools_gets_no_tool_parser() -> None:
    smollm2 = Clues("smollm2-135m-instruct", "llama", "{% for message in messages %}<|im_start|>{% endfor %}")
    assert family_of("auto", smollm2) == "llama"
    assert parsers_for("llama", smollm2) == Parsers(None, None)


@pytest.mark.parametrize("declared", ["bert", "other"])
def test_families_that_do_not_chat_get_none(declared: ModelType) -> None:
    clues = Clues("anything", "qwen3", HERMES_THINK)
    assert parsers_for(family_of(declared, clues), clues) == Parsers(None, None)


@pytest.mark.parametrize(
    ("model_type", "family"),
    [
        ("qwen2_5_vl", "qwen"), ("mllama", "llama"), ("mistral3", "mistral"), ("gemma3_text", "gemma"),
        ("chatglm", "glm"), ("gpt_oss", "gpt-oss"), ("phi3", "phi"), ("bert", "bert"), ("falcon", "other"),
    ],
)  # fmt: skip
def test_families_by_model_type(model_type: str, family: str) -> None:
    assert family_of("auto", Clues("x", model_type)) == family
