"""Parsers of the installed vLLM: in every layout, without an import if possible, and cached."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from llm_api_server.engines import families
from llm_api_server.engines.vllm.installed import InstalledVllm, ParserNames, VllmNotInstalled, cache_folder
from tests.fake_vllm import add_plugin, fake_vllm, interpreter

NAMES = ParserNames(frozenset({"hermes", "mistral"}), frozenset({"qwen3"}))
OLD_PACKAGE = "vllm.entrypoints.openai.tool_parsers"


def installed(folder: Path, python: Path) -> InstalledVllm:
    return InstalledVllm(str(python), folder / "cache")


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().splitlines())


@pytest.mark.parametrize("package", ["vllm.tool_parsers", OLD_PACKAGE])
def test_lists_of_parsers_are_read_without_importing_vllm(tmp_path: Path, package: str) -> None:
    python = fake_vllm(tmp_path, ["mistral", "hermes"], ["qwen3"], package=package)
    assert installed(tmp_path, python).parser_names(may_import=False) == NAMES
    assert not (tmp_path / "imports").exists()


@pytest.mark.parametrize("package", ["vllm.tool_parsers", OLD_PACKAGE])
def test_a_version_that_must_be_imported_is_imported_only_if_allowed(tmp_path: Path, package: str) -> None:
    python = fake_vllm(tmp_path, ["mistral", "hermes"], ["qwen3"], package=package, is_eager=True)
    vllm = installed(tmp_path, python)
    assert vllm.parser_names(may_import=False) is None
    assert not (tmp_path / "imports").exists()
    assert vllm.parser_names(may_import=True) == NAMES
    assert (tmp_path / "imports").read_text() == "vllm\n"
    assert installed(tmp_path, python).parser_names(may_import=False) == NAMES


def test_parsers_of_plugins_count(tmp_path: Path) -> None:
    python = fake_vllm(tmp_path, ["hermes"], ["qwen3"])
    add_plugin(tmp_path, "mistral")
    vllm = installed(tmp_path, python)
    assert vllm.parser_names(may_import=False) is None
    assert vllm.parser_names(may_import=True) == NAMES


def test_the_names_are_cached_until_vllm_changes(tmp_path: Path) -> None:
    python = fake_vllm(tmp_path, ["mistral", "hermes"], ["qwen3"])
    for _ in range(2):
        assert installed(tmp_path, python).parser_names(may_import=True) == NAMES
    assert starts(tmp_path) == 1
    fake_vllm(tmp_path, ["mistral", "hermes", "brand_new"], ["qwen3"])
    names = installed(tmp_path, python).parser_names(may_import=True)
    assert names is not None
    assert names.tool == {"mistral", "hermes", "brand_new"}
    assert starts(tmp_path) == 2


def test_one_object_notices_a_change(tmp_path: Path) -> None:
    vllm = installed(tmp_path, fake_vllm(tmp_path, ["hermes"], ["qwen3"]))
    vllm.parser_names(may_import=True)
    fake_vllm(tmp_path, ["mistral", "hermes"], ["qwen3"])
    assert vllm.parser_names(may_import=True) == NAMES


def test_interpreters_do_not_share_a_cache_entry(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = InstalledVllm(str(fake_vllm(tmp_path / "a", ["one"], ["x"])), tmp_path)
    other = InstalledVllm(str(fake_vllm(tmp_path / "b", ["other"], ["x"])), tmp_path)
    found = [vllm.parser_names(may_import=False) for vllm in (one, other, one)]
    assert [names and set(names.tool) for names in found] == [{"one"}, {"other"}, {"one"}]


@pytest.mark.parametrize("content", [b"", b"not json", b'{"python": 1}'])
def test_a_damaged_cache_is_ignored(tmp_path: Path, content: bytes) -> None:
    python = fake_vllm(tmp_path, ["mistral", "hermes"], ["qwen3"])
    installed(tmp_path, python).parser_names(may_import=False)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(content)
    assert installed(tmp_path, python).parser_names(may_import=False) == NAMES


def test_without_a_writable_cache_the_names_are_listed_each_time(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    python = fake_vllm(tmp_path, ["mistral", "hermes"], ["qwen3"])
    for _ in range(2):
        assert installed(tmp_path, python).parser_names(may_import=False) == NAMES
    assert starts(tmp_path) == 2


def test_a_missing_vllm_or_interpreter_raises(tmp_path: Path) -> None:
    for python in (interpreter(tmp_path), tmp_path / "none", tmp_path):
        with pytest.raises(VllmNotInstalled):
            installed(tmp_path, python).parser_names(may_import=False)


def test_a_vllm_without_known_registries_is_started_once(tmp_path: Path) -> None:
    python = fake_vllm(tmp_path, ["hermes"], ["qwen3"], package="vllm.somewhere.else_")
    vllm = installed(tmp_path, python)
    assert vllm.parser_names(may_import=True) is None
    before = starts(tmp_path)
    assert vllm.parser_names(may_import=True) is None
    assert starts(tmp_path) == before


def test_the_cache_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "llm-api-server"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "llm-api-server"


@pytest.mark.vllm
def test_the_installed_vllm_registers_every_parser_of_the_families(tmp_path: Path, vllm_python: Path) -> None:
    names = installed(tmp_path, vllm_python).parser_names(may_import=False)
    assert names is not None
    tools = {parser for table in families._TOOLS_BY_NAME.values() for _, parser in table if parser}
    formats = {parser for _, parser in families._TOOL_FORMATS}
    assert tools | formats <= names.tool
    tables = [families._REASONING_EVERYWHERE, *families._REASONING_BY_NAME.values()]
    assert {parser for table in tables for _, parser in table if parser} <= names.reasoning


@pytest.mark.vllm
def test_the_names_are_those_that_vllm_lists(tmp_path: Path, vllm_python: Path) -> None:
    program = (
        "import json\nfrom vllm.tool_parsers import ToolParserManager as t\n"
        "from vllm.reasoning import ReasoningParserManager as r\n"
        "print(json.dumps([t.list_registered(), r.list_registered()]))"
    )
    result = subprocess.run([str(vllm_python), "-c", program], capture_output=True, check=True)
    tool, reasoning = json.loads(result.stdout.splitlines()[-1])
    assert installed(tmp_path, vllm_python).parser_names(may_import=False) == ParserNames(
        frozenset(tool), frozenset(reasoning)
    )
