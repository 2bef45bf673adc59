"""Problems and warnings of a configuration that only the engines can find.

They start vLLM's interpreter, so only `check-config`, `serve` and `reload` run them, not every process that loads the
configuration.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_api_server.config.checks import Checks, Problem
from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.engines.select import engine_for
from llm_api_server.engines.vllm.engine_args import names_parsers, unknown_parsers
from llm_api_server.engines.vllm.installed import InstalledVllm, VllmNotInstalled


def engine_checks(*, may_import: bool) -> Checks:
    """Return checks for `load_config`.

    An old vLLM lists its parsers only after an import, which takes up to half a minute, once. Without `may_import`
    such a version is not checked, and an unknown parser fails the load of its model instead.
    """

    def parsers_exist(config: Config) -> Iterator[Problem]:
        models = {name: model for name, model in _vllm_models(config.models.available) if names_parsers(model)}
        if not models:
            return
        try:
            registered = InstalledVllm(config.vllm_python).parser_names(may_import=may_import)
        except VllmNotInstalled:
            return
        for name, model in models.items():
            for key, sentence in unknown_parsers(model, registered):
                yield ("models", "available", name, "engine_args", key), sentence

    return {parsers_exist: [("models", "available"), ("engines", "vllm", "python")]}


def engine_warnings(config: Config) -> Iterator[str]:
    """Yield a complete sentence if models need vLLM and it is not installed."""
    names = ", ".join(f"'{name}'" for name, _ in _vllm_models(config.models.available))
    if not names:
        return
    try:
        InstalledVllm(config.vllm_python).parser_names(may_import=False)
    except VllmNotInstalled:
        yield (
            f"vLLM is not installed in {config.vllm_python}: {names} cannot be loaded. Run `make vllm`, or set "
            "engines.vllm.python to an interpreter that has it."
        )


def _vllm_models(available: dict[str, ModelConfig]) -> list[tuple[str, ModelConfig]]:
    return [(name, model) for name, model in available.items() if engine_for(model) == "vllm"]
