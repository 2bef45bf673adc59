"""Promises of all commands: exit codes, errors as sentences, and JSON for every result and error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from scripts.commands_page import commands
from typer.testing import CliRunner

from llm_api_server import __version__
from llm_api_server.cli.main import app
from llm_api_server.types import ExitCode

#: `serve` and `chat` run until they are stopped; the others print a text for a file.
WITHOUT_JSON = {"serve", "chat", "config example", "config schema"}
NEED_A_SERVER = [
    "stop", "restart", "reload", "status", "models list", "models show good", "models load good",
    "models unload good", "models pin good", "models unpin good",
]  # fmt: skip
NEED_A_DATABASE = [
    "keys list", "keys show x", "keys create --name x", "keys delete x", "keys audit", "usage", "usage --requests",
]  # fmt: skip
NEED_A_CONFIG = ["check-config", "serve", "models unload x", *NEED_A_SERVER, *NEED_A_DATABASE]

pytestmark = pytest.mark.usefixtures("folder")


def run(*words: str) -> tuple[int, Any]:
    """Run a command with `--json`; return its exit code and output."""
    result = CliRunner().invoke(app, [*words, "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_every_command_with_a_result_prints_json() -> None:
    every = dict(commands(typer.main.get_command(app), ""))
    without = {name.strip() for name, command in every.items() if all(one.name != "as_json" for one in command.params)}
    assert without == WITHOUT_JSON


@pytest.mark.parametrize("command", NEED_A_SERVER)
def test_without_a_server_the_exit_code_is_3_and_the_message_names_serve(command: str) -> None:
    result = CliRunner().invoke(app, command.split())
    assert (result.exit_code, result.stdout) == (ExitCode.NOT_RUNNING, "")
    assert "llm-api-server serve" in result.stderr


@pytest.mark.parametrize("command", NEED_A_SERVER)
def test_without_a_server_the_error_is_json(command: str) -> None:
    code, output = run(*command.split())
    assert code == ExitCode.NOT_RUNNING
    assert output["error"]["code"] == "not_running"
    assert "serve" in output["error"]["message"]


@pytest.mark.parametrize("command", NEED_A_CONFIG)
def test_an_invalid_configuration_has_exit_code_2_and_changes_nothing(folder: Path, command: str) -> None:
    (folder / "other.yaml").write_text("server: {prot: 1}\nmodels: {default: x}\n")
    result = CliRunner().invoke(app, [*command.split(), "--config", "other.yaml"])
    assert result.exit_code == ExitCode.WRONG
    assert "other.yaml:1: server.prot: unknown key; did you mean 'port'?" in result.stderr
    assert "models.default" in result.stderr
    assert "Traceback" not in result.output
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "other.yaml"]


def test_an_invalid_configuration_is_an_error_in_json(folder: Path) -> None:
    assert run("check-config")[1]["ok"] is True
    (folder / "config.yaml").write_text("server: {prot: 1}")
    code, output = run("check-config")
    assert (code, output["error"]["code"]) == (ExitCode.WRONG, "wrong")
    assert "port" in output["error"]["message"]


@pytest.mark.parametrize("command", NEED_A_DATABASE)
def test_an_unusable_database_is_an_error(folder: Path, command: str) -> None:
    (folder / "llm-api-server.db").write_text("this is no database, " * 100)
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == ExitCode.FAILED
    assert "cannot be used" in result.stderr
    assert "Traceback" not in result.output


def test_results_are_json() -> None:
    assert run("version") == (ExitCode.DONE, {"version": __version__})
    assert run("init") == (ExitCode.DONE, {"file": str(Path("config.yaml").absolute()), "written": False})
    assert run("keys", "new")[1]["hash"].startswith("sha256:")


def test_errors_are_text_again_after_a_command_with_json() -> None:
    assert run("models", "rm", "nothing")[0] == ExitCode.FAILED
    result = CliRunner().invoke(app, ["models", "rm", "nothing"])
    assert (result.exit_code, result.stdout) == (ExitCode.FAILED, "")
    assert "no model 'nothing'" in result.stderr
