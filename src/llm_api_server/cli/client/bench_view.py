"""What `llm-api-server bench` measured, as lines or JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from llm_api_server import formats
from llm_api_server.cli.client.load_run import Run
from llm_api_server.redaction import one_line

_TTFT = (50, 95, 99)
_ITL = (50, 95)


def as_text(url: str, run: Run) -> str:
    """What was done, what came of it, and why requests failed."""
    load, sums = run.load, _sums(run)
    prompt = f"{sums['prompt_tokens_mean']:.0f}" if run.samples else f"about {load.prompt_tokens}"
    head = [
        f"{one_line(load.model)} at {url}: {load.requests} streaming chat requests, {load.concurrency} at a time.",
        f"Prompts of {prompt} tokens, all different; answers of at most {load.max_tokens} tokens"
        + (f", {sums['completion_tokens_mean']:.0f} on average." if run.samples else "."),
        f"One warm-up request ({run.warm_up_seconds:.1f} s) is not counted.",
    ]
    fields = {
        "requests": f"{sums['requests_ok']} ok, {sums['requests_failed']} failed, in {run.seconds:.1f} s",
        "requests/s": f"{sums['requests_per_second']:.2f}",
        "output tokens/s": f"{sums['output_tokens_per_second']:.1f}",
        "TTFT": _as_milliseconds(sums["ttft_seconds"]),
        "inter-token latency": _as_milliseconds(sums["inter_token_latency_seconds"]),
    }
    failures = [f"{count} failed: {one_line(message)}" for message, count in run.errors.items()]
    return "\n".join([*head, "", formats.as_lines(fields), *([""] if failures else []), *failures])


def as_json(url: str, run: Run) -> str:
    content = {
        "url": url,
        **msgspec.to_builtins(run.load),
        "warm_up_seconds": run.warm_up_seconds,
        "seconds": run.seconds,
        **_sums(run),
        "errors": run.errors,
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()


def _sums(run: Run) -> dict[str, Any]:
    """Rates are those of the requests that succeeded."""
    samples = run.samples
    tokens = sum(sample.usage.completion_tokens for sample in samples)
    count = max(1, len(samples))
    return {
        "requests_ok": len(samples),
        "requests_failed": sum(run.errors.values()),
        "requests_per_second": len(samples) / run.seconds,
        "output_tokens_per_second": tokens / run.seconds,
        "prompt_tokens_mean": sum(sample.usage.prompt_tokens for sample in samples) / count,
        "completion_tokens_mean": tokens / count,
        "ttft_seconds": _percentiles([s.first_text for s in samples if s.first_text is not None], _TTFT),
        "inter_token_latency_seconds": _percentiles([gap for sample in samples for gap in sample.gaps], _ITL),
    }


def _percentiles(values: Sequence[float], which: Sequence[int]) -> dict[str, float] | None:
    """By nearest rank: each is a value that was measured. None without values."""
    if not values:
        return None
    ranked = sorted(values)
    return {f"p{share}": ranked[math.ceil(share / 100 * len(ranked)) - 1] for share in which}


def _as_milliseconds(percentiles: dict[str, float] | None) -> str:
    if percentiles is None:
        return "-"
    return ", ".join(f"{name} {_milliseconds(seconds)}" for name, seconds in percentiles.items())


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.{0 if seconds >= 0.1 else 1}f} ms"  # noqa: PLR2004 - three digits are enough
