"""Choice of the files of a repository that make one model that an engine on this host can load. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from llm_api_server.downloads.source import Source
from llm_api_server.errors import DownloadError
from llm_api_server.formats import file_size

#: The usual balance of quality and speed.
PREFERRED_QUANTIZATION = "Q4_K_M"
#: Fraction of the memory that the weights may take; the rest is for the context and for others.
SHARE_FOR_WEIGHTS = 0.8
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
_PROJECTOR = re.compile(r"(^|[-_.])mmproj", re.IGNORECASE)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".ot", ".tflite", ".mlmodel")
#: Files that vLLM reads besides weights.
_SETTINGS = (
    ".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".md", ".yaml", ".yml", ".spm", ".vocab", ".jsonl",
)  # fmt: skip
_MAX_FILES = 2000


@dataclass(frozen=True)
class RemoteFile:
    """File of a source. `sha256` is hex if the hub gives it, else `git_sha1` may be that of the git blob."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Choice:
    """Files to download, in order. `main` is the configured path: a file, or empty for the whole folder."""

    files: tuple[RemoteFile, ...]
    main: str
    projector: str | None = None
    #: Reason for the choice, for people.
    note: str = ""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def choose(source: Source, files: Sequence[RemoteFile], memory: int) -> Choice:
    """Choose files for the largest device, of `memory` bytes. Raises `DownloadError`."""
    files = [file for file in files if _is_safe(file.path)]
    if len(files) > _MAX_FILES:
        raise DownloadError(f"{source.text} has {len(files)} files: it is not the repository of a model.")
    ggufs = [file for file in files if file.path.lower().endswith(".gguf")]
    if ggufs:
        return _choose_gguf(source, ggufs, memory)
    choice = _choose_folder(source, files)
    if source.file is not None:
        raise DownloadError(f"{source.location} has no .gguf files to choose {source.file!r} from; leave it out.")
    return choice


def _choose_gguf(source: Source, files: Sequence[RemoteFile], memory: int) -> Choice:
    projectors = [file for file in files if _PROJECTOR.search(file.path)]
    models = _complete_models([file for file in files if file not in projectors])
    if not models:
        raise DownloadError(f"{source.location} has no complete .gguf model: parts of a split model are missing there.")
    if source.file is not None:
        name, note = _find_model(source, models), ""
    else:
        name, note = _fitting_model(source, models, memory)
    projector = min(projectors, key=lambda file: (file.size, file.path), default=None)
    files = (*models[name], *((projector,) if projector else ()))
    return Choice(files, models[name][0].path, projector.path if projector else None, note)


def _complete_models(files: Sequence[RemoteFile]) -> dict[str, list[RemoteFile]]:
    """Return single files, and split models with all their parts, by name."""
    models: dict[str, list[RemoteFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        models.setdefault(_PART.sub("", file.path), []).append(file)
    return {name: parts for name, parts in models.items() if _is_complete(parts)}


def _is_complete(parts: Sequence[RemoteFile]) -> bool:
    match = _PART.search(parts[0].path)
    return len(parts) == (int(match[2]) if match else 1)


def _find_model(source: Source, models: dict[str, list[RemoteFile]]) -> str:
    """Return the one model that `source.file` names: a file name, a pattern, or a quantization."""
    wanted = source.file or ""
    names = [name for name in models if wanted in {name, name.rpartition("/")[2]}]
    names = names or [name for name in models if fnmatch(name.lower(), wanted.lower())]
    names = names or [name for name in models if _has_word(name, wanted)]
    if len(names) == 1:
        return names[0]
    if not names:
        raise DownloadError(f"{source.location} has no file {wanted!r}. It has {_list_sizes(models)}.")
    raise DownloadError(
        f"{wanted!r} matches several files of {source.location}: {', '.join(sorted(names))}. Give one of them."
    )


def _has_word(name: str, word: str) -> bool:
    """Return whether a file name contains a quantization, and not as part of another one."""
    return re.search(rf"(?<![A-Z0-9]){re.escape(word.upper())}(?![A-Z0-9_])", name.upper()) is not None


def _fitting_model(source: Source, models: dict[str, list[RemoteFile]], memory: int) -> tuple[str, str]:
    """Return the model with the preferred quantization if it fits, else the largest that fits; and a note."""
    sizes = {name: sum(file.size for file in parts) for name, parts in models.items()}
    limit = int(memory * SHARE_FOR_WEIGHTS)
    fitting = {name: size for name, size in sizes.items() if size <= limit}
    if not fitting:
        smallest = min(sizes, key=lambda name: sizes[name])
        raise DownloadError(
            f"No file of {source.location} fits: the smallest, {smallest}, has {file_size(sizes[smallest])}, and "
            f"weights may take {file_size(limit)} of the {file_size(memory)} of memory here. Choose a smaller model, "
            "or name a file to download it anyway."
        )
    is_only = len(models) == 1
    preferred = [name for name in fitting if _has_word(name, PREFERRED_QUANTIZATION)]
    if preferred:
        return preferred[0], PREFERRED_QUANTIZATION if is_only else f"{PREFERRED_QUANTIZATION} of {len(models)}"
    largest = max(fitting, key=lambda name: (_is_quantized(name), fitting[name], name))
    return largest, "the only file" if is_only else f"the largest of {len(models)} files that fits"


def _is_quantized(name: str) -> bool:
    return not any(_has_word(name, word) for word in ("F32", "F16", "BF16"))


def _choose_folder(source: Source, files: Sequence[RemoteFile]) -> Choice:
    top_level = [file for file in files if "/" not in file.path or file.path.startswith("1_Pooling/")]
    weights = _folder_weights(top_level)
    if not weights or not any(file.path == "config.json" for file in top_level):
        raise DownloadError(
            f"{source.location} is not a model that can be loaded here: it has neither .gguf files nor a config.json "
            "with weights beside it."
        )
    settings = [file for file in top_level if file.path.endswith(_SETTINGS) and not file.path.endswith(_WEIGHTS)]
    return Choice((*settings, *weights), "", note=f"{len(weights)} files of weights")


def _folder_weights(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Return the safetensors files, else those of PyTorch."""
    weights = [file for file in files if file.path.endswith(".safetensors")]
    if not weights:
        weights = [file for file in files if file.path.endswith(".bin") and "pytorch_model" in file.path]
    # Some repositories hold the same weights a second time, as consolidated*.safetensors.
    return [file for file in weights if not file.path.startswith("consolidated")] or weights


def _is_safe(path: str) -> bool:
    """Return whether a path that a hub gives stays in its folder and is no file of git's."""
    parts = path.split("/")
    is_plain = not any(part in {"", ".", ".."} or part.startswith(".git") for part in parts)
    return is_plain and "\\" not in path


def _list_sizes(models: dict[str, list[RemoteFile]]) -> str:
    return ", ".join(
        f"{name} ({file_size(sum(file.size for file in parts))})" for name, parts in sorted(models.items())
    )
