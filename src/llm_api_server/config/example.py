"""Texts generated from the declaration: `config.example.yaml`, the JSON schema, and a first `config.yaml`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llm_api_server.config.models import Config

_INDENT = "  "

_HEADER = """\
# Every option of LLM API Server with its default. Generated: `llm-api-server config example`.
# Copy it to config.yaml and keep what differs. `llm-api-server check-config` reports the problems of a file.
# Text may contain ${NAME} or ${NAME:-default}, replaced from the environment; $${ is a literal ${.
"""

_MORE_MODELS = """\
    # vLLM serves a Hugging Face folder or hub id; `make vllm` installs it.
    # Qwen3-8B:
    #   path: Qwen/Qwen3-8B
    #   type: qwen
    #   max_tokens: 8192
    #   gpu_memory_utilization: 0.8
    #   adapters: {Qwen3-8B-legal: adapters/legal}
    #   engine_args: {max-num-batched-tokens: 8192}
    # Any server with an OpenAI-compatible API:
    # elsewhere:
    #   path: https://llm.example.com/v1
    #   api_key: ${ELSEWHERE_API_KEY}
    #   upstream_model: big-model
"""

_FIRST = """\
# The configuration of LLM API Server. Every option, with its default: `llm-api-server config example`.
# After a change: `llm-api-server check-config`, then `llm-api-server reload`.

server:
  host: 127.0.0.1 # 0.0.0.0: all interfaces
  port: 8050

auth:
  api_keys:
    - key: {key}
      name: default
      permissions: [all]

models:
  default: {model}
  max_loaded: 1
  models_dir: models
  available:
    {model}:
      path: {file}
      type: llama
"""

_FIRST_WITHOUT_MODEL = """\
models:
  models_dir: models
  available: {} # NAME: {path: FILE.gguf}
"""


def example() -> str:
    """Return the text of `config.example.yaml`."""
    lines = [_HEADER.rstrip()]
    for name, field in Config.model_fields.items():
        section = _model_of(field)
        if section is None:
            continue
        lines += ["", f"# {(section.__doc__ or '').strip()}", f"{name}:", *_options(section, {}, 1)]
        if name == "models":
            lines.append(_MORE_MODELS.rstrip())
    return "\n".join(lines) + "\n"


def schema() -> str:
    """Return the JSON schema of the configuration file."""
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(),
        "title": "Configuration of LLM API Server",
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def first_config(key: str, model: str | None, file: str) -> str:
    """Return a short `config.yaml` with one key and, unless `model` is None, one model."""
    text = _FIRST.format(key=key, model=model, file=file)
    return text if model is not None else text.partition("models:\n")[0] + _FIRST_WITHOUT_MODEL


def _options(model: type[BaseModel], values: dict[str, Any], depth: int) -> Iterator[str]:
    """Yield the options of one section; each value is that of `values`, else the example, else the default."""
    for name, field in model.model_fields.items():
        inner = _model_of(field)
        indent = _INDENT * depth
        if name in values:
            value = values[name]
        elif field.examples:
            value = field.examples[0]
        else:
            value = field.get_default(call_default_factory=True)
        comment = f"# {_describe(field)}"
        if inner is not None and not isinstance(value, dict | list):
            yield from (f"{indent}{name}: {comment}", *_options(inner, {}, depth + 1))
        elif inner is not None and value:
            yield from (f"{indent}{name}: {comment}", *_entries(inner, value, depth + 1))
        else:
            # JSON is YAML, on one line and with every text in quotes.
            yield f"{indent}{name}: {json.dumps(value, ensure_ascii=False)} {comment}"


def _entries(model: type[BaseModel], value: Any, depth: int) -> Iterator[str]:
    """Yield the entries of a list or mapping of sections."""
    indent = _INDENT * depth
    if isinstance(value, dict):
        for name, entry in value.items():
            yield f"{indent}{name}:"
            yield from _options(model, entry, depth + 1)
        return
    for entry in value:
        first, *rest = _options(model, entry, depth + 1)
        yield f"{indent}- {first.lstrip()}"
        yield from rest


def _describe(field: FieldInfo) -> str:
    """Return the description, followed by the allowed words of a choice."""
    section = _model_of(field)
    text = field.description or (section.__doc__ if section else "") or ""
    words = list(_words(field.annotation))
    return f"{text} ({', '.join(words)})" if len(words) > 1 else text


def _words(annotation: Any) -> Iterator[str]:
    for argument in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield str(argument)
        else:
            yield from _words(argument)


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
