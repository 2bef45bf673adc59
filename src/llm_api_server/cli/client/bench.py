"""Command `bench`: a short load run against the running server, measured as a client on this machine."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_api_server import formats
from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, JsonOption, KeyOption, ModelArgument, UrlOption
from llm_api_server.redaction import one_line
from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from llm_api_server.cli.client.load_run import LoadResult

_TTFT_PERCENTILES = (50, 95, 99)
_ITL_PERCENTILES = (50, 95)


def bench(
    *,
    model: ModelArgument = None,
    requests: Annotated[int, typer.Option(min=1, max=10_000, metavar="N", help="Total number of requests.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, max=256, metavar="C", help="Concurrent requests.")] = 8,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="P", help="Approximate tokens per prompt.")
    ] = 128,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="M", help="Max tokens per response; models may stop earlier.")
    ] = 64,
    as_json: JsonOption = False,
    url: UrlOption = None,
    key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Measure throughput and latency with a short run of streaming chat requests.

    Prompts are random and all different, so no prefix cache helps. TTFT is the time from connecting to the first text,
    including time in the queue; inter-token latency is the time between two chunks with text. One warm-up request loads
    the model and is not counted. All requests count toward the limits and the usage of the key.
    """
    from llm_api_server.cli.client import api_client, load_run

    client, name = api_client.connect(config, url, key, model)
    load = load_run.LoadRun(name, requests, min(concurrency, requests), prompt_tokens, max_tokens)

    def show_progress(done: int) -> None:
        if sys.stderr.isatty():
            typer.echo(f"\r{done} of {load.requests} requests", nl=done == load.requests, err=True)

    with base.errors():
        typer.echo(f"Warming up {load.model} ...", err=True)
        result = load_run.run(client, load, show_progress)
    base.show(as_text(client.url, result), json_content(client.url, result), as_json=as_json)
    if result.errors:
        raise typer.Exit(ExitCode.FAILED)


def as_text(url: str, result: LoadResult) -> str:
    """Return the parameters of the run, its figures, and why requests failed."""
    load, figures = result.load, _figures(result)
    prompt = f"{figures['prompt_tokens_mean']:.0f}" if result.samples else f"about {load.prompt_tokens}"
    head = [
        f"{one_line(load.model)} at {url}: {load.requests} streaming chat requests, {load.concurrency} at a time.",
        f"Prompts of {prompt} tokens, all different; responses of at most {load.max_tokens} tokens"
        + (f", {figures['completion_tokens_mean']:.0f} on average." if result.samples else "."),
        f"One warm-up request ({result.warm_up_seconds:.1f} s) is not counted.",
    ]
    fields = {
        "requests": f"{figures['requests_ok']} ok, {figures['requests_failed']} failed, in {result.seconds:.1f} s",
        "requests/s": f"{figures['requests_per_second']:.2f}",
        "output tokens/s": f"{figures['output_tokens_per_second']:.1f}",
        "TTFT": _as_milliseconds(figures["ttft_seconds"]),
        "inter-token latency": _as_milliseconds(figures["inter_token_latency_seconds"]),
    }
    failures = [f"{count} failed: {one_line(message)}" for message, count in result.errors.items()]
    return "\n".join([*head, "", formats.as_lines(fields), *([""] if failures else []), *failures])


def json_content(url: str, result: LoadResult) -> dict[str, Any]:
    import msgspec

    return {
        "url": url,
        **msgspec.to_builtins(result.load),
        "warm_up_seconds": result.warm_up_seconds,
        "seconds": result.seconds,
        **_figures(result),
        "errors": result.errors,
    }


def _figures(result: LoadResult) -> dict[str, Any]:
    """Return totals, rates and percentiles. Rates count the requests that succeeded."""
    samples = result.samples
    tokens = sum(sample.usage.completion_tokens for sample in samples)
    count = max(1, len(samples))
    return {
        "requests_ok": len(samples),
        "requests_failed": sum(result.errors.values()),
        "requests_per_second": len(samples) / result.seconds,
        "output_tokens_per_second": tokens / result.seconds,
        "prompt_tokens_mean": sum(sample.usage.prompt_tokens for sample in samples) / count,
        "completion_tokens_mean": tokens / count,
        "ttft_seconds": _percentiles([s.first_text for s in samples if s.first_text is not None], _TTFT_PERCENTILES),
        "inter_token_latency_seconds": _percentiles([gap for s in samples for gap in s.gaps], _ITL_PERCENTILES),
    }


def _percentiles(values: Sequence[float], percents: Sequence[int]) -> dict[str, float] | None:
    """Return percentiles by nearest rank, so each is a measured value; None without values."""
    if not values:
        return None
    ranked = sorted(values)
    return {f"p{percent}": ranked[math.ceil(percent / 100 * len(ranked)) - 1] for percent in percents}


def _as_milliseconds(percentiles: dict[str, float] | None) -> str:
    if percentiles is None:
        return "-"
    return ", ".join(f"{name} {_milliseconds(seconds)}" for name, seconds in percentiles.items())


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.{0 if seconds >= 0.1 else 1}f} ms"  # noqa: PLR2004 - three digits are enough
