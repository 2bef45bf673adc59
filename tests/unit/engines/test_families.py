"""Parsers by family, name and template, for known models; none for models without tools."""

from __future__ import annotations

import pytest

from llm_api_server.engines.families import NEEDED_TOKENS, Clues, Parsers, family_of, parsers_for
from llm_api_server.types import ModelType

# What is particular to the templates that come with these models, in their own words.
HERMES = "{%- if tools %}...within <tool_call></tool_call> XML tags{%- endif %}"
THINK = "{%- if enable_thinking is false %}<think>\\n\\n</think>{%- endif %}"
QWEN_CODER = "{%- if tools %}<tool_call>\\n<function=example_function_name>\\n<parameter=x>{%- endif %}"
QWEN_25_VL = "{% for message in messages %}<|vision_start|><|image_pad|><|vision_end|>{% endfor %}"
DEEPSEEK_CALL = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
DEEPSEEK_V3 = "{% if tools is defined %}## Tools" + DEEPSEEK_CALL + "function<｜tool▁sep｜>NAME\\n```json{% endif %}"
DEEPSEEK_V31 = (
    "{% if tools %}## Tools" + DEEPSEEK_CALL + "NAME<｜tool▁sep｜>{% endif %}{% if thinking %}<think>{% endif %}"
)
#: It renders calls of the past, but tells the model of no tools.
DISTILL = "{% for tool in message['tool_calls'] %}" + DEEPSEEK_CALL + "```json{% endfor %}<｜Assistant｜><think>\\n"
LLAMA_31 = "{%- if tools is not none %}Environment: ipython{% endif %}<|python_tag|>"
LLAMA_32 = '{%- for t in tools %}Respond in the format {"name": function name, "parameters": dictionary}{% endfor %}'
LLAMA_4 = "<|header_start|>" + LLAMA_32 + "<|python_start|>"
PYTHONIC = "{%- if tools %}Example Format: [func_name1(params_name1=params_value1), func_name2(params)]{% endif %}"
MISTRAL = "[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS][TOOL_CALLS]"
GEMMA = "{{ bos_token }}{% for message in messages %}<start_of_turn>model\n{% endfor %}"
GLM_45 = "{% if tools %}<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>{% endif %}<think></think>"
GLM_47 = "{% if tools %}<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key>{% endif %}<think></think>"
GLM_4 = "{% if tools %}# 可用工具{% for tool in tools %}## {{ tool.name }}{% endfor %}{% endif %}"
HARMONY = "{%- if tools %}namespace functions{% endif %}<|start|>assistant<|channel|>analysis<|message|><|call|>"
PHI_4 = "{% for message in messages %}<|im_start|>user<|im_sep|>{% endfor %}"
PHI_4_MINI = (
    "{% if message['role'] == 'system' and 'tools' in message %}<|tool|>{{ message['tools'] }}<|/tool|>{% endif %}"
)
PHI_4_REASONING = PHI_4 + "<think> {Thought section} </think> {Solution section}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen/qwen2.5-7b-instruct", Parsers("hermes", None)),
        ("qwen/qwen2.5-coder-32b-instruct", Parsers("hermes", None)),
        ("qwen/qwen2.5-vl-7b-instruct", Parsers(None, None)),
        ("qwen/qwq-32b", Parsers("hermes", "deepseek_r1")),
        ("qwen/qwen3-8b", Parsers("hermes", "qwen3")),
        ("qwen/qwen3-30b-a3b-instruct-2507", Parsers("hermes", None)),
        ("qwen/qwen3-30b-a3b-thinking-2507", Parsers("hermes", "qwen3")),
        ("qwen/qwen3-coder-30b-a3b-instruct", Parsers("qwen3_coder", None)),
        ("qwen/qwen3-vl-8b-instruct", Parsers("hermes", None)),
        ("qwen/qwen3-vl-8b-thinking", Parsers("hermes", "qwen3")),
        ("deepseek-ai/deepseek-v3-0324", Parsers("deepseek_v3", None)),
        ("deepseek-ai/deepseek-v3.1", Parsers("deepseek_v31", "deepseek_v3")),
        ("deepseek-ai/deepseek-v3.2", Parsers("deepseek_v32", "deepseek_v3")),
        ("deepseek-ai/deepseek-r1", Parsers("deepseek_v3", "deepseek_r1")),
        ("deepseek-ai/deepseek-r1-0528", Parsers("deepseek_v3", "deepseek_r1")),
        ("deepseek-ai/deepseek-r1-0528-qwen3-8b", Parsers(None, "deepseek_r1")),
        ("deepseek-ai/deepseek-r1-distill-llama-8b", Parsers(None, "deepseek_r1")),
        ("meta-llama/meta-llama-3-8b-instruct", Parsers(None, None)),
        ("meta-llama/llama-3.1-8b-instruct", Parsers("llama3_json", None)),
        ("meta-llama/llama-3.3-70b-instruct", Parsers("llama3_json", None)),
        ("meta-llama/llama-4-scout-17b-16e-instruct", Parsers("llama4_pythonic", None)),
        ("mistralai/mistral-7b-v0.1", Parsers(None, None)),
        ("mistralai/mistral-small-3.2-24b", Parsers("mistral", None)),
        ("mistralai/magistral-small-2509", Parsers("mistral", "mistral")),
        ("openai/gpt-oss-20b", Parsers("openai", "openai_gptoss")),
        ("zai-org/glm-4-9b-0414", Parsers(None, None)),
        ("zai-org/glm-4.5-air", Parsers("glm45", "glm45")),
        ("zai-org/glm-4.7", Parsers("glm47", "glm47")),
        ("google/gemma-3-4b-it", Parsers(None, None)),
        ("google/functiongemma-270m-it", Parsers("functiongemma", None)),
        ("microsoft/phi-4", Parsers(None, None)),
        ("microsoft/phi-4-mini-instruct", Parsers("phi4_mini_json", None)),
        ("microsoft/phi-4-reasoning-plus", Parsers(None, "deepseek_r1")),
        ("baai/bge-m3", Parsers(None, None)),
    ],
)
def test_parsers_of_hub_ids_by_name(name: str, expected: Parsers) -> None:
    clues = Clues(name)
    assert parsers_for(family_of("auto", clues), clues) == expected


