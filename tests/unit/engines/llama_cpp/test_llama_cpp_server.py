"""Conversion of JSON into parameters of a fake library: names, types, enums, suggestions."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import pytest

from llm_api_server.engines.llama_cpp.llama_cpp_server import BadArgument, build_params


class Kind(enum.IntEnum):
    GGML_TYPE_F16 = 1
    GGML_TYPE_Q8_0 = 8


class Params:
    def __init__(self) -> None:
        self.n_ctx = 0
        self.rope_freq_base = 0.0
        self.embedding = False
        self.model_alias: set[str] = set()
        self.cache_type_k = Kind.GGML_TYPE_F16
        self.cpuparams = SimpleNamespace(n_threads=-1)
        self.lora_adapters: list[Any] = []


LIBRARY = SimpleNamespace(CommonParams=Params, CommonAdapterLoraInfo=SimpleNamespace)


def built(**fields: Any) -> Any:
    return build_params(LIBRARY, {name.replace("__", "."): value for name, value in fields.items()})


def test_fields_take_their_own_types() -> None:
    params = built(n_ctx=512, rope_freq_base=10000, embedding=True, model_alias=["a"], cpuparams__n_threads=3)
    assert (params.n_ctx, params.embedding, params.model_alias) == (512, True, {"a"})
    assert params.cpuparams.n_threads == 3
    assert isinstance(params.rope_freq_base, float)


@pytest.mark.parametrize("word", ["q8_0", "Q8_0", "GGML_TYPE_Q8_0", 8])
def test_enums_by_either_name_or_number(word: str | int) -> None:
    assert built(cache_type_k=word).cache_type_k is Kind.GGML_TYPE_Q8_0


def test_adapters_by_path_or_with_a_scale() -> None:
    adapters = built(lora_adapters=["/a", {"path": "/b", "scale": 0.5}]).lora_adapters
    assert [(a.path, a.scale) for a in adapters] == [("/a", 1.0), ("/b", 0.5)]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_ctxx", 1, "no option 'n_ctxx'; did you mean n_ctx"),
        ("cpuparams.n_thread", 1, "'cpuparams.n_thread'; did you mean n_threads"),
        ("nothing.like_it", 1, "no option 'nothing.like_it'"),
        ("__class__", 1, "no option '__class__'"),
        ("cache_type_k", "q9", "it is one of f16, q8_0"),
        ("cache_type_k", 99, "cache_type_k cannot be 99"),
        ("embedding", 1, "it is true or false"),
        ("lora_adapters", [{"scale": 1}], "lora_adapters cannot be"),
    ],
)
def test_wrong_fields_are_reported_with_the_allowed_values(field: str, value: Any, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        build_params(LIBRARY, {field: value})
