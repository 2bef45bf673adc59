"""Measurements of this server alone: what many keys, many models and more workers cost, and the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench import idle
from bench.speed import modes
from bench.speed.contenders import Engine, ours
from bench.speed.modes import Figures, run
from bench.speed.processes import GATEWAY_CORE, LOAD_CORE

_CONNECTIONS = 64
_NOBODY = Engine(0, Path())


def _sized(keys: int, models: int) -> Callable[[Path, float], Figures]:
    def measure(folder: Path, seconds: float) -> Figures:
        made = [f"sk-bench-{number:035}" for number in range(keys)]
        used = made[:: max(1, keys // _CONNECTIONS)][:_CONNECTIONS]
        with ours(_NOBODY, folder, keys=made, models=models) as running:
            return run(modes.MODES["plain-64"], running, folder, seconds, used)

    return measure


def _workers(count: int) -> Callable[[Path, float], Figures]:
    """On all cores, which engine and load share: CPU per request is what can be compared."""

    def measure(folder: Path, seconds: float) -> Figures:
        cores = str(GATEWAY_CORE) if count == 1 else f"{LOAD_CORE},{GATEWAY_CORE}"
        with ours(_NOBODY, folder, workers=count, core=cores) as running:
            return run(modes.MODES["plain-64"], running, folder, seconds)

    return measure


def _start(folder: Path, seconds: float) -> Figures:  # noqa: ARG001 - all are called alike
    seen = idle.measure(1)
    return {
        "start_s": seen.start_seconds,
        "idle_memory_mb": sum(process.pss for process in seen.processes) / 1e6,
    }


MODES: dict[str, dict[str, Callable[[Path, float], Figures]]] = {
    "keys": {"10 keys": _sized(10, 1), "1,000 keys": _sized(1000, 1), "100,000 keys": _sized(100_000, 1)},
    "models": {"1 model": _sized(10, 1), "100 models": _sized(10, 100), "1,000 models": _sized(10, 1000)},
    "many": {"10 keys, 1 model": _sized(10, 1), "100,000 keys, 1,000 models": _sized(100_000, 1000)},
    "workers": {"1 worker": _workers(1), "2 workers": _workers(2)},
    "start": {"ours": _start},
}
