"""Loading the configuration: the seed's file as it is, every problem of a bad file at once, no secret in a message."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from llm_api_server.config import models as declaration
from llm_api_server.config.checks import config_warnings, is_loopback, is_weak_secret
from llm_api_server.config.example import example, first_config, schema
from llm_api_server.config.models import Config, config_from_environment, find_config, load_config
from llm_api_server.errors import ConfigError

ROOT = Path(__file__).parents[3]
SECRET = "dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"
KEYS = "auth: {api_keys: [{key: sk-0123456789abcdef, name: me}]}\n"

#: The sections and keys of the project's first published configuration.
SEED = """
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


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(text: str) -> Config:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path)

    return write_and_load


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Private, and with a path that leaves room for the names of sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def problems(load: Load, text: str) -> list[str]:
    """Problems without the folder in front: `config.yaml:3: …`."""
    with pytest.raises(ConfigError) as caught:
        load(text)
    return [problem[problem.index("config.yaml") :] for problem in caught.value.problems]


def test_the_seeds_file_loads_unchanged(load: Load) -> None:
    config = load(SEED)
    assert (config.server.host, config.server.port) == ("0.0.0.0", 8000)
    assert [key.permissions for key in config.auth.api_keys] == [["all"], ["chat"]]
    model = config.models.available["DeepSeek-R1-0528-Qwen3-8B"]
    assert (model.path, model.type, model.max_tokens, model.trust_remote_code) == ("/path/to/model", "qwen", 4096, True)
    assert config.inference.streaming_default
    assert not config.auth.are_tokens_on


def test_the_seeds_file_is_warned_about(load: Load) -> None:
    warnings = config_warnings(load(SEED))
    assert sum("'default'" in text or "'restricted'" in text for text in warnings) == 2
    assert any("/auth/token is off" in text for text in warnings)
    assert any("/path/to/model does not exist" in text for text in warnings)
    assert not any("sk-" in text for text in warnings)


def test_example_keys_on_loopback_are_not_warned_about(load: Load) -> None:
    warnings = config_warnings(load(SEED.replace("0.0.0.0", "127.0.0.1")))
    assert not any("'default'" in text for text in warnings)


def test_all_problems_of_a_file_are_told_at_once_with_line_and_hint(load: Load) -> None:
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
    found = problems(load, text)
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
        ("server: {port: !!int x}\n", "config.yaml:1: server.port: not a value of the kind"),
        ("server: !!python/object:os.system {}\n", "config.yaml:1: server: not a value of the kind"),
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
def test_a_malformed_file_is_told_with_its_line(load: Load, text: str, expected: str) -> None:
    found = problems(load, text)
    assert any(expected in problem for problem in found), found


