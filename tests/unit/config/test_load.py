"""Loading of a file: all problems at once with line and hint, values from the environment, no secret in a message."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_api_server.config.checks import config_warnings
from llm_api_server.config.load import CONFIG_VARIABLE, config_from_environment, find_config, load_config
from llm_api_server.config.models import Config
from llm_api_server.errors import ConfigError

SECRET = "dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"
KEYS = "auth: {api_keys: [{key: sk-0123456789abcdef, name: me}]}\n"

#: The sections and keys of the project's first published configuration.
PUBLISHED = """
server:
  host: "0.0.0.0"
  port: 8000
  workers: 1
  timeout: 300
auth:
  enabled: true
  secret_key: "your-secret-key"
  algorithm: "HS256"
  api_keys:
    - key: "sk-myapikey123456789"
      name: "default"
      permissions: ["all"]
    - key: "sk-restricted987654321"
      name: "restricted"
      permissions: ["chat"]
logging:
  level: "INFO"
  format: "{time:YYYY-MM-DD HH:mm:ss} | {level} | {message}"
  retention: "7 days"
  rotation: "1 day"
  path: "logs"
  console: true
models:
  default: "DeepSeek-R1-0528-Qwen3-8B"
  preload: ["DeepSeek-R1-0528-Qwen3-8B"]
  max_loaded: 2
  unload_timeout: 3600
  models_dir: "models"
  available:
    DeepSeek-R1-0528-Qwen3-8B:
      path: "/path/to/model"
      type: "qwen"
      max_tokens: 4096
      quantization: null
      tensor_parallel_size: 1
      gpu_memory_utilization: 0.8
      trust_remote_code: true
inference:
  max_total_tokens: 4096
  max_input_tokens: 3072
  max_batch_size: 32
  streaming_default: true
  optimize_first_token: true
"""


Load = Callable[[str], Config]
Problems = Callable[[str], list[str]]


def test_the_first_published_configuration_loads_unchanged(load: Load) -> None:
    config = load(PUBLISHED)
    assert (config.server.host, config.server.port) == ("0.0.0.0", 8000)
    assert [key.permissions for key in config.auth.api_keys] == [["all"], ["chat"]]
    model = config.models.available["DeepSeek-R1-0528-Qwen3-8B"]
    assert (model.path, model.type, model.max_tokens, model.trust_remote_code) == ("/path/to/model", "qwen", 4096, True)
    assert config.inference.streaming_default
    assert not config.auth.are_tokens_on


def test_all_problems_of_a_file_are_reported_at_once_with_line_and_hint(problems: Problems) -> None:
    text = """\
server:
  prot: 1
auth:
  api_keys:
    - {key: sk-0123456789abcdef, nme: a, permissions: [chta]}
    - {key: "sha256:zz", name: b}
models:
  default: Smol
  preload: [one, two]
  available:
    Smol-LM: {path: x.gguf, type: qwne, engine: vlm, gpu_memory_utilization: 2}
    broken: {type: llama}
