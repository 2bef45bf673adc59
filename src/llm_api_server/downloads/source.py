"""Sources of models, as users write them. Pure.

`org/name` or `hf:org/name` is a Hugging Face repository, `ms:org/name` a ModelScope repository, `https://…/file.gguf` a
file, `starter` the model of the first start. A repository may be followed by `@REVISION`, and by a colon and a
quantization or a file: `org/name-GGUF:Q4_K_M`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from llm_api_server.errors import DownloadError

Kind = Literal["huggingface", "modelscope", "url", "starter"]

_REPO = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,100}))?(?::(?P<file>[^\s:]+))?"
)
_PREFIXES: tuple[tuple[str, Kind], ...] = (("hf:", "huggingface"), ("ms:", "modelscope"))
_HUB_HOSTS = {"huggingface.co": "hf:", "modelscope.cn": "ms:", "www.modelscope.cn": "ms:"}
_SOURCES = (
    "Give a Hugging Face repository (org/name), a ModelScope repository (ms:org/name), an https:// address of a .gguf "
    "file, or `starter`; `org/name:Q4_K_M` chooses a quantization, `org/name@REVISION` a revision."
)


@dataclass(frozen=True)
class Source:
    """Source of a model. `location` is a repository or a URL; `file` a quantization, a file name, or a pattern."""

    kind: Kind
    location: str
    revision: str | None = None
    file: str | None = None

    @property
    def folder(self) -> str:
        """Folder for its files under `models_dir`; empty for a single file."""
        return self.location.rpartition("/")[2] if self.kind in {"huggingface", "modelscope"} else ""

    @property
    def text(self) -> str:
        """Source as a user writes it."""
        if self.kind in {"url", "starter"}:
            return self.location
        prefix = "ms:" if self.kind == "modelscope" else ""
        revision = f"@{self.revision}" if self.revision else ""
        return prefix + self.location + revision + (f":{self.file}" if self.file else "")


def parse_source(text: str, revision: str | None = None, file: str | None = None) -> Source:
    """Parse a source. `revision` and `file` take precedence over those in the text. Raises `DownloadError`."""
    text = text.strip()
    if text == "starter":
        return Source("starter", text)
    kind: Kind = "huggingface"
    for prefix, kind_of_prefix in _PREFIXES:
        if text.startswith(prefix):
            kind, text = kind_of_prefix, text.removeprefix(prefix)
    if text.lower().startswith(("http://", "https://")):
        return _parse_url(text, revision, file)
    match = _REPO.fullmatch(text)
    if match is None:
        owner = "" if "/" in text else " A repository needs its owner, too."
        raise DownloadError(f"{text!r} is not a source of models.{owner} {_SOURCES}")
    if any(part in {".", ".."} for part in match["repo"].split("/")):
        raise DownloadError(f"{text!r} is not a repository. {_SOURCES}")
    return Source(kind, match["repo"], revision or match["revision"], file or match["file"])


def _parse_url(url: str, revision: str | None, file: str | None) -> Source:
    parts = urlsplit(url)
    page = _parse_hub_page(parts)
    if page is not None:
        repository, page_revision, page_file = page
        return parse_source(repository, revision or page_revision, file or page_file)
    name = unquote(parts.path.rstrip("/").rpartition("/")[2])
    is_plain_name = PurePosixPath(name).name == name and not name.startswith(".")
    if not name.lower().endswith(".gguf") or not is_plain_name:
        raise DownloadError(f"{url} is not the address of a .gguf file. {_SOURCES}")
    if parts.username or parts.password:
        raise DownloadError("A URL with a password would be written to logs; give one without.")
    return Source("url", url)


def _parse_hub_page(url: SplitResult) -> tuple[str, str | None, str | None] | None:
    """Return repository, revision and file of a page of a hub; None for any other address.

    Pages are `[models/]org/name`, `…/tree/REVISION`, and `…/blob/REVISION/FILE` or `…/resolve/REVISION/FILE`.
    """
    prefix = _HUB_HOSTS.get(url.hostname or "")
    if prefix is None:
        return None
    path = [unquote(part) for part in url.path.split("/") if part]
    if path[:1] == ["models"]:
        del path[0]
    repository = f"{prefix}{'/'.join(path[:2])}"
    view, revision, file = path[2:3], "/".join(path[3:4]) or None, "/".join(path[4:]) or None
    if view in ([], ["tree"]):
        return repository, revision, file
    if view in (["blob"], ["resolve"]) and file is not None and file.lower().endswith(".gguf"):
        return repository, revision, file
    return None


def file_name(url: str) -> str:
    """Return the name of the file at a URL."""
    return unquote(urlsplit(url).path.rpartition("/")[2])