def test_a_file_of_other_bytes_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"server:\n  host: \xff\n")
    with pytest.raises(ConfigError, match=r"config.yaml:2: the file is not UTF-8"):
        load_config(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llm-api-server init"):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "server:\nauth:\n"])
def test_an_empty_file_means_defaults_and_warns_that_there_is_no_key(load: Load, text: str) -> None:
    (warning, _) = config_warnings(load(text))
    assert "only keys of the store are let in" in warning
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


# ── environment ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_variables_are_expanded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "sk-from-the-environment")
    monkeypatch.setenv("A_PORT", "9001")
    config = load(
        "server: {port: '${A_PORT}', host: '${NO_HOST:-127.0.0.2}', run_dir: '$${A_KEY}'}\n"
        "auth: {api_keys: [{key: '${A_KEY}', name: 'x-${A_PORT}-${NO_NAME:-}y'}]}\n"
    )
    assert (config.server.port, config.server.host, config.server.run_dir) == (9001, "127.0.0.2", "${A_KEY}")
    assert (config.auth.api_keys[0].key, config.auth.api_keys[0].name) == ("sk-from-the-environment", "x-9001-y")


def test_a_missing_variable_is_one_problem_with_its_line(load: Load) -> None:
    found = problems(load, "server:\n  host: ${NOT_THERE}\nauth:\n  api_keys:\n  - key: ${NOR_THIS}\n    name: a\n")
    assert len(found) == 2
    assert "config.yaml:2: server.host: the environment variable NOT_THERE is not set" in found[0]
    assert "config.yaml:5: auth.api_keys[0].key: the environment variable NOR_THIS is not set" in found[1]


def test_a_misspelt_variable_is_a_problem(load: Load) -> None:
    (problem,) = problems(load, KEYS + "server: {host: '${not a name}'}\n")
    assert "${NAME:-default}" in problem


def test_no_secret_is_in_a_message(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
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
    message = "\n".join(problems(load, text))
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


def test_overrides_come_before_the_file(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setenv(declaration.CONFIG_VARIABLE, str(tmp_path / "a.yaml"))
    assert find_config() == tmp_path / "a.yaml"
    assert find_config(Path("b.yaml")) == Path("b.yaml")
    (tmp_path / "a.yaml").write_text(KEYS)
    assert config_from_environment().source == tmp_path / "a.yaml"


# ── relations ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_an_open_address_without_keys_is_refused(load: Load, host: str) -> None:
    text = f"server: {{host: '{host}'}}\nauth: {{enabled: false}}\n"
    (problem,) = problems(load, text)
    assert problem.startswith("config.yaml:2: auth.enabled: ")
    assert "server.allow_unauthenticated" in problem
    allowed = load(text.replace("}\nauth", ", allow_unauthenticated: true}\nauth"))
    assert any("everybody" in warning for warning in config_warnings(allowed))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_keys(load: Load, host: str) -> None:
    assert not load(f"server: {{host: '{host}'}}\nauth: {{enabled: false}}\n").auth.enabled
    assert is_loopback(host)


@pytest.mark.parametrize("secret", [None, "your-secret-key", "change-me", "too-small", "a" * 64, "0123" * 3])
def test_tokens_need_a_real_secret(load: Load, secret: str | None) -> None:
    line = f", secret_key: {secret!r}" if secret else ""
    (problem,) = problems(load, KEYS.replace("{api", "{tokens: true" + line + ", api"))
    assert "auth.secret_key" in problem
    assert secret is None or secret not in problem
    assert is_weak_secret(secret)
    unset = KEYS.replace("{api", f"{{secret_key: {secret!r}, api" if secret else "{api")
    assert not load(unset).auth.are_tokens_on


@pytest.mark.parametrize(("tokens", "are_on"), [("null", True), ("true", True), ("false", False)])
def test_a_real_secret_turns_tokens_on_unless_told_otherwise(load: Load, tokens: str, are_on: bool) -> None:
    config = load(KEYS.replace("{api", f"{{secret_key: {SECRET}, tokens: {tokens}, api"))
    assert config.auth.are_tokens_on is are_on
    assert not any("secret" in warning for warning in config_warnings(config))


def test_names_of_keys_and_models_are_unique(load: Load) -> None:
    found = problems(
        load,
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
    assert any("its adapter 'b' is not there" in line for line in config_warnings(config))


def test_patterns_and_paths_that_lead_nowhere_are_warned_about(load: Load, tmp_path: Path) -> None:
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


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_relative_paths_start_at_the_file(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(KEYS + "models: {models_dir: weights}\nengines: {llama_cpp: {python: env/bin/python}}\n")
    monkeypatch.chdir("/")
    assert config.models_dir == tmp_path / "weights"
    assert config.log_dir == tmp_path / "logs"
    assert config.resolve_model_path("a.gguf") == tmp_path / "weights" / "a.gguf"
    assert config.resolve_model_path("/a.gguf") == Path("/a.gguf")
    assert config.llama_cpp_python == str(tmp_path / "env" / "bin" / "python")
    assert Config().llama_cpp_python == sys.executable


def test_vllms_environment_beside_the_file_is_found(load: Load, tmp_path: Path) -> None:
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert load(KEYS).vllm_python == str(python)
    assert load(KEYS + "engines: {vllm: {python: python3.12}}\n").vllm_python == "python3.12"


def test_the_run_directory_is_one_per_file_and_private(
    load: Load, short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = short_folder
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    config = load(KEYS)
    name = hashlib.sha256(os.fsencode(tmp_path / "config.yaml")).hexdigest()[:8]
    assert config.run_dir == runtime / "llm-api-server" / name
    assert config.ensure_run_dir() == config.run_dir
    assert config.run_dir.stat().st_mode & 0o777 == 0o700
    assert config.run_dir.parent.stat().st_mode & 0o777 == 0o700
    assert config.ensure_run_dir() == config.run_dir


@pytest.mark.parametrize("runtime", ["", "/nonexistent"])
def test_without_a_runtime_directory_it_is_under_tmp(
    load: Load, short_folder: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(short_folder))
    assert load(KEYS).run_dir.parent == short_folder / f"llm-api-server-{os.getuid()}"


def test_a_run_directory_that_others_can_write_is_refused(load: Load, tmp_path: Path) -> None:
    config = load(KEYS + "server: {run_dir: run}\n")
    config.ensure_run_dir()
    config.run_dir.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write"):
        config.ensure_run_dir()
    config.run_dir.rmdir()
    (tmp_path / "elsewhere").mkdir()
    config.run_dir.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="others may write"):
        config.ensure_run_dir()
    config.run_dir.unlink()
    config.run_dir.touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        config.ensure_run_dir()


def test_a_run_directory_too_long_for_sockets_is_refused(load: Load) -> None:
    (problem,) = problems(load, KEYS + f"server: {{run_dir: /{'a' * 80}}}\n")
    assert "server.run_dir" in problem
    assert "unix sockets" in problem


# ── generated texts ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_committed_example_is_current() -> None:
    assert (ROOT / "config.example.yaml").read_text(encoding="utf-8") == example()


def test_the_example_shows_every_option_and_loads(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_API_KEY", "sk-0123456789abcdef")
    config = load(example())
    shown = yaml.safe_load(example())
    for name in Config.model_fields:
        if name != "source":
            assert shown[name].keys() == type(getattr(config, name)).model_fields.keys()
    model = shown["models"]["available"]["SmolLM2-135M-Instruct"]
    assert model.keys() == declaration.ModelConfig.model_fields.keys()
    defaults = Config()
    for name in ("server", "logging", "inference", "engines"):
        assert getattr(config, name) == getattr(defaults, name)


def test_every_option_is_described() -> None:
    def undescribed(model: type, prefix: str) -> list[str]:
        fields = model.model_fields  # type: ignore[attr-defined]
        return [prefix + name for name, field in fields.items() if not field.description]

    sections = [declaration.ServerConfig, declaration.ApiKeyConfig, declaration.AuthConfig, declaration.LoggingConfig]
    sections += [declaration.ModelConfig, declaration.ModelsConfig, declaration.InferenceConfig]
    sections += [declaration.VllmConfig, declaration.LlamaCppConfig]
    assert [name for section in sections for name in undescribed(section, f"{section.__name__}.")] == []


def test_the_first_configuration_loads(load: Load) -> None:
    with_model = load(first_config("sk-0123456789abcdef", "SmolLM2", "SmolLM2.gguf"))
    assert with_model.models.default == "SmolLM2"
    assert with_model.resolve_model_path("SmolLM2.gguf").parts[-2:] == ("models", "SmolLM2.gguf")
    without = load(first_config("sk-0123456789abcdef", None, ""))
    assert without.models.available == {}
    assert config_warnings(without) == ["models.available is empty: there is nothing to serve yet."]


def test_the_schema_knows_every_section() -> None:
    document = yaml.safe_load(schema())
    assert document["properties"].keys() == Config.model_fields.keys() - {"source"}
    assert "description" in document["$defs"]["ServerConfig"]["properties"]["port"]
