"""Values that YAML 1.1 reads otherwise than people: refused with their line, never taken for something else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llm_api_server.config.models import Config

Load = Callable[[str], Config]
Problems = Callable[[str], list[str]]

_BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
_MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("server: {port: 010000}", 4096),
        ("server: {port: +0777}", 511),
        ("server: {port: 1:30}", 90),
        ("models: {unload_timeout: 1:30}", 90),
        ("models: {unload_timeout: 1:30.5}", 90.5),
        ("models: {available: {m: {path: x, engine_args: {a: 1:30:00}}}}", 5400),
        ("models: {available: {m: {path: x, env: {UMASK: 0022}}}}", 18),
        ("devices: {gpus: [00]}", 0),
    ],
)
def test_a_number_in_another_base_is_a_problem(problems: Problems, line: str, value: float) -> None:
    (problem,) = problems(f"\n{line}\n")
    assert problem.startswith("config.yaml:2: ")
    assert f" as the number {value}; write that number, or put text in quotes" in problem


@pytest.mark.parametrize(
    ("line", "port"), [("0", 0), ("8050", 8050), ("0x1F90", 8080), ("8_050", 8050), ("'8050'", 8050)]
)
def test_other_numbers_are_read(load: Load, line: str, port: int) -> None:
    assert load(f"server: {{port: {line}}}\n").server.port == port


@pytest.mark.parametrize(
    "line",
    [
        "server: {port: true}",
        "server: {workers: on}",
        "server: {timeout: yes}",
        "models: {unload_timeout: no}",
        "logging: {retention: true}",
        "devices: {gpus: [0, true]}",
        "devices: {memory: false}",
        "auth: {api_keys: [{key: sk-0123456789abcdef, name: me, priority: true}]}",
        "auth: {api_keys: [{key: sk-0123456789abcdef, name: me, expires_at: true}]}",
        "models: {available: {m: {path: x, max_tokens: true}}}",
    ],
)
def test_a_boolean_is_no_number(problems: Problems, line: str) -> None:
    (problem,) = problems(f"\n{line}\n")
    assert problem.startswith("config.yaml:2: ")
    assert "must not be true or false" in problem or "not a number" in problem


@pytest.mark.parametrize(
    "line", ["models: {available: {m: {path: x, engine_args: {a: true}}}}", "auth: {tokens: false}"]
)
def test_a_boolean_is_read_where_it_may_be(load: Load, line: str) -> None:
    load(line)


@pytest.mark.parametrize(
    ("time", "reason"),
    [
        ("2027-13-01", "not a date or time that exists"),
        ("2027-02-30", "not a date or time that exists"),
        ("2027-01-31T25:00:00Z", "not a date or time that exists"),
        ("2027", "not a number"),
        ("1.8e+9", "not a number"),
    ],
)
def test_a_date_that_does_not_exist_is_a_problem(problems: Problems, time: str, reason: str) -> None:
    (problem,) = problems(f"\nauth: {{api_keys: [{{key: sk-0123456789abcdef, name: me, expires_at: {time}}}]}}\n")
    assert problem.startswith("config.yaml:2: auth.api_keys[0].expires_at: ")
    assert reason in problem


@pytest.mark.parametrize(
    "text",
    [
        _BOMB,
        _MERGE_BOMB,
        _BOMB.replace(" [", " {k: [").replace("]\n", "]}\n").replace("k: [*", "k: [x, *"),
        f"server: {{a: 1}}\n{_BOMB}",
    ],
)
def test_aliases_that_multiply_are_a_problem(problems: Problems, text: str) -> None:
    (problem,) = problems(text)
    assert "not valid YAML: aliases repeat more than 100,000 values" in problem


def test_aliases_may_be_used(load: Load) -> None:
    entries = ", ".join(f"m{n}: {{<<: *base, path: x{n}}}" for n in range(200))
    config = load(f"models: {{available: {{base: &base {{path: x, max_tokens: 64}}, {entries}}}}}\n")
    assert config.models.available["m199"].max_tokens == 64
