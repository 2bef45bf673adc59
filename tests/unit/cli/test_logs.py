"""`logs`: the files, their last lines, and lines that are added while the files are rotated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llm_api_server.cli.logs import Tail
from llm_api_server.cli.main import app

CONFIG = """
server: {run_dir: run, port: 1}
auth: {api_keys: [{key: sk-0123456789abcdef, name: me}]}
models: {available: {good: {path: a.gguf, aliases: [fine]}, org/big: {path: b.gguf}}}
"""
GATEWAY = """\
2026-01-01 10:00:01 | INFO | one
2026-01-01 10:00:03 | ERROR | three
    Traceback
      deep
2026-01-01 10:00:05 | INFO | five
"""
MANAGER = """\
2026-01-01 10:00:02 | INFO | two
2026-01-01 10:00:04 | INFO | four
"""
Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    def invoke(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, ["logs", *words])
        assert result.exit_code == code, result.output
        return result

    return invoke


@pytest.fixture
def logs(folder: Path) -> Path:
    (folder / "logs" / "engines").mkdir(parents=True)
    (folder / "logs" / "gateway.log").write_text(GATEWAY)
    (folder / "logs" / "manager.log").write_text(MANAGER)
    return folder / "logs"


def test_gateway_and_manager_are_merged_by_time(run: Run, logs: Path) -> None:
    lines = run().stdout.splitlines()
    assert [line.split()[-1] for line in lines] == ["one", "two", "three", "Traceback", "deep", "four", "five"]
    assert lines[1].startswith("manager | 2026")
    assert lines[4] == "gateway |       deep"


def test_the_number_of_lines_counts_both_logs(run: Run, logs: Path) -> None:
    assert [line.split()[-1] for line in run("-n", "2").stdout.splitlines()] == ["four", "five"]
    assert run("-n", "0").stdout == ""


def test_without_times_one_file_follows_the_other(run: Run, logs: Path) -> None:
    (logs / "gateway.log").write_text("b\n")
    (logs / "manager.log").write_text("a\n")
    assert run().stdout == "gateway | b\nmanager | a\n"


def test_a_single_log_is_printed_unchanged(run: Run, logs: Path) -> None:
    assert run("gateway").stdout == GATEWAY


@pytest.mark.parametrize(("name", "file"), [("good", "good"), ("fine", "good"), ("org/big", "org_big")])
def test_a_models_log_is_found_by_name_or_alias(run: Run, logs: Path, name: str, file: str) -> None:
    (logs / "engines" / f"{file}.log").write_text("loaded\n")
    assert run(name).stdout == "loaded\n"


def test_logs_of_removed_models_and_embedding_instances_are_found(run: Run, logs: Path) -> None:
    (logs / "engines" / "good (embeddings).log").write_text("loaded\n")
    assert run("good (embeddings)").stdout == "loaded\n"


def test_an_unknown_name_is_an_error_that_lists_the_logs(run: Run, logs: Path) -> None:
    message = run("none", code=1).stderr
    assert message == "There is no log 'none'. Logs: gateway, manager, zygote, good, org/big.\n"


@pytest.mark.parametrize(("words", "advice"), [([], "llm-api-server serve"), (["good"], "models load")])
def test_without_logs_the_error_names_the_command_that_writes_them(run: Run, words: list[str], advice: str) -> None:
    assert advice in run(*words, code=1).stderr


def test_an_unfinished_last_line_is_shown_without_control_characters(run: Run, logs: Path) -> None:
    (logs / "engines" / "good.log").write_bytes(b"\x1b[31mred\x1b[0m\r\n\x1b]0;title\x07 \xff")
    assert run("good").stdout == "red\n\\x1b]0;title\\x07 \N{REPLACEMENT CHARACTER}\n"


def test_many_lines_are_read_from_the_end(run: Run, logs: Path) -> None:
    (logs / "manager.log").write_text("".join(f"{number:0999}\n" for number in range(500)))
    assert [int(line) for line in run("manager", "-n", "130").stdout.split()] == list(range(370, 500))


@pytest.fixture
def tail(tmp_path: Path) -> Iterator[Tail]:
    with Tail(tmp_path / "a.log", "a") as one:
        yield one


def added(tail: Tail) -> list[str]:
    return [line.text for line in tail.read()]


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_lines_are_read_once_they_are_complete(tmp_path: Path, tail: Tail) -> None:
    path = tmp_path / "a.log"
    append(path, "old\n")
    assert [line.text for line in tail.last(10)] == ["old"]
    assert added(tail) == []
    append(path, "one\ntw")
    assert added(tail) == ["one"]
    append(path, "o\n")
    assert added(tail) == ["two"]


def test_a_new_file_is_read_from_its_beginning(tmp_path: Path, tail: Tail) -> None:
    assert tail.last(10) == []
    assert added(tail) == []
    append(tmp_path / "a.log", "one\n")
    assert added(tail) == ["one"]


def test_nothing_is_lost_when_the_file_is_rotated(tmp_path: Path, tail: Tail) -> None:
    path = tmp_path / "a.log"
    append(path, "one\n")
    tail.last(10)
    append(path, "two\n")
    path.rename(tmp_path / "a.1.log")
    append(tmp_path / "a.1.log", "three\n")
    append(path, "four\n")
    assert added(tail) == ["two", "three", "four"]
    path.unlink()
    assert added(tail) == []
    append(path, "five\n")
    assert added(tail) == ["five"]


def test_a_truncated_file_is_read_from_its_beginning(tmp_path: Path, tail: Tail) -> None:
    path = tmp_path / "a.log"
    append(path, "a long line\n")
    tail.last(10)
    path.write_text("one\n")
    assert added(tail) == ["one"]