@pytest.mark.parametrize(
    ("name", "model_type", "template", "expected"),
    [
        ("qwen2.5-7b-instruct", "qwen2", HERMES, Parsers("hermes", None)),
        ("qwen2.5-vl-3b-instruct", "qwen2_5_vl", QWEN_25_VL, Parsers(None, None)),
        ("qwen3-4b", "qwen3", HERMES + THINK, Parsers("hermes", "qwen3")),
        ("qwen3-4b-instruct-2507", "qwen3", HERMES, Parsers("hermes", None)),
        ("qwen3-coder-30b-a3b-instruct", "qwen3_moe", QWEN_CODER, Parsers("qwen3_coder", None)),
        ("qwen3-vl-4b-instruct", "qwen3_vl", HERMES, Parsers("hermes", None)),
        ("qwen3-vl-4b-thinking", "qwen3_vl", HERMES + THINK, Parsers("hermes", "qwen3")),
        ("renamed", "qwen3", HERMES + THINK, Parsers("hermes", "qwen3")),
        ("renamed", "qwen3_moe", QWEN_CODER, Parsers("qwen3_coder", None)),
        ("deepseek-v3-0324", "deepseek_v3", DEEPSEEK_V3, Parsers("deepseek_v3", None)),
        ("deepseek-v3.1", "deepseek_v3", DEEPSEEK_V31, Parsers("deepseek_v31", "deepseek_v3")),
        ("deepseek-v3.2", "deepseek_v32", "", Parsers("deepseek_v32", "deepseek_v3")),
        ("deepseek-r1-0528", "deepseek_v3", DEEPSEEK_V3 + "</think>", Parsers("deepseek_v3", "deepseek_r1")),
        ("deepseek-r1-distill-qwen-7b", "qwen2", DISTILL, Parsers(None, "deepseek_r1")),
        ("deepseek-r1-0528-qwen3-8b", "qwen3", DISTILL, Parsers(None, "deepseek_r1")),
        ("llama-3.1-8b-instruct", "llama", LLAMA_31, Parsers("llama3_json", None)),
        ("llama-3.2-1b-instruct", "llama", LLAMA_32, Parsers("llama3_json", None)),
        ("llama-3.2-3b", "llama", LLAMA_32 + PYTHONIC, Parsers("pythonic", None)),
        ("llama-4-scout", "llama4", LLAMA_4, Parsers("llama4_json", None)),
        ("llama-4-scout", "llama4", "<|header_start|>" + PYTHONIC, Parsers("llama4_pythonic", None)),
        ("hermes-3-llama-3.1-8b", "llama", HERMES, Parsers("hermes", None)),
        ("mistral-7b-instruct-v0.3", "mistral", MISTRAL, Parsers("mistral", None)),
        ("mistral-7b-v0.1", "mistral", "", Parsers(None, None)),
        ("mistral-small-3.2", "mistral3", None, Parsers("mistral", None)),
        ("gemma-3-4b-it", "gemma3", GEMMA, Parsers(None, None)),
        ("gemma-3-4b-it", "gemma3", PYTHONIC, Parsers("pythonic", None)),
        ("glm-4.5-air", "glm4_moe", GLM_45, Parsers("glm45", "glm45")),
        ("glm-4.7", "glm4_moe", GLM_47, Parsers("glm47", "glm47")),
        ("renamed", "glm4_moe", GLM_45, Parsers("glm45", "glm45")),
        ("glm-4-9b-0414", "glm4", GLM_4, Parsers(None, None)),
        ("gpt-oss-20b", "gpt_oss", HARMONY, Parsers("openai", "openai_gptoss")),
        ("phi-4", "phi3", PHI_4, Parsers(None, None)),
        ("phi-4-mini-instruct", "phi3", PHI_4_MINI, Parsers("phi4_mini_json", None)),
        ("phi-4-reasoning", "phi3", PHI_4_REASONING, Parsers(None, "deepseek_r1")),
        ("phi-4-mini-reasoning", "phi3", PHI_4, Parsers(None, None)),
        (
            "smollm2-135m-instruct",
            "llama",
            "{% for message in messages %}<|im_start|>{% endfor %}",
            Parsers(None, None),
        ),
        ("qwen2-7b-instruct", "qwen2", "{{ message.tool_calls }}{{ builtin_tools }}", Parsers(None, None)),
    ],
)
def test_parsers_of_folders_by_template(name: str, model_type: str, template: str | None, expected: Parsers) -> None:
    clues = Clues(name, model_type, template, NEEDED_TOKENS)
    assert parsers_for(family_of("auto", clues), clues) == expected


