"""Which tool-call and reasoning parser of vLLM fits a model. Pure.

The chat template tells the format a model was taught; where it cannot be read, the family and the name decide. A model
whose template knows no tools gets no tool parser: a parser that expects calls could mistake plain text for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm_api_server.types import ModelType

Family = Literal["qwen", "deepseek", "llama", "mistral", "gemma", "glm", "gpt-oss", "phi", "bert", "other"]


@dataclass(frozen=True)
class Clues:
    """`name` is the folder's or hub's, in lower case; `template` None: could not be read, empty: there is none."""

    name: str
    model_type: str = ""
    template: str | None = None


@dataclass(frozen=True)
class Parsers:
    tool: str | None = None
    reasoning: str | None = None


#: Beginnings of `model_type` in config.json; the longer ones first where one begins another.
_MODEL_TYPES: tuple[tuple[str, Family], ...] = (
    ("qwen", "qwen"), ("qwq", "qwen"), ("deepseek", "deepseek"), ("mllama", "llama"), ("llama", "llama"),
    ("mistral", "mistral"), ("ministral", "mistral"), ("mixtral", "mistral"), ("pixtral", "mistral"),
    ("gemma", "gemma"), ("chatglm", "glm"), ("glm", "glm"), ("gpt_oss", "gpt-oss"), ("gpt-oss", "gpt-oss"),
    ("phi", "phi"), ("bert", "bert"), ("xlm-roberta", "bert"), ("roberta", "bert"), ("nomic_bert", "bert"),
    ("modernbert", "bert"), ("distilbert", "bert"), ("mpnet", "bert"),
)  # fmt: skip

#: All marks in a template that together mean a format of tool calls; the more particular first.
_TOOL_FORMATS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|call|>"), "openai"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<tool_call>", "<arg_key>"), "glm45"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("<|tool_call|>",), "phi4_mini_json"),
    (("<|python_start|>",), "llama4_pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (('"name": function name',), "llama3_json"),
)

#: family -> (part of the name, tool parser), first match; the last entry, the empty name, is the family's own.
_TOOLS_BY_NAME: dict[Family, tuple[tuple[str, str | None], ...]] = {
    "qwen": (("coder", "qwen3_coder"), ("qwen3.5", "qwen3_coder"), ("qwen3-next", "hermes"), ("", "hermes")),
    "deepseek": (("v4", "deepseek_v4"), ("v3.2", "deepseek_v32"), ("v3.1", "deepseek_v31"), ("", "deepseek_v3")),
    "llama": (("llama-4", "llama4_pythonic"), ("llama4", "llama4_pythonic"), ("llama-3", "llama3_json"), ("", None)),
    "mistral": (("", "mistral"),),
    "gemma": (("functiongemma", "functiongemma"), ("gemma-4", "gemma4"), ("", None)),
    "glm": (("4.7", "glm47"), ("", "glm45")),
    "gpt-oss": (("", "openai"),),
    "phi": (("phi-4-mini", "phi4_mini_json"), ("", None)),
    "bert": (("", None),),
    "other": (("", None),),
}

_REASONING_BY_NAME: dict[Family, tuple[tuple[str, str | None], ...]] = {
    "qwen": (("instruct", None), ("coder", None), ("qwq", "deepseek_r1"), ("qwen3", "qwen3"), ("", None)),
    "deepseek": (("v4", "deepseek_v4"), ("v3.1", "deepseek_v3"), ("v3.2", "deepseek_v3"), ("", None)),
    "llama": (("", None),),
    "mistral": (("magistral", "mistral"), ("", None)),
    "gemma": (("gemma-4", "gemma4"), ("", None)),
    "glm": (("4.7", "glm47"), ("4.5", "glm45"), ("4.6", "glm45"), ("", None)),
    "gpt-oss": (("", "openai_gptoss"),),
    "phi": (("reasoning", "deepseek_r1"), ("", None)),
    "bert": (("", None),),
    "other": (("", None),),
}

#: Parsers that take an answer without an end of thought for all thought; only for templates that know `<think>`.
_THINK_TAG_PARSERS = frozenset({"qwen3", "deepseek_r1", "deepseek_v3", "glm45", "glm47"})


def family_of(declared: ModelType, clues: Clues) -> Family:
    """The declared family, else the one that config.json's `model_type` or the name begins with."""
    if declared != "auto":
        return declared
    short_name = clues.name.rsplit("/", 1)[-1]
    for text in (clues.model_type.lower(), short_name):
        for start, family in _MODEL_TYPES:
            if text.startswith(start):
                return family
    return "other"


def every_parser() -> tuple[set[str], set[str]]:
    """All tool and all reasoning parsers that `parsers_for` can choose."""
    tools = {parser for table in _TOOLS_BY_NAME.values() for _, parser in table} | {name for _, name in _TOOL_FORMATS}
    reasoning = {parser for table in _REASONING_BY_NAME.values() for _, parser in table} | {"deepseek_r1"}
    return {name for name in tools if name}, {name for name in reasoning if name}


def parsers_for(family: Family, clues: Clues) -> Parsers:
    if family in {"bert", "other"}:
        return Parsers()
    return Parsers(_tool_parser(family, clues), _reasoning_parser(family, clues))


def _tool_parser(family: Family, clues: Clues) -> str | None:
    if clues.template is None:
        return _by_name(_TOOLS_BY_NAME[family], clues.name)
    if "tools" not in clues.template:
        # Mistral's own tokenizer brings tools along without a template.
        return "mistral" if family == "mistral" and not clues.template else None
    for marks, parser in _TOOL_FORMATS:
        if all(mark in clues.template for mark in marks):
            return parser
    return _by_name(_TOOLS_BY_NAME[family], clues.name)


def _reasoning_parser(family: Family, clues: Clues) -> str | None:
    # R1 and the models distilled from it think alike, whatever they are built on.
    parser = "deepseek_r1" if "deepseek-r1" in clues.name else _by_name(_REASONING_BY_NAME[family], clues.name)
    if parser in _THINK_TAG_PARSERS and clues.template is not None and "think>" not in clues.template:
        return None
    return parser


def _by_name(table: tuple[tuple[str, str | None], ...], name: str) -> str | None:
    return next(parser for part, parser in table if part in name)
