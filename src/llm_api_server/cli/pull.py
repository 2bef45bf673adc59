"""`llm-api-server models pull` and `models rm`: models come and go, with their entries in the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_api_server.cli import base, completion
from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from llm_api_server.config.models import Config

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def pull(
    source: Annotated[
        str,
        typer.Argument(
            help="org/name of Hugging Face, ms:org/name of ModelScope, an https:// address of a .gguf file, or "
            "starter. org/name:Q4_K_M chooses a quantization, org/name@REVISION a revision."
        ),
    ],
    config: ConfigOption = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the configuration.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    file: Annotated[str | None, typer.Option(help="A quantization, a file's name, or a pattern of it.")] = None,
    *,
    add: Annotated[bool, typer.Option("--add/--no-add", help="Put an entry into the configuration.")] = True,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Download a model, and add it to the configuration. What a broken download has brought is kept: run it again.

    With --json, one event per line.
    """
    from llm_api_server.cli import pull_view
    from llm_api_server.downloads import config_edit, entry
    from llm_api_server.downloads.download import pull as run
    from llm_api_server.downloads.source import parse_source

    loaded = base.load(config)
    with base.errors():
        wanted = parse_source(source, revision, file)
        if add and name in loaded.models.available and not entry.may_be_of(loaded, name, wanted):
            base.fail(f"The configuration has another model {name!r}: choose another --name.", ExitCode.WRONG)
        try:
            with pull_view.shown(as_json=as_json) as tell:
                pulled = run(wanted, loaded.models_dir, _largest_memory(loaded), tell)
        except KeyboardInterrupt:
            base.fail("Interrupted. What has come is kept: the same command goes on with it.", ExitCode.INTERRUPTED)
        found = entry.entry_of(loaded, pulled)
        known = _known(loaded, pulled.path)
        model = name or known or entry.free_name(loaded, entry.name_of(wanted, pulled), pulled)
        if as_json:
            typer.echo(json.dumps({"type": "entry", "model": model, "entry": found}, ensure_ascii=False))
        if not add:
            return
        if model == known:
            _say(f"{model} is in {loaded.source} already.", as_json=as_json)
            return
        text = config_edit.entry_text(model, found, 4)
        _say(f"\nFor {loaded.source}, under models.available:\n\n{text}", as_json=as_json)
        if not (yes or as_json) and not _agrees("Add it?"):
            _say("Left as it is. The files stay; `llm-api-server models pull` offers it again.", as_json=as_json)
            raise typer.Exit(ExitCode.FAILED)
        config_edit.edit(loaded.source, lambda before: config_edit.with_model(before, model, found))
        how = _follow(config) or "Start the server with `llm-api-server serve`."
        _say(f"Added. {how}", as_json=as_json)


def remove(
    name: Annotated[
        str, typer.Argument(help="The model's name in the configuration.", autocompletion=completion.models)
    ],
    config: ConfigOption = None,
    *,
    keep_files: Annotated[bool, typer.Option("--keep-files", help="Only take it out of the configuration.")] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take a model out of the configuration, and delete its files where they are under models_dir."""
    from llm_api_server.downloads import config_edit
    from llm_api_server.downloads.files import delete, files_of, why_needed

    loaded = base.load(config)
    if name not in loaded.models.available:
        base.fail(f"The configuration has no model {name!r}; `llm-api-server models list` shows them.", ExitCode.FAILED)
    if (problem := why_needed(loaded, name)) is not None:
        base.fail(problem, ExitCode.FAILED)
    with base.errors():
        files = [] if keep_files else files_of(loaded, name)
        for path in files:
            _say(f"Deletes {path} ({_size(path) / 1e6:.0f} MB).", as_json=as_json)
        if not files and not keep_files:
            _say("No files of its own under models_dir: nothing is deleted.", as_json=as_json)
        if as_json and not yes:
            base.fail("With --json nobody is asked: say --yes.", ExitCode.WRONG)
        if not yes and not _agrees(f"Remove {name}?"):
            raise typer.Exit(ExitCode.FAILED)
        config_edit.edit(loaded.source, lambda before: config_edit.without_model(before, name))
        followed = _follow(config)
        delete(files)
        _say(f"Removed {name}. {followed}".rstrip(), as_json=as_json)
        if as_json:
            base.print_json({"removed": name, "deleted": [str(path) for path in files], "note": followed})


def _largest_memory(config: Config) -> int:
    """Of one GPU, or RAM, in bytes."""
    from llm_api_server.devices.host import this_host
    from llm_api_server.devices.inventory import HostInventory

    return max(device.capacity for device in HostInventory(config.devices, this_host()).devices)


def _known(config: Config, path: str) -> str | None:
    """The model that has this path already."""
    models = config.models.available.items()
    return next((name for name, entry in models if entry.path == path), None)


def _follow(config: Path | None) -> str:
    """Have a server follow the file, where one runs; what came of it."""
    from llm_api_server.errors import ControlError
    from llm_api_server.lifecycle.running_server import is_absent, reload_server

    try:
        reload_server(base.load(config))
    except ControlError as error:
        if is_absent(error):
            return ""
        return f"The running server does not follow yet: {error}"
    return "The running server follows."


def _agrees(question: str) -> bool:
    """Whoever cannot be asked has not agreed."""
    import sys

    if not sys.stdin.isatty():
        typer.echo("Nobody can be asked here: say --yes.", err=True)
        return False
    return typer.confirm(question, default=True)


def _say(text: str, *, as_json: bool) -> None:
    if not as_json:
        typer.echo(text)


def _size(path: Path) -> int:
    return (
        path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
    )
