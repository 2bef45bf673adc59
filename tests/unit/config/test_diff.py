"""Differences between two configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llm_api_server.config.change import Change
from llm_api_server.config.diff import NEEDS_RESTART, diff, without_restart
from llm_api_server.config.models import Config
from llm_api_server.lifecycle.config_handover import digest, pack, unpack

BASE = """
server: {port: 8051, timeout: 60}
auth:
  api_keys:
    - {key: sk-0123456789, name: one, permissions: [chat], networks: [10.0.0.0/8], expires_at: 2030-01-01T00:00:00Z}
    - {key: sk-9876543210, name: two}
devices: {memory: 4GiB}
models:
  default: a
  available:
    a: {path: a.gguf, aliases: [x], engine_args: {seed: 1}}
    b: {path: https://example.com/v1, api_key: sk-remote-secret}
"""


def config(text: str = BASE) -> Config:
    return Config.model_validate(yaml.safe_load(text)).model_copy(update={"source": Path("/srv/config.yaml")})


def after(before: str, now: str) -> list[Change]:
    assert before in BASE
    return diff(config(), config(BASE.replace(before, now)))


def test_nothing_changes_between_equals() -> None:
    assert diff(config(), config()) == []


def test_travels_unchanged() -> None:
    packed = pack(config())
    assert unpack(packed) == config()
    assert pack(unpack(packed)) == packed
    assert digest(packed) != digest(pack(config(BASE.replace("60", "61"))))


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("timeout: 60", "timeout: 61", [Change("server.timeout", "60.0", "61.0", "now")]),
        ("port: 8051", "port: 1", [Change("server.port", "8051", "1", "restart")]),
        ("4GiB", "5GiB", [Change("devices.memory", str(4 << 30), str(5 << 30), "restart")]),
        ("a.gguf", "c.gguf", [Change("models.available.a.path", "a.gguf", "c.gguf", "model")]),
        ("[x]", "[x, y]", [Change("models.available.a.aliases", "['x']", "['x', 'y']", "now")]),
        ("seed: 1", "seed: 2", [Change("models.available.a.engine_args.seed", "1", "2", "model")]),
        ("[chat]", "[all]", [Change("auth.api_keys.one.permissions", "['chat']", "['all']", "now")]),
        ("sk-0123456789", "sk-another-one", [Change("auth.api_keys.one.key", "(hidden)", "(hidden)", "now")]),
        ("sk-remote-secret", "sk-else", [Change("models.available.b.api_key", "(hidden)", "(hidden)", "model")]),
    ],
)
def test_one_change(before: str, now: str, expected: list[Change]) -> None:
    assert after(before, now) == expected


def test_added_and_removed_entries_are_reported_without_secrets() -> None:
    changes = after("{key: sk-9876543210, name: two}", "{key: sk-5555555555, name: three}")
    assert [(change.path, change.before is None, change.after is None) for change in changes] == [
        ("auth.api_keys.two", False, True),
        ("auth.api_keys.three", True, False),
    ]
    assert "sk-" not in "".join(map(str, changes))


def test_options_that_need_a_restart_keep_their_value() -> None:
    changed = config(BASE.replace("8051", "1").replace("4GiB", "5GiB").replace("timeout: 60", "timeout: 61"))
    kept = without_restart(config(), changed)
    assert [change.path for change in diff(config(), kept)] == ["server.timeout"]
    assert {change.effect for change in diff(kept, changed)} == {"restart"}


def test_every_option_that_needs_a_restart_exists() -> None:
    for path in NEEDS_RESTART:
        section, _, name = path.partition(".")
        assert not name or name in type(getattr(config(), section)).model_fields
