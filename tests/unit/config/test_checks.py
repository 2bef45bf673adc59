"""Problems between options, and warnings."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_api_server.config.checks import config_warnings, is_loopback
from llm_api_server.config.models import Config
from llm_api_server.config.secrets import is_weak_secret

SECRET = "dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"
KEYS = "auth: {api_keys: [{key: sk-0123456789abcdef, name: me}]}\n"

#: The keys and the model of the project's first published configuration.
PUBLISHED = """
server: {host: "0.0.0.0"}
auth:
  secret_key: "your-secret-key"
  api_keys:
    - {key: "sk-myapikey123456789", name: "default"}
    - {key: "sk-restricted987654321", name: "restricted", permissions: ["chat"]}
models:
  available:
    DeepSeek-R1-0528-Qwen3-8B: {path: "/path/to/model"}
"""

Load = Callable[[str], Config]
Problems = Callable[[str], list[str]]


def test_published_keys_secrets_and_paths_are_warned_about(load: Load) -> None:
    warnings = config_warnings(load(PUBLISHED))
    assert sum("'default'" in text or "'restricted'" in text for text in warnings) == 2
    assert any("/auth/token is off" in text for text in warnings)
    assert any("/path/to/model does not exist" in text for text in warnings)
    assert not any("sk-" in text for text in warnings)


def test_example_keys_on_loopback_are_not_warned_about(load: Load) -> None:
    warnings = config_warnings(load(PUBLISHED.replace("0.0.0.0", "127.0.0.1")))
    assert not any("'default'" in text for text in warnings)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_an_open_address_without_keys_is_refused(load: Load, problems: Problems, host: str) -> None:
    text = f"server: {{host: '{host}'}}\nauth: {{enabled: false}}\n"
    (problem,) = problems(text)
    assert problem.startswith("config.yaml:2: auth.enabled: ")
    assert "server.allow_unauthenticated" in problem
    allowed = load(text.replace("}\nauth", ", allow_unauthenticated: true}\nauth"))
    assert any("anyone" in warning for warning in config_warnings(allowed))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_keys(load: Load, host: str) -> None:
    assert not load(f"server: {{host: '{host}'}}\nauth: {{enabled: false}}\n").auth.enabled
    assert is_loopback(host)


@pytest.mark.parametrize("secret", [None, "your-secret-key", "change-me", "too-small", "a" * 64, "0123" * 3])
def test_tokens_need_a_real_secret(load: Load, problems: Problems, secret: str | None) -> None:
    line = f", secret_key: {secret!r}" if secret else ""
    (problem,) = problems(KEYS.replace("{api", "{tokens: true" + line + ", api"))
    assert "auth.secret_key" in problem
    assert secret is None or secret not in problem
    assert is_weak_secret(secret)
    unset = KEYS.replace("{api", f"{{secret_key: {secret!r}, api" if secret else "{api")
    assert not load(unset).auth.are_tokens_on


@pytest.mark.parametrize(("tokens", "are_on"), [("null", True), ("true", True), ("false", False)])
def test_a_real_secret_turns_tokens_on_unless_disabled(load: Load, tokens: str, are_on: bool) -> None:
    config = load(KEYS.replace("{api", f"{{secret_key: {SECRET}, tokens: {tokens}, api"))
    assert config.auth.are_tokens_on is are_on
    assert not any("secret" in warning for warning in config_warnings(config))


def test_names_of_keys_and_models_are_unique(problems: Problems) -> None:
    found = problems(
        """
auth:
  api_keys:
    - {key: sk-0123456789abcdef, name: a}
    - {key: sk-1123456789abcdef, name: a}
    - {key: sk-0123456789abcdef, name: c}
models:
  available:
    one: {path: a, aliases: [two, x], adapters: {one: l, lora: l}}
    two: {path: b, aliases: [x, lora], adapters: {x: l, fine: l}}
""",
    )
    assert [problem.split(": ")[1] for problem in found] == [
        "auth.api_keys[1].name",
        "auth.api_keys[2].key",
        "models.available.one.aliases[0]",
        "models.available.one.adapters.one",
        "models.available.two.aliases[0]",
        "models.available.two.aliases[1]",
        "models.available.two.adapters.x",
    ]
    assert found[-2].endswith("'lora' is an adapter of 'one' already")
    assert found[-1].endswith("'x' is an alias of 'one' already")


def test_a_default_may_be_an_alias(load: Load) -> None:
    assert load(KEYS + "models: {default: b, available: {a: {path: a.gguf, aliases: [b]}}}\n").models.default == "b"


def test_a_default_and_a_key_may_name_an_adapter(load: Load) -> None:
    text = KEYS.replace("name: me", "name: me, models: [b]")
    config = load(text + "models: {default: b, available: {a: {path: org/a, adapters: {b: https://x.test/v1}}}}\n")
    assert config.models.default == "b"
    assert [line for line in config_warnings(config) if "matches no model" in line] == []
    assert any("its adapter 'b', does not exist" in line for line in config_warnings(config))


def test_patterns_without_a_model_and_missing_paths_are_warned_about(load: Load, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "there.gguf").touch()
    config = load(
        KEYS.replace("name: me", "name: me, models: [qwen*]")
        + "models: {available: {a: {path: there.gguf}, b: {path: org/name}, c: {path: 'https://h/v1'},"
        " d: {path: no.gguf}, e: {path: there.gguf, mmproj: eyes.gguf}}}\n"
        "server: {cors_origins: ['*', 'https://a.example', 'https://b/c']}\n"
    )
    warnings = config_warnings(config)
    assert [re.findall(r"'([^']+)'", warning)[-1] for warning in warnings] == ["https://b/c", "qwen*", "d", "e"]


def test_a_run_directory_too_long_for_sockets_is_refused(problems: Problems) -> None:
    (problem,) = problems(KEYS + f"server: {{run_dir: /{'a' * 80}}}\n")
    assert "server.run_dir" in problem
    assert "unix sockets" in problem


@pytest.mark.parametrize(
    "options",
    [
        "sleep: true, adapters: {legal: adapters/legal}",
        "sleep: true, adapters: {a: x, b: y}",
        "sleep: true, engine_args: {enable_lora: true}",
        "sleep: true, engine_args: {lora-modules: [{name: a, path: x}]}",
        "sleep: true, engine_args: {--enable-lora: true}",
    ],
)
def test_a_model_with_adapters_cannot_sleep(problems: Problems, options: str) -> None:
    (problem,) = problems(f"{KEYS}models: {{available: {{m: {{path: x, {options}}}}}}}\n")
    assert problem.startswith("config.yaml:2: models.available.m.sleep: a model with adapters cannot sleep")


@pytest.mark.parametrize(
    "options",
    [
        "sleep: true",
        "adapters: {a: x}",
        "sleep: false, adapters: {a: x}",
        "sleep: true, engine_args: {enable_lora: false}",
    ],
)
def test_a_model_may_sleep_or_have_adapters(load: Load, options: str) -> None:
    load(f"{KEYS}models: {{available: {{m: {{path: x, {options}}}}}}}\n")
