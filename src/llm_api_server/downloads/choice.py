"""Which files of a repository make one model that an engine here can load. Pure."""

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
#: The part of the memory that a quantization may take with its weights alone: the rest is for context and others.
SHARE_FOR_WEIGHTS = 0.8
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
_PROJECTOR = re.compile(r"(^|[-_.])mmproj", re.IGNORECASE)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".ot", ".tflite", ".mlmodel")
#: Of a folder for vLLM: what it reads besides weights.
_KEPT = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".md", ".yaml", ".yml", ".spm", ".vocab", ".jsonl")
_MAX_FILES = 2000


@dataclass(frozen=True)
class RemoteFile:
    """`sha256` in hex where the hub tells it, else perhaps `git_sha1`, that of git's blob."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Choice:
    """`files` to take, in order; `main` is what the configuration names: a file, or empty for the whole folder."""

    files: tuple[RemoteFile, ...]
    main: str
    projector: str | None = None
    #: Why just these, for people.
    note: str = ""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def choose(source: Source, files: Sequence[RemoteFile], memory: int) -> Choice:
    """`memory` is that of the largest device, in bytes. Raises `DownloadError`."""
    files = [file for file in files if _is_plain(file.path)]
    if len(files) > _MAX_FILES:
        raise DownloadError(f"{source.text} has {len(files)} files, which is no model's repository.")
    ggufs = [file for file in files if file.path.lower().endswith(".gguf")]
    if ggufs:
        return _choose_gguf(source, ggufs, memory)
    choice = _choose_folder(source, files)
    if source.file is not None:
        raise DownloadError(f"{source.place} has no .gguf files to choose {source.file!r} from; leave it out.")
    return choice


def _choose_gguf(source: Source, files: Sequence[RemoteFile], memory: int) -> Choice:
    projectors = [file for file in files if _PROJECTOR.search(file.path)]
    whole = _models([file for file in files if file not in projectors])
    if not whole:
        raise DownloadError(f"{source.place} has no whole .gguf model: parts of a split one are missing there.")
    if source.file is not None:
        name = _named(source, whole)
        note = ""
    else:
        name, note = _fitting(source, whole, memory)
    projector = min(projectors, key=lambda file: (file.size, file.path), default=None)
    taken = (*whole[name], *((projector,) if projector else ()))
    return Choice(taken, whole[name][0].path, projector.path if projector else None, note)


def _models(files: Sequence[RemoteFile]) -> dict[str, list[RemoteFile]]:
    """Whole models by name: files, or all parts of split ones."""
    found: dict[str, list[RemoteFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        found.setdefault(_PART.sub("", file.path), []).append(file)
    return {name: parts for name, parts in found.items() if _is_whole(parts)}


def _is_whole(parts: Sequence[RemoteFile]) -> bool:
    match = _PART.search(parts[0].path)
    return len(parts) == (int(match[2]) if match else 1)


def _named(source: Source, models: dict[str, list[RemoteFile]]) -> str:
    wanted = source.file or ""
    names = [name for name in models if wanted in {name, name.rpartition("/")[2]}]
    names = names or [name for name in models if fnmatch(name.lower(), wanted.lower())]
    names = names or [name for name in models if _has_word(name, wanted)]
    if len(names) == 1:
        return names[0]
    if not names:
        raise DownloadError(f"{source.place} has no file {wanted!r}. It has {_listed(models)}.")
    raise DownloadError(
        f"{wanted!r} fits several files of {source.place}: {', '.join(sorted(names))}. Name one of them."
    )


def _has_word(name: str, word: str) -> bool:
    """Whether a quantization is in a file's name, and not as a part of another."""
    return re.search(rf"(?<![A-Z0-9]){re.escape(word.upper())}(?![A-Z0-9_])", name.upper()) is not None


def _fitting(source: Source, models: dict[str, list[RemoteFile]], memory: int) -> tuple[str, str]:
    """The preferred quantization where it fits, else the largest that does."""
    sizes = {name: sum(file.size for file in parts) for name, parts in models.items()}
    room = int(memory * SHARE_FOR_WEIGHTS)
    fitting = {name: size for name, size in sizes.items() if size <= room}
    if not fitting:
        least = min(sizes, key=lambda name: sizes[name])
        raise DownloadError(
            f"None of the files of {source.place} fits: the smallest, {least}, has {file_size(sizes[least])}, and "
            f"weights may take {file_size(room)} of the {file_size(memory)} of memory here. Choose a smaller model, or "
            "name a file all the same."
        )
    preferred = [name for name in fitting if _has_word(name, PREFERRED_QUANTIZATION)]
    if preferred:
        return preferred[0], PREFERRED_QUANTIZATION if len(
            models
        ) == 1 else f"{PREFERRED_QUANTIZATION} of {len(models)}"
    best = max(fitting, key=lambda name: (_is_quantized(name), fitting[name], name))
    return best, "the only file" if len(models) == 1 else f"the largest of {len(models)} files that fits"


def _is_quantized(name: str) -> bool:
    return not any(_has_word(name, word) for word in ("F32", "F16", "BF16"))


def _choose_folder(source: Source, files: Sequence[RemoteFile]) -> Choice:
    top = [file for file in files if "/" not in file.path or file.path.startswith("1_Pooling/")]
    weights = [file for file in top if file.path.endswith(".safetensors")]
    weights = weights or [file for file in top if file.path.endswith(".bin") and "pytorch_model" in file.path]
    if not any(file.path == "config.json" for file in top) or not weights:
        raise DownloadError(
            f"{source.place} is no model that can be loaded here: it has neither .gguf files nor a config.json with "
            "weights beside it."
        )
    # Some repositories keep the same weights twice, under the names of their maker.
    weights = [file for file in weights if not file.path.startswith("consolidated")] or weights
    others = [file for file in top if file.path.endswith(_KEPT) and not file.path.endswith(_WEIGHTS)]
    return Choice((*others, *weights), "", note=f"{len(weights)} files of weights")


def _is_plain(path: str) -> bool:
    """A hub's word is not trusted to stay in its folder."""
    parts = path.split("/")
    return (
        bool(path)
        and not any(part in {"", ".", ".."} or part.startswith(".git") for part in parts)
        and "\\" not in path
    )


def _listed(models: dict[str, list[RemoteFile]]) -> str:
    return ", ".join(
        f"{name} ({file_size(sum(file.size for file in parts))})" for name, parts in sorted(models.items())
    )
