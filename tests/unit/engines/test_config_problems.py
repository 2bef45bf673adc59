"""Checks of a configuration by the engines: unknown parsers are problems with a line, a missing vLLM is a warning."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_api_server.cli.main import app
from llm_api_server.serving import gunicorn_hooks
from tests.fake_vllm import fake_vllm, interpreter

CONFIG = """\
server: {{run_dir: run, port: 0}}
auth: {{api_keys: [{{key: sk-0123456789abcdef, name: me}}]}}
engines: {{vllm: {{python: {python}}}}}
models:
  available:
    small: {{path: small.gguf, engine_args: {{tool_call_parser: nobody-asks}}}}
    chat:
      path: org/chat
      engine_args:
        {key}: {value}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, python: Path, key: str = "tool_call_parser", value: str = "hermes") -> None:
    (folder / "config.yaml").write_text(CONFIG.format(python=python, key=key, value=value))


@pytest.mark.parametrize("command", ["check-config", "serve"])
@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("tool_call_parser", "no tool parser 'hermess'; did you mean 'hermes'? Allowed: hermes, mistral"),
        ("--tool-call-parser", "no tool parser 'hermess'; did you mean 'hermes'? Allowed: hermes, mistral"),
        ("reasoning-parser", "no reasoning parser 'hermess'. Allowed: qwen3"),
    ],
)
def test_an_unknown_parser_is_reported_with_its_line(folder: Path, command: str, key: str, sentence: str) -> None:
    write(folder, fake_vllm(folder, ["mistral", "hermes"], ["qwen3"]), key, "hermess")
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 2
    assert f"config.yaml:10: models.available.chat.engine_args.{key}: the installed vLLM has " in result.stderr
    assert result.stderr.rstrip().endswith(sentence)
    assert not (folder / "run").exists()


def test_gunicorn_refuses_an_unknown_parser(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, fake_vllm(folder, ["hermes"], ["qwen3"]), value="hermess")
    with pytest.raises(SystemExit) as caught:
        gunicorn_hooks.config_for_gunicorn()
    assert caught.value.code == 2
    assert "config.yaml:10: " in capsys.readouterr().err


def test_an_unknown_parser_is_reported_with_all_other_problems(folder: Path) -> None:
    write(folder, fake_vllm(folder, ["hermes"], ["qwen3"]), value="hermess")
    with (folder / "config.yaml").open("a") as file:
        file.write("  default: nothing\n")
    result = CliRunner().invoke(app, ["check-config"])
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == [
        "models.available.chat.engine_args.tool_call_parser",
        "models.default",
    ]


def test_known_parsers_are_accepted(folder: Path) -> None:
    write(folder, fake_vllm(folder, ["hermes"], ["qwen3"]))
    result = CliRunner().invoke(app, ["check-config"])
    assert (result.exit_code, result.stderr) == (
        0,
        f"warning: The model 'small' cannot be loaded: {folder}/models/small.gguf does not exist.\n",
    )


def test_only_check_config_imports_vllm(folder: Path) -> None:
    write(folder, fake_vllm(folder, ["hermes"], ["qwen3"], is_eager=True), value="hermess")
    gunicorn_hooks.config_for_gunicorn()
    assert not (folder / "imports").exists()
    assert CliRunner().invoke(app, ["check-config"]).exit_code == 2
    assert (folder / "imports").exists()
    with pytest.raises(SystemExit):
        gunicorn_hooks.config_for_gunicorn()  # from the cache


@pytest.mark.parametrize("has_interpreter", [True, False])
def test_a_missing_vllm_is_a_warning_with_advice(folder: Path, has_interpreter: bool) -> None:
    python = interpreter(folder) if has_interpreter else folder / "none"
    write(folder, python)
    result = CliRunner().invoke(app, ["check-config"])
    assert result.exit_code == 0
    assert f"warning: vLLM is not installed in {python}: 'chat' cannot be loaded. Run `make vllm`" in result.stderr


def test_vllm_is_not_started_without_vllm_models(folder: Path) -> None:
    python = interpreter(folder)
    text = CONFIG.format(python=python, key="a", value="b").replace("org/chat", "chat.gguf")
    (folder / "config.yaml").write_text(text)
    assert CliRunner().invoke(app, ["check-config"]).exit_code == 0
    assert not (folder / "starts").exists()