logging: {level: inf, format: "{nope}", rotation: sometimes, retention: a while}
inference: {unload_timeout: 3}
modles: {}
"""
    found = problems(text)
    expected = [
        r"config.yaml:2: server.prot: unknown key; did you mean 'port'\? Allowed: host, port",
        r"config.yaml:5: auth.api_keys\[0\]: 'name' is missing",
        r"config.yaml:5: auth.api_keys\[0\].nme: unknown key; did you mean 'name'",
        r"config.yaml:5: auth.api_keys\[0\].permissions\[0\]: 'chta' .* did you mean 'chat'\? Allowed: all",
        r"config.yaml:6: auth.api_keys\[1\].key: after sha256: there must be 64 hex",
        r"config.yaml:8: models.default: there is no model 'Smol'; did you mean 'Smol-LM'\?",
        r"config.yaml:9: models.preload\[0\]: there is no model 'one'",
        r"config.yaml:9: models.preload\[1\]: there is no model 'two'",
        r"config.yaml:9: models.preload: 2 models to preload, but models.max_loaded is 1",
        r"config.yaml:11: models.available.Smol-LM.type: 'qwne' .* did you mean 'qwen'\? Allowed: auto, qwen",
        r"config.yaml:11: models.available.Smol-LM.engine: 'vlm' .* did you mean 'vllm'\?",
        r"config.yaml:11: models.available.Smol-LM.gpu_memory_utilization: must be at most 1.0; it is '2'",
        r"config.yaml:12: models.available.broken: 'path' is missing",
        r"config.yaml:13: logging.level: 'INF' .* did you mean 'INFO'",
        r"config.yaml:13: logging.format: .*'nope'",
        r"config.yaml:13: logging.rotation: .*sometimes",
        r"config.yaml:13: logging.retention: .*a while",
        r"config.yaml:14: inference.unload_timeout: unknown key here; it belongs at models.unload_timeout",
        r"config.yaml:15: modles: unknown key; did you mean 'models'",
    ]
    unmatched = [pattern for pattern in expected if not any(re.match(pattern, problem) for problem in found)]
    assert unmatched == []
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2\n", "config.yaml:2: not valid YAML"),
        ("server: {port: 1}\n---\na: 2\n", "config.yaml:2: not valid YAML: expected a single document"),
        ("- a\n- b\n", "config.yaml: must be a section"),
        ("server: &a {host: *a}\n", "config.yaml:1: server.host: refers to itself"),
        ("server: {port: !!int x}\n", "config.yaml:1: server.port: not a value of type"),
        ("server: !!python/object:os.system {}\n", "config.yaml:1: server: not a value of type"),
        ("source: x\n", "config.yaml:1: source: unknown key"),
        ("server:\n  port: 1\n  port: 2\n", "config.yaml:3: server.port: given twice, first in line 2"),
        ("server: {? [a, b] : 1}\n", "config.yaml:1: server: a key must be text"),
        ("server: {port: 70000}\n", "config.yaml:1: server.port: must be at most 65535; it is '70000'"),
        ("server: {timeout: soon}\n", "config.yaml:1: server.timeout: must be a number; it is 'soon'"),
        ("server: {cors_origins: all}\n", "config.yaml:1: server.cors_origins: must be a list"),
        ("models: {available: {a: x.gguf}}\n", "config.yaml:1: models.available.a: must be a section"),
        (
            "auth: {api_keys: [{key: sk-0123456789abcdef, name: 7}]}\n",
            "config.yaml:1: auth.api_keys[0].name: must be text; put it in quotes; it is '7'",
        ),
    ],
)
def test_a_malformed_file_is_reported_with_its_line(problems: Problems, text: str, expected: str) -> None:
    found = problems(text)
    assert any(expected in problem for problem in found), found


def test_a_file_that_is_not_utf8_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"server:\n  host: \xff\n")
    with pytest.raises(ConfigError, match=r"config.yaml:2: the file is not UTF-8"):
        load_config(path)


def test_the_error_for_a_missing_file_names_the_init_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llm-api-server init"):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "server:\nauth:\n"])
def test_an_empty_file_means_defaults_and_warns_that_there_is_no_key(load: Load, text: str) -> None:
    (warning, _) = config_warnings(load(text))
    assert "only keys of the store are accepted" in warning
    assert "llm-api-server keys create" in warning


def test_blank_options_are_defaults(load: Load) -> None:
    config = load(KEYS + "server:\n  workers:\nlogging:\n  rotation:\n")
    assert config.server.workers == 1
    assert config.logging.rotation is None, "null is a value of this option: never rotate"


def test_merge_keys_and_anchors_work(load: Load) -> None:
    config = load(KEYS + "models: {available: {a: &a {path: a.gguf, type: llama}, b: {<<: *a, path: b.gguf}}}\n")
    assert (config.models.available["b"].type, config.models.available["b"].path) == ("llama", "b.gguf")


def test_keys_are_text_even_where_yaml_sees_numbers(load: Load) -> None:
    config = load(KEYS + "models: {available: {70: {path: a.gguf}, on: {path: b.gguf}}}\n")
    assert list(config.models.available) == ["70", "on"]


def test_variables_are_expanded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "sk-from-the-environment")
    monkeypatch.setenv("A_PORT", "9001")
    config = load(
        "server: {port: '${A_PORT}', host: '${NO_HOST:-127.0.0.2}', run_dir: '$${A_KEY}'}\n"
        "auth: {api_keys: [{key: '${A_KEY}', name: 'x-${A_PORT}-${NO_NAME:-}y'}]}\n"
    )
    assert (config.server.port, config.server.host, config.server.run_dir) == (9001, "127.0.0.2", "${A_KEY}")
    assert (config.auth.api_keys[0].key, config.auth.api_keys[0].name) == ("sk-from-the-environment", "x-9001-y")


def test_a_missing_variable_is_one_problem_with_its_line(problems: Problems) -> None:
    found = problems("server:\n  host: ${NOT_THERE}\nauth:\n  api_keys:\n  - key: ${NOR_THIS}\n    name: a\n")
    assert len(found) == 2
    assert "config.yaml:2: server.host: the environment variable NOT_THERE is not set" in found[0]
    assert "config.yaml:5: auth.api_keys[0].key: the environment variable NOR_THIS is not set" in found[1]


def test_a_misspelt_variable_is_a_problem(problems: Problems) -> None:
    (problem,) = problems(KEYS + "server: {host: '${not a name}'}\n")
    assert "${NAME:-default}" in problem


def test_no_secret_is_in_a_message(problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAK", "tell-nobody-4711")
    text = """
