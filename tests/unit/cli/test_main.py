"""Tree of commands: its help, its completion, and its page in the documentation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts.commands_page import page

from tests.running import BIN, ROOT

HEAVY = {"fastapi", "uvicorn", "loguru", "msgspec", "yaml", "sqlalchemy", "rich.progress"}


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["--help"], HEAVY | {"pydantic"}),
        (["models", "--help"], HEAVY),  # typer itself imports pydantic to parse arguments
        (["keys", "create", "--help"], HEAVY),
    ],
)
def test_help_imports_no_heavy_module(words: list[str], heavy: set[str]) -> None:
    program = f"""
import sys
from llm_api_server.cli.main import main
try:
    main({words})
except SystemExit as end:
    assert end.code == 0
heavy = {heavy} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Usage:" in result.stdout


def complete(*words: str) -> list[str]:
    """The completions of the last word, in bash."""
    line = " ".join(["llm-api-server", *words])
    variables = {"_LLM_API_SERVER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    result = subprocess.run(
        [BIN / "llm-api-server"], env=os.environ | variables, capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stderr == ""
    return result.stdout.split()


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (["che"], ["check-config"]),
        (["models", "un"], ["unload", "unpin"]),
        (["models", "load", "g"], ["good"]),
        (["models", "load", "t"], ["tuned"]),
        (["models", "rm", "f"], ["fine"]),
    ],
)
def test_commands_and_model_names_are_completed(folder: Path, words: list[str], completions: list[str]) -> None:
    assert complete(*words) == completions


def test_an_unreadable_configuration_completes_nothing(folder: Path) -> None:
    (folder / "config.yaml").write_text("models: [")
    assert complete("models", "load", "g") == []


def test_the_completion_script_works_in_bash() -> None:
    shown = subprocess.run(
        [BIN / "llm-api-server", "--show-completion", "bash"], capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )  # fmt: skip
    request = "COMP_WORDS=(llm-api-server che); COMP_CWORD=1\n_llm_api_server_completion llm-api-server"
    script = f'{shown.stdout}\n{request}\necho "${{COMPREPLY[@]}}"'
    path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60, env=os.environ | path
    )
    assert result.stdout.strip() == "check-config"


def test_the_page_of_commands_is_current() -> None:
    assert (ROOT / "docs/commands.md").read_text() == page(), "python scripts/commands_page.py > docs/commands.md"
