"""Command `llm-api-server`: the tree of its commands.

Commands import what they need when they run, so `--help` is fast. docs/commands.md is generated from them.
"""

from __future__ import annotations

import typer

from llm_api_server.cli import base, doctor, keys, logs, model_files, models, server, status, usage
from llm_api_server.cli.client import bench, chat

app = typer.Typer(
    name="llm-api-server",
    help="One OpenAI-compatible endpoint for vLLM, llama.cpp and remote models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: list[str] | None = None) -> None:
    app(arguments)


@app.callback()
def prepare() -> None:
    """Print errors as text, unless the command has the option `--json`."""
    base.set_json(False)


for command in (
    server.serve, server.stop, server.restart, server.reload, server.check_config, server.init, server.version,
    status.status, logs.logs, doctor.doctor, chat.chat, bench.bench, usage.usage,
):  # fmt: skip
    app.command()(command)
app.add_typer(server.config_app, name="config")
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
models.app.command("pull")(model_files.pull)
models.app.command("rm")(model_files.remove)