server: {port: "${LEAK}", host: [1]}
auth:
  secret_key: 4712471247124712
  api_keys:
    - {key: 4713471347134713, name: "${LEAK}", permissions: ["${LEAK}"]}
    - {key: sk-4714471447144714, name: a}
    - {key: sk-4714471447144714, name: b}
    - {key: "sha256:4715471547154715", name: c}
    - {sk-4716471647164716: x}
models: {available: {a: {path: x, type: "${LEAK}", api_key: 4717471747174717, env: {A: [4718471847184718]}}}}
logging: {level: "${LEAK}"}
"""
    message = "\n".join(problems(text))
    assert len(message.splitlines()) >= 10
    for secret in ("tell-nobody", "4711", "4712", "4713", "4714", "4715", "4716", "4717", "4718"):
        assert secret not in message.lower()


def test_a_configuration_does_not_show_its_secrets(load: Load) -> None:
    config = load(
        f"auth: {{secret_key: {SECRET}, api_keys: [{{key: sk-0123456789abcdef, name: me}}]}}\n"
        "models: {available: {a: {path: 'http://h/v1', api_key: remote-secret, env: {TOKEN: env-secret}}}}\n"
    )
    for secret in (SECRET, "0123456789abcdef", "remote-secret", "env-secret"):
        assert secret not in repr(config)


def test_environment_overrides_the_file(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_API_SERVER_PORT", "9999")
    monkeypatch.setenv("LLM_API_SERVER_WORKERS", "3")
    config = load("server: {port: 1}\n" + KEYS)
    assert (config.server.port, config.server.workers) == (9999, 3)
    monkeypatch.setenv("LLM_API_SERVER_PORT", "many")
    with pytest.raises(ConfigError, match=r"^environment variable LLM_API_SERVER_PORT: server.port: must be a whole"):
        load("server:\n" + KEYS)


def test_the_file_is_found_by_option_then_environment_then_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_config() == Path("config.yaml")
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "a.yaml"))
    assert find_config() == tmp_path / "a.yaml"
    assert find_config(Path("b.yaml")) == Path("b.yaml")
    (tmp_path / "a.yaml").write_text(KEYS)
    assert config_from_environment().source == tmp_path / "a.yaml"
