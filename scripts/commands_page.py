"""Write docs/commands.md from the commands: `python scripts/commands_page.py > docs/commands.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer

from llm_api_server.cli.main import app
from llm_api_server.types import ExitCode

_HEAD = """\
# Commands

`llm-api-server COMMAND --help` prints the same texts. With `--json` a command prints one JSON value on standard output,
and `{"error": {"code": ..., "message": ...}}` if it fails (`models pull` and `logs` print one object per line; an
invalid command line is always reported as text). Progress goes to standard error.

`llm-api-server --install-completion` installs completion of commands, options and model names for bash, zsh, fish or
PowerShell.

## Exit codes

| code | with --json | meaning |
| --- | --- | --- |
"""


def page() -> str:
    codes = "".join(f"| {code.value} | `{code.name.lower()}` | {code.meaning} |\n" for code in ExitCode)
    return _HEAD + codes + "".join(_described(typer.main.get_command(app), "llm-api-server"))


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield all commands with their full names. Typer's own copy of click has no public types."""
    if hasattr(command, "commands"):
        for word, inner in command.commands.items():
            yield from commands(inner, f"{name} {word}")
    else:
        yield name, command


def _described(root: Any, name: str) -> Iterator[str]:
    for whole, command in commands(root, name):
        arguments = [_metavar(one) for one in command.params if one.param_type_name == "argument"]
        yield f"\n## `{' '.join([whole, *arguments])}`\n\n{_paragraph(command.help or '')}\n"
        rows = [_row(one) for one in command.params if not one.hidden]
        if rows:
            yield "\n| | |\n| --- | --- |\n" + "".join(rows)


def _row(one: Any) -> str:
    names = [_metavar(one)] if one.param_type_name == "argument" else [*one.opts, *one.secondary_opts]
    names = [name.replace("|", "\\|") for name in names]
    return f"| `{'`, `'.join(names)}` | {_paragraph(one.help or '')}{_notes(one)} |\n"


def _notes(one: Any) -> str:
    """Return what `--help` adds in brackets: whether the option is required, its default and its variable."""
    notes = [" Required."] if one.required and one.param_type_name == "option" else []
    if isinstance(one.default, bool):
        notes += [f" Default: `{(one.opts if one.default else one.secondary_opts)[0]}`."] if one.secondary_opts else []
    elif one.default:
        notes += [f" Default: `{one.default}`."]
    if one.envvar:
        notes += [f" Environment variable: `{one.envvar}`."]
    return "".join(notes)


def _metavar(argument: Any) -> str:
    name = argument.metavar or str(argument.name).upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _paragraph(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
