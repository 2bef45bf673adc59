"""Measures the server beside nginx and its peers: `make bench`, or `python -m bench.speed`.

ONLY selects modes and contenders by name (`ONLY=ours,nginx,plain-64`), SECONDS is the time of one run, ROUNDS the
number of
rounds. The output has medians with the lowest and the highest value of the rounds; the last line is one
JSON object. Absolute figures mean little on a shared machine: ratios are of medians within this run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench.speed import chart, special
from bench.speed.contenders import CONTENDERS, NotInstalled, engine
from bench.speed.modes import MODES, Figures, run
from bench.speed.processes import CACHE, GATEWAY_CORE, LOAD_CORE
from bench.speed.targets import check

#: Values of all rounds by mode, contender and figure.
Results = dict[str, dict[str, dict[str, list[float]]]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    parser.add_argument("--only", default=os.environ.get("ONLY", ""), help="names, with commas between them")
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("SECONDS") or 5))
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("ROUNDS") or 3))
    parser.add_argument("--out", type=Path, default=CACHE)
    arguments = parser.parse_args()
    every = [*MODES, *special.MODES]
    wanted = {name for name in arguments.only.split(",") if name}
    if unknown := wanted - {*every, *CONTENDERS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join([*every, *CONTENDERS])}")
    modes = [name for name in every if name in wanted] or every
    contenders = [name for name in CONTENDERS if name in wanted] or list(CONTENDERS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    results: Results = {}
    try:
        for number in range(arguments.rounds):
            turn(results, modes, contenders, arguments.seconds, number + 1)
    finally:
        report(results, arguments.out, arguments.seconds, arguments.rounds)
    return 0


def turn(results: Results, modes: list[str], contenders: list[str], seconds: float, number: int) -> None:
    """Run one round: each contender runs all modes."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with engine(folder) as target:
            for contender in contenders:
                if not any(mode in MODES for mode in modes):
                    break
                try:
                    with CONTENDERS[contender](target, folder) as running:
                        for mode in modes:
                            if mode in MODES and contender not in MODES[mode].skip:
                                note(results, mode, contender, number, run(MODES[mode], running, folder, seconds))
                                time.sleep(0.2)
                except (NotInstalled, RuntimeError) as missing:
                    print(f"{contender}: {missing}", file=sys.stderr)
        for mode in modes:
            if mode in special.MODES and "ours" in contenders:
                for what, figures in special.MODES[mode][1](folder, seconds).items():
                    note(results, mode, what, number, figures)


def note(results: Results, mode: str, contender: str, number: int, figures: Figures) -> None:
    kept = results.setdefault(mode, {}).setdefault(contender, {})
    for name, value in figures.items():
        kept.setdefault(name, []).append(value)
    shown = "  ".join(f"{name} {value:,.{2 if value < 100 else 0}f}" for name, value in figures.items() if value)
    print(f"{number} {mode:11} {contender:14} {shown}", flush=True)


def report(results: Results, out: Path, seconds: float, rounds: int) -> None:
    summary: dict[str, dict[str, dict[str, float | None]]] = {}
    for mode, contenders in results.items():
        print(f"\n{mode}: {MODES[mode].what if mode in MODES else special.MODES[mode][0]}")
        names = list(dict.fromkeys(name for figures in contenders.values() for name in figures))
        for name in names:
            medians = {who: statistics.median(figures[name]) for who, figures in contenders.items() if name in figures}
            ours = medians.get("ours")
            line = {who: value for who, value in medians.items() if value or who == "ours"}
            entry: dict[str, float | None] = {who: _rounded(value) for who, value in medians.items()}
            shown = []
            for who, value in line.items():
                spread = contenders[who][name]
                ratio = ours / value if ours is not None and who != "ours" and value else None
                if ratio is not None:
                    entry[f"ours/{who}"] = _rounded(ratio)
                shown.append(
                    f"{who} {_text(value)} ({_text(min(spread))}-{_text(max(spread))})"
                    + (f" x{_text(ratio)}" if ratio is not None else "")
                )
            summary.setdefault(mode, {})[name] = entry
            if shown:
                print(f"  {name:22} {'   '.join(shown)}")
    targets = list(check(results))
    if targets:
        print("\ntargets: ours against what is wanted, in medians of this run")
    for target in targets:
        print(
            f"  {'held  ' if target.is_held else 'MISSED'} {target.what}: {_text(target.seen)}, wanted {target.wanted}"
        )
    content = {
        "bench": "speed",
        "machine": machine(),
        "seconds": seconds,
        "rounds": rounds,
        "figures": summary,
        "targets": [asdict(target) for target in targets],
    }
    (out / "speed.json").write_text(json.dumps({**content, "rounds_seen": results}, indent=1))
    (out / "speed.svg").write_text(chart.draw(results, machine()))
    print(f"\nwritten: {out / 'speed.json'} and speed.svg")
    print(json.dumps(content))


def machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    place = f"load and engine on core {LOAD_CORE}, what is measured on core {GATEWAY_CORE}"
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}; {place}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _text(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
