"""What the engines have against a configuration: problems for `load_config`, and warnings.

Asked for by `check-config` and where a server starts, not in every process that reads the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_api_server.config.checks import Checks, Problem
from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.engines.select import engine_for
from llm_api_server.engines.vllm.adapter import names_parsers, unknown_parsers
from llm_api_server.engines.vllm.installed import InstalledVllm, VllmNotInstalled


def engine_checks(*, may_import: bool) -> Checks:
    """For `load_config`. `may_import`: half a minute may pass to ask an old vLLM for its parsers, once; without it
    only the load of a model says that such a vLLM does not know one.
    """

    def parsers_exist(config: Config) -> Iterator[Problem]:
        models = {name: model for name, model in _vllm_models(config).items() if names_parsers(model)}
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
    """As `config_warnings`: complete sentences about what is not refused."""
    models = _vllm_models(config)
    if not models:
        return
    try:
        InstalledVllm(config.vllm_python).parser_names(may_import=False)
    except VllmNotInstalled:
        who = ", ".join(f"'{name}'" for name in models)
        yield (
            f"vLLM is not installed in {config.vllm_python}: {who} cannot be loaded. Run `make vllm`, or set "
            "engines.vllm.python to an interpreter that has it."
        )


def _vllm_models(config: Config) -> dict[str, ModelConfig]:
    return {name: model for name, model in config.models.available.items() if engine_for(model) == "vllm"}
