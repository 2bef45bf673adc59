"""`engine_args` of vLLM models: spelling, reserved names, named parsers, and their form on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from llm_api_server.config.document import suggest
from llm_api_server.config.models import ModelConfig
from llm_api_server.engines.base import ModelProblem
from llm_api_server.engines.vllm.installed import ParserNames

#: Arguments that the server sets; another value would leave the engine unreachable or open.
_RESERVED = frozenset(
    {
        "model", "served_model_name", "uds", "host", "port", "api_key", "ssl_keyfile", "ssl_certfile", "root_path",
        "enable_sleep_mode",
    }
)  # fmt: skip
#: Arguments that name a parser, each with its registry and the argument of a plugin that may add to it.
_PARSER_ARGUMENTS = {
    "tool_call_parser": ("tool", "tool_parser_plugin"),
    "reasoning_parser": ("reasoning", "reasoning_parser_plugin"),
}


def underscored_names(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with names such as `max_num_seqs`, which may be given as `--max-num-seqs`."""
    return {_underscored(name): value for name, value in engine_args.items()}


def _underscored(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def checked(engine_args: Mapping[str, Any], *, has_adapters: bool) -> dict[str, Any]:
    """Return the arguments with underscored names. Raises `ModelProblem` if one is reserved."""
    named = underscored_names(engine_args)
    for name in named:
        if name in _RESERVED or (has_adapters and name == "lora_modules"):
            raise ModelProblem(f"engine_args: {name} is set by the server and cannot be changed")
    return named


def positive_number(model: ModelConfig, name: str) -> float | None:
    """Return the argument if it is a positive number."""
    value = model.engine_args.get(name, model.engine_args.get(name.replace("_", "-")))
    return value if isinstance(value, (int, float)) and value > 0 else None


def positive_integer(model: ModelConfig, name: str) -> int | None:
    """Return the argument as an integer if it is a positive number."""
    value = positive_number(model, name)
    return int(value) if value else None


def names_parsers(model: ModelConfig) -> bool:
    return any(_underscored(name) in _PARSER_ARGUMENTS for name in model.engine_args)


def unknown_parsers(model: ModelConfig, registered: ParserNames | None) -> Iterator[tuple[str, str]]:
    """Yield each key of `engine_args` that names an unregistered parser, with a sentence."""
    given = underscored_names(model.engine_args)
    for key, value in model.engine_args.items():
        kind, plugin = _PARSER_ARGUMENTS.get(_underscored(key), (None, ""))
        if kind is None or value is None or registered is None or given.get(plugin):
            continue
        names = registered.tool if kind == "tool" else registered.reasoning
        if not (isinstance(value, str) and value in names):
            yield key, f"the installed vLLM has no {kind} parser '{value}'{suggest(value, sorted(names))}"


def command_line(options: Mapping[str, Any]) -> list[str]:
    """Return options as arguments of `vllm serve`.

    `a_b: x` becomes `--a-b x`, true `--a-b`, false `--no-a-b`, a mapping or a list of mappings JSON, null nothing.
    """
    argv: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        match value:
            case None:
                continue
            case True:
                argv.append(flag)
            case False:
                argv.append("--no-" + flag[2:])
            case dict():
                argv += [flag, json.dumps(value, ensure_ascii=False)]
            case list():
                argv += [flag, *(json.dumps(v) if isinstance(v, dict) else str(v) for v in value)]
            case _:
                # One word, so that argparse does not take a value with a leading dash for an option.
                argv += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return argv
