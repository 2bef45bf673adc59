"""Tool-call and reasoning parsers of vLLM by model family.

The chat template shows the format a model was trained on; if it cannot be read, family and name decide. A model whose
template has no tools gets no tool parser, because a parser could mistake plain text for a call.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from llm_api_server.types import ModelType

Family = Literal["qwen", "deepseek", "llama", "mistral", "gemma", "glm", "gpt-oss", "phi", "bert", "other"]

_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True)
class Clues:
    """Evidence of a model's family and format. None: unreadable.

    `name` is the name of the folder or the hub id, in lower case. An empty `template`: the model has none. `tokens`
    are those of `NEEDED_TOKENS` that the tokenizer has.
    """

    name: str
    model_type: str = ""
    template: str | None = None
    tokens: frozenset[str] | None = None


@dataclass(frozen=True)
class Parsers:
    """Names of the parsers of a model; None: no parser."""

    tool: str | None = None
    reasoning: str | None = None


#: Prefixes of `model_type` in config.json; longer ones first.
_MODEL_TYPES: tuple[tuple[str, Family], ...] = (
    ("qwen", "qwen"), ("qwq", "qwen"), ("deepseek", "deepseek"), ("mllama", "llama"), ("llama", "llama"),
    ("mistral", "mistral"), ("magistral", "mistral"), ("ministral", "mistral"), ("mixtral", "mistral"),
    ("devstral", "mistral"), ("pixtral", "mistral"), ("gemma", "gemma"), ("functiongemma", "gemma"),
    ("chatglm", "glm"), ("glm", "glm"), ("gpt_oss", "gpt-oss"), ("gpt-oss", "gpt-oss"), ("phi", "phi"),
    ("bert", "bert"), ("xlm-roberta", "bert"), ("roberta", "bert"), ("nomic_bert", "bert"),
    ("modernbert", "bert"), ("distilbert", "bert"), ("mpnet", "bert"),
)  # fmt: skip

#: Marks in a template that together identify a format of tool calls; more specific ones first.
_TOOL_FORMATS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|call|>"), "openai"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<tool_call>{function-name}<arg_key>",), "glm47"),
    (("<tool_call>", "<arg_key>"), "glm45"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("<|tool_call>",), "gemma4"),
    (("<start_function_call>",), "functiongemma"),
    (("<|tool_call|>",), "phi4_mini_json"),
    (("functools",), "phi4_mini_json"),
    (("<|header_start|>", '"name": function name'), "llama4_json"),
    (("<|header_start|>", "func_name1("), "llama4_pythonic"),
    (("<|python_start|>",), "llama4_pythonic"),
    (("func_name1(",), "pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (('"name": function name',), "llama3_json"),
)

#: family -> (part of the name, tool parser); the first match counts, and the empty name is the default.
_TOOLS_BY_NAME: dict[Family, tuple[tuple[str, str | None], ...]] = {
    "qwen": (
        ("qwen3-coder", "qwen3_coder"), ("qwen3.5", "qwen3_coder"), ("qwen3.6", "qwen3_coder"),
        ("qwen3-5", "qwen3_coder"), ("qwen2.5-vl", None), ("qwen2-5-vl", None), ("qwen2-vl", None), ("", "hermes"),
    ),
    "deepseek": (
        ("v4.1", "deepseek_v41"), ("v4", "deepseek_v4"), ("v3.2", "deepseek_v32"), ("v3.1", "deepseek_v31"),
        ("distill", None), ("r1-0528-qwen3", None), ("v2", None), ("v3", "deepseek_v3"), ("r1", "deepseek_v3"),
        ("", None),
    ),
    # Llama 3.0 has no tools.
    "llama": (
        ("llama-4", "llama4_pythonic"), ("llama4", "llama4_pythonic"), ("llama-3.1", "llama3_json"),
        ("llama-3.2", "llama3_json"), ("llama-3.3", "llama3_json"), ("", None),
    ),
    "mistral": (("8x22b", "mistral"), ("v0.1", None), ("v0.2", None), ("", "mistral")),
    "gemma": (("functiongemma", "functiongemma"), ("gemma-4", "gemma4"), ("gemma4", "gemma4"), ("", None)),
    "glm": (
        ("glm-4.7", "glm47"), ("glm-5", "glm47"), ("glm-4.5", "glm45"), ("glm-4.6", "glm45"), ("glm4-moe", "glm45"),
        ("glm4v-moe", "glm45"), ("", None),
    ),
    "gpt-oss": (("", "openai"),),
    "phi": (("phi-4-mini", "phi4_mini_json"), ("", None)),
    "bert": (("", None),),
    "other": (("", None),),
}  # fmt: skip

_REASONING_BY_NAME: dict[Family, tuple[tuple[str, str | None], ...]] = {
    "qwen": (("instruct", None), ("coder", None), ("qwq", "deepseek_r1"), ("qwen3", "qwen3"), ("", None)),
    "deepseek": (
        ("v4.1", "deepseek_v41"), ("v4", "deepseek_v4"), ("v3.1", "deepseek_v3"), ("v3.2", "deepseek_v3"), ("", None),
    ),
    "llama": (("", None),),
    "mistral": (("magistral", "mistral"), ("reasoning", "mistral"), ("", None)),
    "gemma": (("gemma-4", "gemma4"), ("gemma4", "gemma4"), ("", None)),
    "glm": (
        ("glm-4.7", "glm47"), ("glm-5", "glm45"), ("glm-4.5", "glm45"), ("glm-4.6", "glm45"), ("glm4-moe", "glm45"),
        ("glm4v-moe", "glm45"), ("", None),
    ),
    "gpt-oss": (("", "openai_gptoss"),),
    "phi": (("mini", None), ("reasoning", "deepseek_r1"), ("", None)),
    "bert": (("", None),),
    "other": (("", None),),
}  # fmt: skip

#: R1 and models distilled from it share a format, whatever their base.
_REASONING_EVERYWHERE = (("deepseek-r1", "deepseek_r1"),)

#: Parsers that take a response without an end of reasoning as all reasoning; only for templates with `<think>`.
_THINK_TAG_PARSERS = frozenset({"qwen3", "deepseek_r1", "deepseek_v3", "glm45", "glm47"})

#: Parts of names of models without a template, for which vLLM has an encoding of its own.
_ENCODED_BY_VLLM = ("v3.2", "v4")

#: Token that a parser of vLLM needs to start. Distilled models have the template of one family and the tokenizer of
#: another.
_NEEDED_TOKEN = {
    "deepseek_v3": "<｜tool▁calls▁begin｜>",
    "deepseek_v31": "<｜tool▁calls▁begin｜>",
    "llama3_json": "<|python_tag|>",
    "llama4_json": "<|python_tag|>",
    "mistral": "[TOOL_CALLS]",
    "deepseek_r1": "<think>",
}
NEEDED_TOKENS = frozenset(_NEEDED_TOKEN.values())


def family_of(declared: ModelType, clues: Clues) -> Family:
    """Return the declared family, else the one that `model_type` of config.json or the name starts with."""
    if declared != "auto":
        return declared
    short_name = clues.name.rsplit("/", 1)[-1]
    for text in (clues.model_type.lower(), short_name):
        for start, family in _MODEL_TYPES:
            if text.startswith(start):
                return family
    return "other"


def parsers_for(family: Family, clues: Clues) -> Parsers:
    if family in {"bert", "other"}:
        return Parsers()
    return Parsers(
        _if_supported(_tool_parser(family, clues), clues), _if_supported(_reasoning_parser(family, clues), clues)
    )


def _tool_parser(family: Family, clues: Clues) -> str | None:
    named = _by_name(_TOOLS_BY_NAME[family], clues)
    if clues.template is None:
        return named
    if not clues.template:
        return named if family == "deepseek" and any(part in clues.name for part in _ENCODED_BY_VLLM) else None
    if not _TOOLS.search(clues.template):
        return None
    found = (parser for marks, parser in _TOOL_FORMATS if all(mark in clues.template for mark in marks))
    return next(found, named)


def _reasoning_parser(family: Family, clues: Clues) -> str | None:
    parser = _by_name((*_REASONING_EVERYWHERE, *_REASONING_BY_NAME[family]), clues)
    if parser in _THINK_TAG_PARSERS and clues.template and "think>" not in clues.template:
        return None
    return parser


def _if_supported(parser: str | None, clues: Clues) -> str | None:
    token = _NEEDED_TOKEN.get(parser or "")
    return None if token and clues.tokens is not None and token not in clues.tokens else parser


def _by_name(table: tuple[tuple[str, str | None], ...], clues: Clues) -> str | None:
    # `model_type` helps if the name of the folder is arbitrary.
    text = f"{clues.name} {clues.model_type.lower().replace('_', '-')}"
    return next(parser for part, parser in table if part in text)
