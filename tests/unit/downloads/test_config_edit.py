"""Entries are added to and removed from configuration files, and every other line stays."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml

from llm_api_server.downloads.config_edit import edit, with_model, without_model
from llm_api_server.errors import DownloadError

ENTRY = {"path": "m/a: b.gguf", "engine": "llama_cpp", "max_tokens": 32768}

INDENTED = """\
models:
    available:
        x: # the first
            path: x.gguf # here
            engine_args:
                stop: [a, b]

        # the last
        y: {path: y.gguf}
    # of the rest
    max_loaded: 2
"""
FILES = [
    "",
    "# nothing but a comment\n",
    "server: {port: 1}\n",
    "server: {port: 1}",
    "models:\n",
    "models: # soon\nserver:\n  port: 1\n",
    "models:\n  max_loaded: 2 # two\n\n# after\nserver: {port: 1}\n",
    "models:\n  available:\n  max_loaded: 2\n",
    "models:\n  available: {} # NAME: {path: FILE.gguf}\n  max_loaded: 2\n",
    INDENTED,
    "models:\n  available:\n    x:\n      path: >-\n        folded\n        x.gguf\nserver: {port: 1}\n",
    "models:\n  available:\n    x:\n      path: x.gguf\n      aliases:\n        - one\n        - two\n# end",
    "models:\n  available:\n    x: {path: x.gguf}\n    '名字': {path: ü.gguf}\n",
]


@pytest.mark.parametrize("text", FILES)
@pytest.mark.parametrize("name", ["new", "名字 2", "a: b"])
def test_an_entry_is_added_and_removed_and_other_lines_stay(text: str, name: str) -> None:
    before = yaml.safe_load(text) or {}
    added = with_model(text, name, ENTRY)
    found = yaml.safe_load(added)
    assert found["models"]["available"].pop(name) == ENTRY
    expected = {**before, "models": {**(before.get("models") or {})}}
    expected["models"]["available"] = expected["models"].get("available") or {}
    assert found == expected
    comments = [line.strip() for line in text.splitlines() if line.strip().startswith("#")]
    assert [line for line in comments if line in added] == comments
    removed = without_model(added, name)
    assert yaml.safe_load(removed) == expected
    if expected["models"]["available"]:
        assert removed == text


@pytest.mark.parametrize("text", [text for text in FILES if text.endswith("\n") and "  x:" in text])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark_stay(tmp_path: Path, text: str, mark: bytes) -> None:
    file = tmp_path / "config.yaml"
    before = mark + text.replace("\n", "\r\n").encode()
    file.write_bytes(before)
    edit(file, lambda old: with_model(old, "new", ENTRY))
    added = file.read_bytes()
    assert added.startswith(mark)
    assert added.count(b"\n") == added.count(b"\r\n") > before.count(b"\n")
    edit(file, lambda old: without_model(old, "new"))
    assert file.read_bytes() == before


def test_mixed_line_ends_and_odd_white_space_stay(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    head, entry = b"server: {port: 1}  \r\n\r\n# a\t\nmodels:\n  available:\r\n", b"    x: {path: x}\t# \xc3\xbc\n"
    tail = b"    y: {path:\ty}\r\n# end"
    file.write_bytes(head + entry + tail)
    edit(file, lambda old: without_model(old, "x"))
    assert file.read_bytes() == head + tail


def test_the_comment_of_an_empty_section_stays() -> None:
    text = "models:\n  available: {} # my models\n  max_loaded: 2 # two\n"
    added = with_model(text, "x", ENTRY)
    assert added.startswith("models:\n  available: # my models\n    x:\n")
    assert without_model(added, "x") == text


@pytest.mark.parametrize("name", ["1.5", "on", "2027-01-31", "null", "010", "1:30", "~", "0x10", "2027-13-01"])
def test_a_name_that_yaml_reads_as_another_type_is_a_name(name: str) -> None:
    text = f"models:\n  available:\n    {name}: {{path: a}}\n    other: {{path: b}}\n"
    assert without_model(text, name) == "models:\n  available:\n    other: {path: b}\n"
    with pytest.raises(DownloadError, match="has a model"):
        with_model(text, name, ENTRY)
    added = with_model("", name, ENTRY)
    assert list(yaml.safe_load(added)["models"]["available"]) == [name]
    assert without_model(added, name) == "models:\n  available: {}\n"


@pytest.mark.parametrize("line", ["a: 2027-13-01", "a: ${B}", "a: ${", "a:\tb", "a: 010", "a: !x y", "a: 1\na: 2"])
def test_values_that_another_part_of_the_file_has_do_not_matter(line: str) -> None:
    text = f"{line}\nmodels:\n  available:\n    x: {{path: a}}\n"
    assert without_model(text, "x") == f"{line}\nmodels:\n  available: {{}}\n"


def test_a_file_in_another_encoding_is_refused_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(b"a: \xfc\n")
    with pytest.raises(DownloadError, match="is not UTF-8 text"):
        edit(file, lambda old: with_model(old, "x", ENTRY))
    assert file.read_bytes() == b"a: \xfc\n"


def test_a_file_whose_aliases_multiply_is_refused_at_once() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    with pytest.raises(DownloadError, match="not valid YAML"):
        without_model(f"{bomb}models: {{available: {{x: {{path: y}}}}}}\n", "x")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("models: {available: {x: {path: y}}}\n", "in braces"),
        ("models:\n  available: {\n    x: {path: y}}\n", "in braces"),
        ("models:\n  available: {new: {path: y}}\n", "has a model 'new' already"),
        ("a: [\n", "not valid YAML"),
        ("- 1\n", "not a mapping"),
    ],
)
def test_an_unsupported_file_is_refused(text: str, reason: str) -> None:
    with pytest.raises(DownloadError, match=reason):
        with_model(text, "new", ENTRY)


def test_removing_an_unknown_model_is_an_error() -> None:
    with pytest.raises(DownloadError, match="has no model 'y'"):
        without_model("models: {available: {x: {path: y}}}\n", "y")


def test_links_and_modes_are_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "config.yaml"
    real.write_text("a: 1\n")
    real.chmod(0o640)
    link.symlink_to(real)
    edit(link, lambda text: f"{text}b: 2\n")
    assert link.is_symlink()
    assert real.read_text() == "a: 1\nb: 2\n"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "real.yaml"]


def test_a_failed_change_leaves_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("a: [\n")
    with pytest.raises(DownloadError):
        edit(file, lambda text: with_model(text, "x", ENTRY))
    assert file.read_text() == "a: [\n"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
