"""Where a model comes from, as a user writes it. Pure.

`org/name` or `hf:org/name` is a Hugging Face repository, `ms:org/name` one of ModelScope, `https://…/file.gguf` a file,
`starter` the model of the first start. A repository may carry `@REVISION` and, after a colon, a quantization or a file:
`org/name-GGUF:Q4_K_M`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from llm_api_server.errors import DownloadError

Kind = Literal["huggingface", "modelscope", "url", "starter"]

_REPO = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,100}))?(?::(?P<file>[^\s:]+))?"
)
_PREFIXES: tuple[tuple[str, Kind], ...] = (("hf:", "huggingface"), ("ms:", "modelscope"))
_HUB_HOSTS = {"huggingface.co": "hf:", "modelscope.cn": "ms:", "www.modelscope.cn": "ms:"}
_HOW = (
    "Name a Hugging Face repository (org/name), a ModelScope one (ms:org/name), an https:// address of a .gguf file, "
    "or `starter`; `org/name:Q4_K_M` chooses a quantization, `org/name@REVISION` a revision."
)


@dataclass(frozen=True)
class Source:
    """`place` is a repository or a URL. `file`: a quantization, a file's name or a pattern of it; None: chosen."""

    kind: Kind
    place: str
    revision: str | None = None
    file: str | None = None

    @property
    def folder(self) -> str:
        """Under `models_dir`, where its files go; empty for a file of its own."""
        return self.place.rpartition("/")[2] if self.kind in {"huggingface", "modelscope"} else ""

    @property
    def text(self) -> str:
        """As a user would write it."""
        if self.kind in {"url", "starter"}:
            return self.place
        prefix = "ms:" if self.kind == "modelscope" else ""
        revision = f"@{self.revision}" if self.revision else ""
        return prefix + self.place + revision + (f":{self.file}" if self.file else "")


def parse_source(text: str, revision: str | None = None, file: str | None = None) -> Source:
    """`revision` and `file` are options that say the same as the text may. Raises `DownloadError`."""
    text = text.strip()
    if text == "starter":
        return Source("starter", text)
    kind: Kind = "huggingface"
    for prefix, of_prefix in _PREFIXES:
        if text.startswith(prefix):
            kind, text = of_prefix, text.removeprefix(prefix)
    if text.lower().startswith(("http://", "https://")):
        return _of_url(text, revision, file)
    match = _REPO.fullmatch(text)
    if match is None:
        owner = "" if "/" in text else " A name alone is not enough: a repository has an owner."
        raise DownloadError(f"{text!r} is no place that models come from.{owner} {_HOW}")
    if any(part in {".", ".."} for part in match["repo"].split("/")):
        raise DownloadError(f"{text!r} is no repository. {_HOW}")
    return Source(kind, match["repo"], revision or match["revision"], file or match["file"])


def _of_url(url: str, revision: str | None, file: str | None) -> Source:
    """A page of a hub is its repository, or a file of it; anything else has to be the file itself."""
    parts = urlsplit(url)
    path = [unquote(part) for part in parts.path.split("/") if part]
    if (prefix := _HUB_HOSTS.get(parts.hostname or "")) is not None:
        org, name, view, of_page, *rest = [*(path[1:] if path[:1] == ["models"] else path), "", "", "", ""]
        of_file = "/".join(part for part in rest if part)
        if view in {"", "tree"} or (view in {"blob", "resolve"} and of_file.lower().endswith(".gguf")):
            return parse_source(f"{prefix}{org}/{name}", revision or of_page or None, file or of_file or None)
    name = path[-1] if path else ""
    if not name.lower().endswith(".gguf") or PurePosixPath(name).name != name or name.startswith("."):
        raise DownloadError(f"{url} does not name a .gguf file. {_HOW}")
    if parts.username or parts.password:
        raise DownloadError("A URL with a password in it would be kept in logs; use one without.")
    return Source("url", url)


def file_name(url: str) -> str:
    """Of the file that a URL names."""
    return unquote(urlsplit(url).path.rpartition("/")[2])
