"""`models pull` and `models rm` before anything is downloaded or deleted. Downloads are in tests/integration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cli.conftest import CONFIG, Run


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["rm", "none"], 1, "The configuration has no model 'none'"),
        (["rm", "good", "--keep-files"], 1, "add --yes"),
        (["pull", "nonsense"], 1, "is not a source of models"),
        (
            ["pull", "org/name", "--name", "good"],
            2,
            "The configuration has another model 'good': choose another --name.",
        ),
    ],
)
def test_refusals_change_nothing(run: Run, folder: Path, words: list[str], code: int, message: str) -> None:
    assert message in run("models", *words, code=code).stderr
    assert (folder / "config.yaml").read_text() == CONFIG


def test_json_needs_a_confirmation_on_the_command_line(run: Run) -> None:
    error = json.loads(run("models", "rm", "good", "--json", code=2).stdout)["error"]
    assert error == {"code": "wrong", "message": "--json cannot ask for confirmation: add --yes."}


def test_a_model_that_the_configuration_needs_is_not_removed(run: Run, folder: Path) -> None:
    (folder / "config.yaml").write_text(CONFIG.replace("models: {", "models: {default: good, "))
    assert "models.default or models.preload" in run("models", "rm", "good", "--yes", code=1).stderr
