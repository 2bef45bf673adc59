"""Hook of mkdocs: adds the pages of the repository's root to the site and turns links across the two folders around."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
#: Name in the root, name in the site. docs/README.md is the index of the site.
PAGES = {name: name for name in ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "README.zh-CN.md")}
PAGES |= {"README.md": "start.md"}
OTHERS = ("config.example.yaml", "LICENSE")
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    for name, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / name).read_text(encoding="utf-8")))
    for name in OTHERS:
        files.append(File.generated(config, name, content=(ROOT / name).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:  # noqa: ARG001 - mkdocs' signature
    """Return the page with its links rewritten from places in the repository to places in the site."""
    source = page.file.src_uri
    in_root = {target: name for name, target in PAGES.items()}
    place = posixpath.dirname(in_root.get(source) or f"docs/{source}")

    def rewrite(found: re.Match[str]) -> str:
        link = found[2]
        if "://" in link or link.startswith("mailto:"):
            return found[0]
        target = posixpath.normpath(posixpath.join(place, link))
        target = posixpath.join(target, "README.md") if (ROOT / target).is_dir() else target
        inside = PAGES.get(target, target).removeprefix("docs/")
        return found[1] + posixpath.relpath(inside, posixpath.dirname(source) or ".") + found[3]

    return _LINK.sub(rewrite, markdown)
