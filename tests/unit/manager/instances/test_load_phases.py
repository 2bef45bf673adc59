"""Phases of a load from pieces of log."""

from __future__ import annotations

import pytest

from llm_api_server.manager.instances.load_phases import LoadPhases, describe

MARKS = [("imports", "version"), ("weights", "Loading weights took"), ("kv_cache", "KV cache size")]


def test_each_phase_ends_with_its_line() -> None:
    phases = LoadPhases(MARKS, 10.0)
    assert phases.current == "process"
    phases.on_started(11.0)
    assert phases.current == "imports"
    phases.on_log("noise\nversion 1\n", 14.0)
    phases.on_log("Loading weights took 1 s\n", 15.0)
    phases.on_log("KV cache size: 3\n", 17.0)
    phases.on_ready(18.0)
    assert phases.seconds == {"process": 1, "imports": 3, "weights": 1, "kv_cache": 2, "warm_up": 1}


def test_lines_in_pieces_are_one() -> None:
    phases = LoadPhases(MARKS, 0.0)
    phases.on_started(0.0)
    phases.on_log("vers", 1.0)
    assert phases.current == "imports"
    phases.on_log("ion 1\n", 2.0)
    assert phases.seconds["imports"] == 2.0


def test_a_line_that_never_comes_counts_to_the_next_phase() -> None:
    phases = LoadPhases(MARKS, 0.0)
    phases.on_started(0.0)
    phases.on_log("KV cache size: 3\n", 5.0)
    phases.on_ready(6.0)
    assert phases.seconds == {"process": 0, "kv_cache": 5, "warm_up": 1}
    assert sum(phases.seconds.values()) == pytest.approx(6.0)


def test_without_marks_there_are_two() -> None:
    phases = LoadPhases([], 0.0)
    phases.on_started(0.25)
    phases.on_log("anything\n", 1.0)
    phases.on_ready(2.0)
    assert describe(phases.seconds) == "process 0.2 s, warm up 1.8 s"