def test_the_name_counts_within_a_declared_family() -> None:
    clues = Clues("deepseek-r1-0528-qwen3-8b", "qwen3", HERMES + THINK)
    assert parsers_for(family_of("qwen", clues), clues) == Parsers("hermes", "deepseek_r1")


@pytest.mark.parametrize(
    ("clues", "expected"),
    [
        (Clues("deepseek-r1-0528-qwen3-8b", "qwen3", DEEPSEEK_V3 + THINK), Parsers("deepseek_v3", "deepseek_r1")),
        (Clues("llama-3.1-8b", "llama", LLAMA_31), Parsers("llama3_json", None)),
        (Clues("phi-4-reasoning", "phi3", PHI_4_REASONING), Parsers(None, "deepseek_r1")),
    ],
)
def test_a_parser_needs_its_token_in_the_tokenizer(clues: Clues, expected: Parsers) -> None:
    family = family_of("auto", clues)
    assert parsers_for(family, clues) == expected
    without = Clues(clues.name, clues.model_type, clues.template, frozenset())
    assert parsers_for(family, without) == Parsers(None, None)


@pytest.mark.parametrize("declared", ["bert", "other"])
def test_families_without_chat_get_no_parsers(declared: ModelType) -> None:
    clues = Clues("anything", "qwen3", HERMES + THINK)
    assert parsers_for(family_of(declared, clues), clues) == Parsers(None, None)


@pytest.mark.parametrize(
    ("model_type", "family"),
    [
        ("qwen2_5_vl", "qwen"), ("mllama", "llama"), ("mistral3", "mistral"), ("gemma3_text", "gemma"),
        ("chatglm", "glm"), ("glm4v_moe", "glm"), ("gpt_oss", "gpt-oss"), ("phi3", "phi"), ("phi4mm", "phi"),
        ("deepseek_v3", "deepseek"), ("llama4", "llama"), ("bert", "bert"), ("falcon", "other"),
    ],
)  # fmt: skip
def test_families_by_model_type(model_type: str, family: str) -> None:
    assert family_of("auto", Clues("x", model_type)) == family
