"""What scripts rely on: `--json` everywhere, exit codes, completion, and the page that tells of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from scripts.commands_page import commands, page
from typer.testing import CliRunner

from llm_api_server import __version__
from llm_api_server.cli.main import app
from llm_api_server.types import ExitCode
from tests.running import BIN, ROOT

#: They print no result: one runs until it is stopped, one talks, two print a text for a file.
WITHOUT_JSON = {"serve", "chat", "config example", "config schema"}
CONFIG = """
server: {run_dir: run, port: 1}
auth: {api_keys: [{key: sk-0123456789abcdef, name: me}]}
models: {available: {good: {path: a.gguf, aliases: [fine], adapters: {tuned: lora}}, bad: {path: b.gguf}}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> tuple[int, Any]:
    result = CliRunner().invoke(app, [*words, "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_every_command_with_a_result_gives_it_as_json() -> None:
    every = dict(commands(typer.main.get_command(app), ""))
    without = {name.strip() for name, command in every.items() if all(one.name != "as_json" for one in command.params)}
    assert without == WITHOUT_JSON


@pytest.mark.parametrize(
    "words",
    [
        ["stop"], ["restart"], ["reload"], ["status"], ["models", "list"], ["models", "load", "good"],
        ["models", "unload", "good"], ["models", "pin", "good"], ["models", "unpin", "good"],
    ],
)  # fmt: skip
def test_without_a_server_the_error_is_json(words: list[str]) -> None:
    code, said = run(*words)
    assert code == ExitCode.NOT_RUNNING
    assert said["error"]["code"] == "not_running"
    assert "serve" in said["error"]["message"]


def test_a_wrong_configuration_is_told_as_json(folder: Path) -> None:
    assert run("check-config")[1]["ok"] is True
    (folder / "config.yaml").write_text("server: {prot: 1}")
    code, said = run("check-config")
    assert (code, said["error"]["code"]) == (ExitCode.WRONG, "wrong")
    assert "port" in said["error"]["message"]


def test_results_are_json() -> None:
    assert run("version") == (ExitCode.DONE, {"version": __version__})
    assert run("init") == (ExitCode.DONE, {"file": str(Path("config.yaml").absolute()), "written": False})
    assert run("keys", "new")[1]["hash"].startswith("sha256:")
    code, said = run("models", "rm", "good")
    assert (code, said["error"]["message"]) == (ExitCode.WRONG, "With --json nobody is asked: say --yes.")


def test_an_error_is_text_again_afterwards() -> None:
    assert run("models", "rm", "nothing")[0] == ExitCode.FAILED
    result = CliRunner().invoke(app, ["models", "rm", "nothing"])
    assert (result.exit_code, result.stdout) == (ExitCode.FAILED, "")
    assert "no model 'nothing'" in result.stderr


def complete(*words: str) -> list[str]:
    """As bash asks for the last of them."""
    line = " ".join(["llm-api-server", *words])
    variables = {"_LLM_API_SERVER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    asked = subprocess.run(
        [BIN / "llm-api-server"], env=os.environ | variables, capture_output=True, text=True, check=True, timeout=60
    )
    assert asked.stderr == ""
    return asked.stdout.split()


def test_commands_and_models_are_completed(folder: Path) -> None:
    assert complete("che") == ["check-config"]
    assert complete("models", "un") == ["unload", "unpin"]
    assert complete("models", "load", "g") == ["good"]
    assert complete("models", "load", "t") == ["tuned"]
    (folder / "config.yaml").write_text("models: [")
    assert complete("models", "load", "g") == []


def test_bash_takes_the_script() -> None:
    shown = subprocess.run(
        [BIN / "llm-api-server", "--show-completion", "bash"], capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )  # fmt: skip
    asked = "COMP_WORDS=(llm-api-server che); COMP_CWORD=1\n_llm_api_server_completion llm-api-server"
    script = f'{shown.stdout}\n{asked}\necho "${{COMPREPLY[@]}}"'
    path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    answer = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60, env=os.environ | path
    )
    assert answer.stdout.strip() == "check-config"


def test_completion_imports_nothing_heavy() -> None:
    heavy = "{'pydantic', 'fastapi', 'sqlalchemy', 'msgspec'}"
    script = f"import sys, llm_api_server.cli.main; print(sorted({heavy} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "[]"


def test_the_page_is_current() -> None:
    assert (ROOT / "docs/commands.md").read_text() == page(), "python scripts/commands_page.py > docs/commands.md"
