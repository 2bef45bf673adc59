"""Configuration entry of a downloaded model: few options, and those that people look for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.downloads.download import Downloaded
from llm_api_server.downloads.source import Source, file_name
from llm_api_server.engines.base import ModelFacts, ModelProblem
from llm_api_server.engines.families import Clues, family_of
from llm_api_server.engines.model_formats.gguf import read_header
from llm_api_server.engines.model_formats.hf_folder import read_json
from llm_api_server.engines.select import build_engines, engine_for
from llm_api_server.errors import DownloadError

#: Default limit of the context: longer ones take much memory, and few requests use them.
MAX_CONTEXT = 32_768
_QUANTIZATION = re.compile(r"[-_.](?:I?Q\d\w*|B?F16|F32|MXFP4\w*)$", re.IGNORECASE)
_FORBIDDEN = re.compile(r"[^\w.\-]+")


def name_of(source: Source, downloaded: Downloaded) -> str:
    """Return the name of the repository without its format, or of the file without its quantization."""
    if source.folder:
        name = re.sub(r"[-_.]GGUF$", "", source.folder, flags=re.IGNORECASE)
    else:
        file = file_name(source.location) if source.kind == "url" else downloaded.path
        name = _QUANTIZATION.sub("", Path(file).stem)
    return _FORBIDDEN.sub("-", name)


def free_name(taken: Container[str], name: str, downloaded: Downloaded) -> str:
    """Return `name`, or if it is taken, the name of the file or a numbered one."""
    numbered = (f"{name}-{count}" for count in itertools.count(2))
    names = itertools.chain((name, _FORBIDDEN.sub("-", Path(downloaded.path).stem)), numbered)
    return next(one for one in names if one not in taken)


def may_be_of(path: str, models_dir: Path, source: Source) -> bool:
    """Return whether a model with this `path` may come from the source, whose file is chosen later."""
    folder = source.folder or (file_name(source.location) if source.kind == "url" else "")
    return (models_dir / Path(path).expanduser()).is_relative_to(models_dir / folder)


def entry_of(config: Config, downloaded: Downloaded) -> dict[str, Any]:
    """Return the entry for the file. Raises `DownloadError` if no engine can load the model."""
    entry: dict[str, Any] = {"path": downloaded.path}
    if downloaded.projector:
        entry["mmproj"] = downloaded.projector
    model = ModelConfig.model_validate({key: str(config.models_dir / value) for key, value in entry.items()})
    try:
        engine = engine_for(model)
        family = _family(model)
        facts = build_engines(config)[engine].inspect(model)
    except ModelProblem as problem:
        path = config.models_dir / downloaded.path
        raise DownloadError(
            f"The downloaded model cannot be loaded: {problem}. It is kept in {path}: delete it if it is of no use."
        ) from problem
    entry["engine"] = engine
    if family != "other":
        entry["type"] = family
    if _generates(facts) and facts.context_length is not None and _trained_context(model) > MAX_CONTEXT:
        entry["max_tokens"] = MAX_CONTEXT
    return entry


def _generates(facts: ModelFacts) -> bool:
    return facts.tasks is not None and "generate" in facts.tasks


def _family(model: ModelConfig) -> str:
    path = Path(model.path)
    if path.suffix.lower() == ".gguf":
        model_type = str(read_header(path)[0].metadata.get("general.architecture", ""))
    else:
        model_type = str(read_json(path, "config.json").get("model_type", ""))
    return family_of("auto", Clues(path.name.lower(), model_type.lower()))


def _trained_context(model: ModelConfig) -> int:
    path = Path(model.path)
    if path.suffix.lower() == ".gguf":
        metadata = read_header(path)[0].metadata
        value = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    else:
        config = read_json(path, "config.json")
        value = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return value if isinstance(value, int) else 0
