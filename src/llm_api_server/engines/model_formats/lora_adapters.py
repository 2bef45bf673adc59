"""LoRA adapters in PEFT's layout, read without loading them: their rank, and whether they fit their base model.

Error messages name adapters and files, never folders. Blocking: runs in a thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_api_server.engines.base import ModelProblem
from llm_api_server.engines.model_formats.hf_folder import FolderFacts, read_json, read_safetensors

#: Values that vLLM allows for `max_lora_rank`.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MAX_BATCHED = 4
_OTHER_WEIGHTS = ("adapter_model.bin", "adapter_model.pt")
#: Members of adapter_config.json that vLLM does not support.
_UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication")
#: Modules of a numbered decoder layer whose input is the hidden state.
_READS_HIDDEN = re.compile(r"\.layers\.(?P<layer>\d+)\..*\b(?:q|k|v|gate|up)_proj\.lora_A\.weight$")
_NOT_THE_DECODER = re.compile(r"vision|visual|audio|encoder", re.IGNORECASE)


def adapter_options(adapters: Mapping[str, str], base: FolderFacts | None) -> dict[str, Any]:
    """Return vLLM's options to serve `adapters` (name -> absolute path). Raises `ModelProblem`."""
    if not adapters:
        return {}
    rank = max(_read(name, Path(path), base) for name, path in adapters.items())
    return {
        "enable_lora": True,
        "lora_modules": [{"name": name, "path": path} for name, path in adapters.items()],
        "max_lora_rank": next(allowed for allowed in _RANKS if allowed >= rank),
        "max_loras": min(len(adapters), _MAX_BATCHED),
        "max_cpu_loras": len(adapters),  # all stay in RAM
    }


def _read(name: str, folder: Path, base: FolderFacts | None) -> int:
    """Check an adapter and return its rank."""
    try:
        config = read_json(folder, "adapter_config.json", whose="its")
        _check_kind(config)
        _check_weights(folder, config, base)
        return _rank(config)
    except ModelProblem as problem:
        raise ModelProblem(f"adapter '{name}': {problem}") from None


def _check_kind(config: dict[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ModelProblem(f"its type is {kind}; vLLM serves LORA")
    if unsupported := [member for member in _UNSUPPORTED if config.get(member)]:
        raise ModelProblem(f"vLLM does not support {unsupported[0]} of its adapter_config.json")
    if config.get("bias", "none") != "none":
        raise ModelProblem("vLLM does not support bias of its adapter_config.json")


def _rank(config: dict[str, Any]) -> int:
    patterns = config.get("rank_pattern") or {}
    given = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    ranks = [rank for rank in given if isinstance(rank, int) and 0 < rank <= _RANKS[-1]]
    if len(ranks) < len(given):
        raise ModelProblem(f"its adapter_config.json has no rank (r) between 1 and {_RANKS[-1]}")
    return max(ranks)


def _check_weights(folder: Path, config: dict[str, Any], base: FolderFacts | None) -> None:
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        if not any((folder / name).exists() for name in _OTHER_WEIGHTS):
            raise ModelProblem("it has no weights (adapter_model.safetensors)")
        return
    shapes = read_safetensors(file)
    if base is not None and (reason := next(_misfits(shapes, base), None)):
        made_for = Path(str(config.get("base_model_name_or_path") or "")).name
        raise ModelProblem(f"it was made for another model{f', {made_for}' if made_for else ''}: {reason}")


def _misfits(shapes: Mapping[str, list[int]], base: FolderFacts) -> Iterator[str]:
    for name, shape in shapes.items():
        match = _READS_HIDDEN.search(name)
        if match is None or _NOT_THE_DECODER.search(name) or len(shape) != 2:  # noqa: PLR2004 - a matrix
            continue
        if base.hidden_size and shape[1] != base.hidden_size:
            yield f"its hidden size is {shape[1]}, the model's is {base.hidden_size}"
        if base.layers and int(match["layer"]) >= base.layers:
            yield f"it has a layer {match['layer']}, the model has {base.layers} layers"
