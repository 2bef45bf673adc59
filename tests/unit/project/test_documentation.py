"""The pages of documentation: links lead somewhere, examples come early, places in the code exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_api_server import errors
from tests.running import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SUBJECTS = sorted([*(ROOT / "docs").glob("[a-z]*.md"), *(ROOT / "docs/zh").glob("*.md")])
SOURCE = ROOT / "src/llm_api_server"
CODES = sorted({code for one in vars(errors).values() if isinstance(code := getattr(one, "code", None), str)})
#: A file or folder in backticks: `manager/scheduling/`, `errors.py`, `tests/unit`.
_PLACE = re.compile(r"`(\w[\w.]*/(?:[\w.]+/)*[\w.]*|\w+\.py)`")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_of_a_page_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", SUBJECTS, ids=_name)
def test_a_page_has_its_first_example_early(page: Path) -> None:
    """A command, a table or a screenshot stands within the first twelve lines."""
    assert re.search(r"^(```|\||!\[|\$ )", "\n".join(page.read_text().splitlines()[:12]), re.MULTILINE)


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "docs/glossary.md", "docs/performance.md", "docs/sizing.md"])
def test_places_in_the_code_exist(page: str) -> None:
    rooms = [ROOT, SOURCE, *(path for path in SOURCE.rglob("*") if path.is_dir())]
    missing = [
        place for place in _PLACE.findall((ROOT / page).read_text()) if not any((r / place).exists() for r in rooms)
    ]
    assert not missing


@pytest.mark.parametrize("code", CODES)
def test_the_page_of_the_api_explains_every_error_code(code: str) -> None:
    rows = (ROOT / "docs/api.md").read_text().partition("## Errors")[2].splitlines()
    assert any(row.startswith("|") and f"`{code}`" in row for row in rows)


@pytest.mark.parametrize(("page", "most"), [("ARCHITECTURE.md", 150), ("docs/glossary.md", 150)])
def test_maps_stay_short(page: str, most: int) -> None:
    assert len((ROOT / page).read_text().splitlines()) <= most


def test_the_architecture_names_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rooms = [path.parent.relative_to(SOURCE) for path in SOURCE.rglob("__init__.py") if path.parent != SOURCE]
    top = {room.parts[0] for room in rooms if room.parts[0] != "store" or len(room.parts) == 1}
    assert not [room for room in sorted(top) if f"`{room}/" not in text]
