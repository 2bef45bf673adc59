"""Commands `models pull` and `models rm`: files of models, and their entries in the configuration."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_api_server.cli import base, models
from llm_api_server.cli.base import ConfigOption, JsonOption, YesOption
from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from llm_api_server.config.models import DevicesConfig, ModelConfig
    from llm_api_server.downloads.download import DownloadEvent, OnEvent, Planned


def pull(
    source: Annotated[
        str,
        typer.Argument(
            help="Hugging Face repository (org/name), ModelScope repository (ms:org/name), https:// address of a .gguf "
            "file, or starter. org/name:Q4_K_M chooses a quantization, org/name@REVISION a revision."
        ),
    ],
    config: ConfigOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the configuration.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    file: Annotated[str | None, typer.Option(help="Quantization, file name, or pattern of file names.")] = None,
    *,
    add: Annotated[bool, typer.Option("--add/--no-add", help="Add an entry to the configuration.")] = True,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Download a model and add it to the configuration. Run the command again to resume an interrupted download.

    With --json, print one event per line.
    """
    from llm_api_server.downloads import config_edit, entry
    from llm_api_server.downloads.download import download
    from llm_api_server.downloads.source import parse_source

    loaded = base.load(config)
    with base.errors():
        wanted = parse_source(source, revision, file)
        namesake = loaded.models.available.get(name) if name else None
        if add and namesake and not entry.may_be_of(namesake.path, loaded.models_dir, wanted):
            base.fail(f"The configuration has another model {name!r}: choose another --name.", ExitCode.WRONG)
        try:
            with _progress(as_json=as_json) as on_event:
                downloaded = download(wanted, loaded.models_dir, _largest_memory(loaded.devices), on_event)
        except KeyboardInterrupt:
            base.fail(
                "Interrupted. Downloaded data is kept: run the same command again to resume.", ExitCode.INTERRUPTED
            )
        new_entry = entry.entry_of(loaded, downloaded)
        existing = _model_with_path(loaded.models.available, downloaded.path)
        model = (
            name or existing or entry.free_name(loaded.models.available, entry.name_of(wanted, downloaded), downloaded)
        )
        if as_json:
            typer.echo(json.dumps({"type": "entry", "model": model, "entry": new_entry}, ensure_ascii=False))
        if not add:
            return
        if model == existing:
            _echo(f"{model} is already in {loaded.source}.", as_json=as_json)
            return
        text = config_edit.entry_text(model, new_entry, 4)
        _echo(f"\nEntry for models.available in {loaded.source}:\n\n{text}", as_json=as_json)
        if not (yes or as_json) and not _confirm("Add it?"):
            _echo("The configuration was not changed. The downloaded files are kept.", as_json=as_json)
            raise typer.Exit(ExitCode.FAILED)
        config_edit.edit(loaded.source, lambda before: config_edit.with_model(before, model, new_entry))
        _echo(f"Added. {_reload(config) or 'Start the server with `llm-api-server serve`.'}", as_json=as_json)


def remove(
    name: Annotated[
        str, typer.Argument(help="Name of the model in the configuration.", autocompletion=models.complete_name)
    ],
    config: ConfigOption = None,
    *,
    keep_files: Annotated[
        bool, typer.Option("--keep-files", help="Only remove the model from the configuration.")
    ] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove a model from the configuration, and delete its files if they are under models_dir."""
    from llm_api_server.downloads import config_edit
    from llm_api_server.downloads.files import delete, files_of, why_needed

    loaded = base.load(config)
    if name not in loaded.models.available:
        base.fail(f"The configuration has no model {name!r}; `llm-api-server models list` lists them.", ExitCode.FAILED)
    if (problem := why_needed(loaded.models, name)) is not None:
        base.fail(problem, ExitCode.FAILED)
    with base.errors():
        files = [] if keep_files else files_of(loaded.models.available, loaded.models_dir, name)
        for path in files:
            _echo(f"To delete: {path} ({_size(path) / 1e6:.0f} MB).", as_json=as_json)
        if not files and not keep_files:
            _echo("The model has no files of its own under models_dir: nothing is deleted.", as_json=as_json)
        if as_json and not yes:
            base.fail("--json cannot ask for confirmation: add --yes.", ExitCode.WRONG)
        if not yes and not _confirm(f"Remove {name}?"):
            raise typer.Exit(ExitCode.FAILED)
        config_edit.edit(loaded.source, lambda before: config_edit.without_model(before, name))
        reloaded = _reload(config)
        delete(files)
        base.show(
            f"Removed {name}. {reloaded}".rstrip(),
            {"removed": name, "deleted": [str(path) for path in files], "note": reloaded},
            as_json=as_json,
        )


def _largest_memory(devices: DevicesConfig) -> int:
    """Return the bytes of the largest device: a GPU, or RAM."""
    from llm_api_server.devices.host import this_host
    from llm_api_server.devices.inventory import HostInventory

    return max(device.capacity for device in HostInventory(devices, this_host()).devices)


def _model_with_path(available: dict[str, ModelConfig], path: str) -> str | None:
    return next((name for name, entry in available.items() if entry.path == path), None)


def _reload(config: Path | None) -> str:
    """Reload the running server, if there is one; return a sentence on the outcome."""
    from llm_api_server.errors import ControlError
    from llm_api_server.lifecycle.running_server import RunningServer, is_absent

    loaded = base.load(config)
    try:
        RunningServer(loaded.run_dir, loaded.server.drain_timeout).reload()
    except ControlError as error:
        return "" if is_absent(error) else f"The running server has not applied the change: {error}"
    return "The running server has applied the change."


def _confirm(question: str) -> bool:
    """Ask on the terminal; without one, the response is no."""
    if not sys.stdin.isatty():
        typer.echo("Standard input is no terminal to confirm on: add --yes.", err=True)
        return False
    return typer.confirm(question, default=True)


def _echo(text: str, *, as_json: bool) -> None:
    if not as_json:
        typer.echo(text)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


@contextmanager
def _progress(*, as_json: bool) -> Iterator[OnEvent]:
    """Yield a function that prints the events of a download: as JSON lines, or as text with a bar on a terminal."""
    import msgspec

    if as_json:
        yield lambda event: typer.echo(msgspec.json.encode(event).decode())
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty()) as bar:
        yield _DownloadScreen(bar)


class _DownloadScreen:
    """Text of a download: the plan, one bar for all files on a terminal, and the result."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def __call__(self, event: DownloadEvent) -> None:
        from llm_api_server.downloads.download import Downloaded, DownloadProgress, Planned

        match event:
            case Planned():
                typer.echo(_plan_text(event))
                self._task = self._progress.add_task("", total=event.total, completed=event.here)
            case DownloadProgress() if self._task is not None:
                self._progress.update(self._task, completed=event.bytes, description=event.file)
            case Downloaded():
                self._progress.stop()
                typer.echo(
                    "Complete, checksums verified."
                    if event.verified
                    else "Complete by its size; the source gives no checksum."
                )


def _plan_text(plan: Planned) -> str:
    from llm_api_server.formats import file_size

    revision = f" at {plan.revision[:12]}" if plan.revision else ""
    files = "1 file" if len(plan.files) == 1 else f"{len(plan.files)} files"
    note = f" ({plan.note})" if plan.note else ""
    here = f", {file_size(plan.here)} already downloaded" if plan.here else ""
    only = f": {next(iter(plan.files))}" if len(plan.files) == 1 else ""
    return f"{plan.source}{revision}: {files}{note}, {file_size(plan.total)}{here}{only}"
