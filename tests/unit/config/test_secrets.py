"""Keys and header values from files and forms: blank ends are stripped, and what no header can carry is refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from llm_api_server.config.models import Config

Load = Callable[[str], Config]
Problems = Callable[[str], list[str]]

KEY = "sk-0123456789abcdef"
#: Texts with one option each, whose value is replaced; and the option's path.
PLACES = {
    "auth.api_keys[0].key": "auth: {api_keys: [{name: me, key: VALUE}]}",
    "models.available.far.api_key": "models: {available: {far: {path: 'https://example.org', api_key: VALUE}}}",
    "tracing.headers.authorization": "tracing: {headers: {authorization: VALUE}}",
}
BLANK_ENDS = [
    "{}\n",
    "{}\r\n",
    "{}\n\n",
    " {}\t",
    "\ufeff{}",
    "\ufeff{}\r\n",
    "\u200b{}\u200b",
    "\xa0{}\u2060",
    "\x00{}",
]
#: Keys that are refused, and a part of the reason.
UNUSABLE = [
    ("sk-01234\n56789abcdef", "a line break"),
    ("sk-01234\r\nx-admin: 1", "a line break"),
    ("sk-01234\x0056789abcdef", "U+0000"),
    ("sk-01234\ufeff56789abcdef", "U+FEFF ZERO WIDTH NO-BREAK SPACE"),
    ("sk-01234\u200b56789abcdef", "U+200B ZERO WIDTH SPACE"),
    ("sk-01234\u202e56789abcdef", "U+202E RIGHT-TO-LEFT OVERRIDE"),
]
ONLY_KEYS = [
    ("sk-01234 56789abcdef", "a space"),
    ("sk-01234\t56789abcdef", "a tab"),
    (f"Bearer {KEY}", "without 'Bearer'"),
    (f"bearer\t{KEY}", "without 'Bearer'"),
    (f'"{KEY}"', "in quotes"),
    (f"'{KEY}'\n", "in quotes"),
]


def _values(config: Config) -> list[str | None]:
    keys = [entry.key for entry in config.auth.api_keys]
    remote = [model.api_key for model in config.models.available.values()]
    return [*keys, *remote, *config.tracing.headers.values()]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", BLANK_ENDS)
def test_ends_of_a_secret_are_stripped(load: Load, place: str, form: str) -> None:
    text = PLACES[place].replace("VALUE", json.dumps(form.format(KEY)))
    assert _values(load(text)) == [KEY]


@pytest.mark.parametrize("end", ["\n", "\r\n", " \n"])
def test_ends_of_a_secret_from_the_environment_are_stripped(
    load: Load, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setenv("TEAM_KEY", KEY + end)
    assert _values(load(PLACES["auth.api_keys[0].key"].replace("VALUE", '"${TEAM_KEY}"'))) == [KEY]


def test_a_block_of_text_is_a_key_without_its_line_end(load: Load) -> None:
    assert _values(load(f"auth:\n  api_keys:\n    - name: me\n      key: |\n        {KEY}\n")) == [KEY]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("value", "reason"), UNUSABLE)
def test_what_no_header_can_carry_is_refused_with_its_place(
    problems: Problems, place: str, value: str, reason: str
) -> None:
    (problem,) = problems(f"\n{PLACES[place].replace('VALUE', json.dumps(value))}")
    assert problem.startswith(f"config.yaml:2: {place}: ")
    assert reason in problem
    assert "sk-" not in problem


@pytest.mark.parametrize("place", list(PLACES)[:2])
@pytest.mark.parametrize(("value", "reason"), ONLY_KEYS)
def test_what_is_no_key_is_refused_with_its_place(problems: Problems, place: str, value: str, reason: str) -> None:
    (problem,) = problems(f"\n{PLACES[place].replace('VALUE', json.dumps(value))}")
    assert problem.startswith(f"config.yaml:2: {place}: ")
    assert reason in problem
    assert "sk-" not in problem


@pytest.mark.parametrize("place", list(PLACES)[1:])
@pytest.mark.parametrize("value", ["sk-schlüssel-0123", "sk-\u201c0123456789", "sk-新密钥-01234"])
def test_what_this_server_sends_is_ascii(problems: Problems, place: str, value: str) -> None:
    (problem,) = problems(PLACES[place].replace("VALUE", json.dumps(value)))
    assert problem.startswith(f"config.yaml:1: {place}: no header can carry this value: ")


def test_a_key_of_clients_may_have_other_letters(load: Load) -> None:
    assert _values(load(PLACES["auth.api_keys[0].key"].replace("VALUE", "sk-schlüssel-新密钥"))) == [
        "sk-schlüssel-新密钥"
    ]


@pytest.mark.parametrize("value", ["\n", "\ufeff", "\u200b \r\n"])
def test_a_key_of_blanks_is_too_short(problems: Problems, value: str) -> None:
    (problem,) = problems(PLACES["auth.api_keys[0].key"].replace("VALUE", json.dumps(value)))
    assert "at least 8 characters" in problem


def test_keys_that_differ_in_their_ends_are_the_same_key(problems: Problems) -> None:
    (problem,) = problems(f'auth: {{api_keys: [{{name: a, key: {KEY}}}, {{name: b, key: "{KEY}\\n"}}]}}')
    assert "is the key of auth.api_keys[0] already" in problem


@pytest.mark.parametrize("prefix", ["sha256:", "SHA256:", "Sha256:"])
def test_a_digest_is_read_in_any_case(load: Load, prefix: str) -> None:
    (entry,) = load(f"auth: {{api_keys: [{{name: me, key: '{prefix}{'AB' * 32}'}}]}}").auth.api_keys
    assert entry.is_hashed
    assert entry.key == f"sha256:{'ab' * 32}"


@pytest.mark.parametrize("name", ["x y", "x:", "x\\ny", "ü", ""])
def test_a_header_name_that_is_no_token_is_refused(problems: Problems, name: str) -> None:
    (problem,) = problems(f'tracing: {{headers: {{"{name}": v}}}}')
    assert "is no name of a header" in problem
