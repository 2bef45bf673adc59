"""Targets of this server, per core, with everything enabled; checked after every run of `make bench`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.speed.special import FEW, MANY

_ROUTERS = ("vllm-router", "sglang-router")
_Seen = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]


@dataclass(frozen=True)
class Target:
    """One target: `seen` is a ratio or a figure, `wanted` its bound in words."""

    what: str
    seen: float
    wanted: str
    is_held: bool


class _Medians:
    def __init__(self, results: _Seen, mode: str) -> None:
        self._seen = results.get(mode, {})

    def of(self, figure: str, *contenders: str) -> list[float]:
        """Return the value, or None if it was not measured."""
        found = [self._seen[name][figure] for name in contenders if figure in self._seen.get(name, {})]
        return [statistics.median(rounds) for rounds in found]

    def ratios(self, figure: str, contenders: Sequence[str], *, best: bool = True) -> Iterator[float]:
        """Return the ratio of ours to the best of the others (highest or lowest), or None if one is missing."""
        ours, others = self.of(figure, "ours"), self.of(figure, *contenders)
        if ours and others:
            yield ours[0] / (max(others) if best else min(others))

    def added(self, figure: str) -> Iterator[float]:
        """Return what ours adds to the engine alone."""
        ours, direct = self.of(figure, "ours"), self.of(figure, "direct")
        if ours and direct:
            yield ours[0] - direct[0]


def check(results: _Seen) -> Iterator[Target]:
    """Return the targets whose figures were all measured."""
    yield from _of_rates(results)
    yield from _of_200_streams(_Medians(results, "paced-200"))
    crowd, many, start = (_Medians(results, mode) for mode in ("paced-1000", "many", "start"))
    for seen in crowd.of("errors", "ours"):
        yield _most("1,000 streams: errors", seen, 0)
    for seen in crowd.of("transit_p99_ms", "ours"):
        yield _most("1,000 streams: ms of a chunk's way, p99", seen, 60)
    for seen in crowd.of("worker_memory_mb", "ours"):
        yield _most("1,000 streams: MB of the gateway", seen, 100)
    sizes = many.of("requests_per_s", MANY, FEW)
    if len(sizes) == len((MANY, FEW)):
        yield _least(f"requests/s with {MANY}, to {FEW}", sizes[0] / sizes[1], 0.95)
    for seen in start.of("start_s", "ours"):
        yield _most("seconds to readiness", seen, 1.5)
    for seen in start.of("idle_memory_mb", "ours"):
        yield _most("MB when idle", seen, 120)


def _of_rates(results: _Seen) -> Iterator[Target]:
    for mode, figure, what, bounds in (
        ("plain-64", "requests_per_s", "requests/s", {"the better router": 2.0, "litellm": 300.0, "nginx": 0.35}),
        ("streams", "requests_per_s", "streamed answers/s", {"the better router": 3.0, "nginx": 0.5}),
        ("paced-1000", "chunks_per_s", "1,000 streams: chunks/s", {"nginx": 0.85}),
    ):
        for peer, least in bounds.items():
            peers = _ROUTERS if peer == "the better router" else (peer,)
            for ratio in _Medians(results, mode).ratios(figure, peers):
                yield _least(f"{what}, to {peer}", ratio, least)


def _of_200_streams(medians: _Medians) -> Iterator[Target]:
    for percent, most in (("p50", 1.0), ("p99", 5.0)):
        for added in medians.added(f"first_chunk_{percent}_ms"):
            yield _most(f"200 streams: added ms to the first chunk, {percent}", added, most)
    for ratio in medians.ratios("cpu_us_per_chunk", _ROUTERS, best=False):
        yield _most("200 streams: CPU per chunk, to the better router", ratio, 1.0)
    for ratio in medians.ratios("cpu_us_per_chunk", ("nginx",)):
        yield _most("200 streams: CPU per chunk, to nginx", ratio, 1.8)


def _least(what: str, seen: float, wanted: float) -> Target:
    return Target(what, seen, f"at least {wanted:g}", seen >= wanted)


def _most(what: str, seen: float, wanted: float) -> Target:
    return Target(what, seen, f"at most {wanted:g}", seen <= wanted)
