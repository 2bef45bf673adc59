"""`llm-api-server bench`: a short load run against the running server, as a client on this machine sees it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, JsonOption, KeyOption, ModelArgument, UrlOption
from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from llm_api_server.cli.client.api_client import ApiClient
    from llm_api_server.cli.client.load_run import LoadRun, Run


def bench(
    *,
    model: ModelArgument = None,
    requests: Annotated[int, typer.Option(min=1, max=10_000, metavar="N", help="Requests in all.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, max=256, metavar="C", help="Requests at a time.")] = 8,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="P", help="About how many tokens a prompt has.")
    ] = 128,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="M", help="Most tokens of an answer; models may end earlier.")
    ] = 64,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Measure throughput and latency with a short run of streaming chat requests.

    Prompts are random and differ from each other, so that no prefix cache helps. TTFT is the time from connecting to
    the first text, the queue included; inter-token latency is that between two chunks with text. One request before
    the run loads the model and is not counted. Requests count for the key like any others.
    """
    from llm_api_server.cli.client import api_client, bench_view
    from llm_api_server.cli.client.load_run import LoadRun

    client, name = api_client.reach(config, url, key, model)
    load = LoadRun(name, requests, min(concurrency, requests), prompt_tokens, max_tokens)
    with base.errors():
        run = _run(client, load)
    typer.echo(bench_view.as_json(client.url, run) if as_json else bench_view.as_text(client.url, run))
    if run.errors:
        raise typer.Exit(ExitCode.FAILED)


def _run(client: ApiClient, load: LoadRun) -> Run:
    from llm_api_server.cli.client import load_run

    def show(done: int) -> None:
        if sys.stderr.isatty():
            typer.echo(f"\r{done} of {load.requests} requests", nl=done == load.requests, err=True)

    typer.echo(f"Warming up {load.model} ...", err=True)
    return load_run.run(client, load, show)
