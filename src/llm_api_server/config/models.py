"""The only declaration of an option: one pydantic model per section of `config.yaml`, and `load_config`.

The field descriptions feed `config.example.yaml`, the JSON schema and the documentation. Loading collects every
problem of a file, with its line, before it raises: `config_file.py` reads, `config_checks.py` holds what is wrong
between options. Nothing changes after loading.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from llm_api_server.config import checks as config_checks
from llm_api_server.config.document import KeyPath, read_document
from llm_api_server.config.value_types import Days, Name, Network, Seconds, Size
from llm_api_server.errors import ConfigError
from llm_api_server.types import EngineChoice, ModelType, Permission, PriorityClass

#: Names the configuration file. The command line sets it, and the overrides, for the processes it starts.
CONFIG_VARIABLE = "LLM_API_SERVER_CONFIG"
OVERRIDES: dict[str, KeyPath] = {
    "LLM_API_SERVER_HOST": ("server", "host"),
    "LLM_API_SERVER_PORT": ("server", "port"),
    "LLM_API_SERVER_WORKERS": ("server", "workers"),
    # The names that OpenTelemetry gives them.
    "OTEL_EXPORTER_OTLP_ENDPOINT": ("tracing", "endpoint"),
    "OTEL_SERVICE_NAME": ("tracing", "service_name"),
}
SHA256_PREFIX = "sha256:"


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _blank_means_default(cls, data: Any) -> Any:
        """`workers:` with nothing behind it is as good as absent, unless null is a value of that option."""
        if data is None:
            return {}
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or not cls._needs_value(key)}

    @classmethod
    def _needs_value(cls, key: str) -> bool:
        field = cls.model_fields.get(key)
        return field is not None and not field.is_required() and type(None) not in get_args(field.annotation)


class ServerConfig(Section):
    """Where the server listens and how long it waits."""

    host: str = Field("127.0.0.1", description="Listen address; 0.0.0.0 for all interfaces.")
    port: int = Field(8050, ge=0, le=65535, description="Listen port; 0 picks a free one.")
    workers: int = Field(1, ge=1, le=256, description="API worker processes. They share the loaded models.")
    timeout: Seconds = Field(300, gt=0, description="Seconds a request may take, queue and load included.")
    drain_timeout: Seconds = Field(30, description="Seconds that running requests may take to finish on SIGTERM.")
    max_body_bytes: int = Field(64 * 1024 * 1024, ge=1024, description="Largest request body; beyond it 413.")
    cors_origins: list[str] = Field([], description="Origins that browsers may call from; empty: CORS is off.")
    trusted_proxies: list[Network] = Field(
        [], description="Networks of proxies whose X-Forwarded-For is believed; empty: nobody's."
    )
    allow_unauthenticated: bool = Field(
        False, description="Permit auth.enabled: false on an address that is not loopback."
    )
    run_dir: str | None = Field(
        None, description="Directory for sockets and process records; default: per user and configuration file."
    )


class LimitedConfig(Section):
    """How much a caller may use."""

    requests_per_minute: int | None = Field(None, ge=1, description="Most requests in any 60 seconds.")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Most tokens, prompts and answers, in any 60 seconds."
    )
    max_concurrent: int | None = Field(None, ge=1, description="Most requests at the same time.")
    tokens_per_day: int | None = Field(None, ge=1, description="Most tokens in a day (UTC).")
    tokens_per_month: int | None = Field(None, ge=1, description="Most tokens in a month (UTC).")
    priority: float = Field(1.0, gt=0, le=1000, description="Weight of its requests where several wait.")
    priority_class: PriorityClass = Field("interactive", description="batch: served when no other request waits.")


class ApiKeyConfig(LimitedConfig):
    """One key."""

    key: str = Field(min_length=8, repr=False, description="The key, or `sha256:` and its hex digest, or ${ENV}.")
    name: Name = Field(description="Shown in logs and accounts instead of the key.")
    permissions: list[Permission] = Field(["all"], description="What it may call.")
    models: list[str] = Field(["*"], description="Models it may use; shell patterns.")
    expires_at: datetime | None = Field(
        None, description="When it ends, such as 2027-01-31T12:00:00Z; UTC unless said."
    )
    networks: list[Network] = Field([], description="Networks it may be used from, such as 10.0.0.0/8; none: all.")
    enabled: bool = Field(True, description="false refuses it.")

    @field_validator("key")
    @classmethod
    def _check_digest(cls, key: str) -> str:
        if key.startswith(SHA256_PREFIX) and not re.fullmatch("[0-9a-fA-F]{64}", key.removeprefix(SHA256_PREFIX)):
            raise ValueError("after sha256: there must be 64 hexadecimal digits; `llm-api-server keys new` prints them")
        return key

    @field_validator("expires_at")
    @classmethod
    def _in_utc(cls, time: datetime | None) -> datetime | None:
        return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time

    @property
    def is_hashed(self) -> bool:
        return self.key.startswith(SHA256_PREFIX)


Algorithm = Literal["RS256", "ES256"]


class IssuerConfig(LimitedConfig):
    """An identity provider (OpenID Connect) whose tokens are let in."""

    issuer: str = Field(min_length=1, description="`iss` of its tokens, exactly.")
    audience: list[str] = Field(min_length=1, description="`aud` of tokens that are meant for this server.")
    jwks: str = Field(min_length=1, description="Its keys: an https URL, or a file relative to the configuration file.")
    algorithms: list[Algorithm] = Field(["RS256", "ES256"], min_length=1, description="How its tokens are signed.")
    name_claim: str = Field("sub", min_length=1, description="Claim that names the caller, in logs and accounts.")
    permissions: list[Permission] = Field(
        ["chat", "completions", "embeddings", "responses", "messages", "rerank", "tokenize"],
        description="What its callers may call.",
    )
    models: list[str] = Field(["*"], description="Models they may use; shell patterns.")


class AuthConfig(Section):
    """Who may use it."""

    enabled: bool = Field(True, description="Require a key.")
    secret_key: str | None = Field(
        None, repr=False, description="Signs short-lived tokens; at least 32 bytes, or ${ENV}."
    )
    algorithm: Literal["HS256"] = Field("HS256", description="How tokens are signed.")
    tokens: bool | None = Field(
        None,
        description="POST /auth/token. Unset: on when secret_key is a real secret; true: refuse to start without one.",
    )
    token_timeout: Seconds = Field(3600, gt=0, le=86400 * 30, description="Longest life of a token, in seconds.")
    api_keys: list[ApiKeyConfig] = Field(
        [],
        description="Keys known from the start.",
        examples=[[{"key": "${LLM_API_KEY}", "name": "default", "permissions": ["all"], "models": ["*"]}]],
    )

    issuers: list[IssuerConfig] = Field([], description="Identity providers whose tokens are let in as well.")

    @property
    def are_tokens_on(self) -> bool:
        return self.tokens is not False and not config_checks.is_weak_secret(self.secret_key)


Level = Literal["TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"]


class LoggingConfig(Section):
    """Logs of gateway and manager; each engine's output is in a file of its own beside them."""

    level: Annotated[Level, BeforeValidator(lambda word: word.upper() if isinstance(word, str) else word)] = Field(
        "INFO", description="Least severe level that is written."
    )
    format: str = Field("{time:YYYY-MM-DD HH:mm:ss} | {level} | {message}", description="loguru format of a line.")
    retention: str | int | None = Field("7 days", description="How long old files are kept.")
    rotation: str | int | None = Field("1 day", description="When a new file is begun.")
    path: str = Field("logs", description="Directory of the log files, relative to the configuration file.")
    console: bool = Field(True, description="Also write to standard error.")


class ModelConfig(Section):
    """One model."""

    path: str = Field(min_length=1, description="A .gguf file, a Hugging Face folder or hub id, or a URL.")
    type: ModelType = Field("auto", description="Model family: sets parsers and template defaults.")
    engine: EngineChoice = Field("auto", description="auto: by path: .gguf, folder or hub id, URL.")
    task: Literal["auto", "generate", "embed", "rank"] = Field(
        "auto", description="What the model is loaded for. auto: by its files; one that generates also embeds."
    )
    aliases: list[Name] = Field([], description="Other names that clients may use.")
    adapters: dict[Name, Annotated[str, Field(min_length=1)]] = Field(
        {}, description="vLLM: LoRA adapters, each a model name of its own; {NAME: FOLDER}."
    )
    max_tokens: int | None = Field(None, ge=16, description="Context length; default: the model's own.")
    quantization: str | None = Field(None, description="vLLM's quantization method, when the files do not say.")
    tensor_parallel_size: int = Field(1, ge=1, description="Devices that share the model.")
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="Share of each GPU's memory; default: the engine's; without a GPU not used."
    )
    gpus: list[int] | None = Field(None, description="NVIDIA devices it may use, by number; default: those of devices.")
    sleep: bool = Field(False, description="vLLM on GPUs: give memory up by sleeping, without ending the process.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    unload_timeout: Seconds | None = Field(None, description="Overrides models.unload_timeout; 0: never unload.")
    mmproj: str | None = Field(None, description="llama.cpp: file of the vision projector.")
    api_key: str | None = Field(None, repr=False, description="Remote: its key, as ${ENV}.")
    upstream_model: str | None = Field(None, description="Remote: the model's name there.")
    engine_args: dict[str, Any] = Field({}, description="Further arguments, passed to the engine as they are.")
    env: dict[str, str] = Field({}, repr=False, description="Further environment variables of the engine.")


class ModelsConfig(Section):
    """What can be loaded, and how many at once."""

    default: str | None = Field(
        None, description="Model of requests that name none.", examples=["SmolLM2-135M-Instruct"]
    )
    preload: list[str] = Field([], description="Loaded at start and kept.")
    max_loaded: int = Field(1, ge=1, description="Most models loaded at once; the least recently used makes room.")
    unload_timeout: Seconds = Field(3600, description="Seconds without a request until a model is unloaded; 0: never.")
    sleep_timeout: Seconds = Field(
        300,
        description="Seconds without a request until a model with sleep: true sleeps; 0: never.",
    )
    deep_sleep_timeout: Seconds = Field(
        1800, description="Seconds without a request until a sleeping model's weights leave RAM as well; 0: never."
    )
    load_timeout: Seconds = Field(600, gt=0, description="Seconds a load may take until it counts as failed.")
    min_loaded_time: Seconds = Field(1, description="Seconds a model stays before it makes room for another.")
    max_wait_time: Seconds = Field(
        5, description="Seconds a request waits for a busy model to become idle before that one takes no new work."
    )
    models_dir: str = Field("models", description="Where relative paths start, relative to the configuration file.")
    available: dict[Name, ModelConfig] = Field(
        {},
        description="The models, by name.",
        examples=[{"SmolLM2-135M-Instruct": {"path": "SmolLM2-135M-Instruct.Q4_1.gguf", "type": "llama"}}],
    )


class DevicesConfig(Section):
    """Memory that models may take. What other programs hold is looked up before each load."""

    memory: Size | None = Field(
        None, ge=1, description="Most RAM of all models together, such as 16GiB; default: nearly all there is."
    )
    sleep_memory: Size | None = Field(
        None, description="Most RAM that weights of sleeping models take of that; default: half."
    )
    gpus: list[int] | None = Field(
        None, description="NVIDIA devices to use, by number as in nvidia-smi; default: all, or CUDA_VISIBLE_DEVICES."
    )


class LimitsConfig(Section):
    """What happens when there is more to do than can be done at once."""

    queue_per_model: int = Field(1000, ge=1, description="Most requests that wait for one model; beyond them 503.")
    queue_per_key: int = Field(500, ge=1, description="Most requests of one key that wait; beyond them 429.")
    when_loading: Literal["wait", "reject"] = Field(
        "wait", description="What a request does while its model loads; reject: 503 at once, the load goes on."
    )
    stall_timeout: Seconds = Field(
        120, description="Seconds without any progress after which an engine at work is restarted; 0: never."
    )


class InferenceConfig(Section):
    """Limits and defaults of every model."""

    max_total_tokens: int | None = Field(None, ge=16, description="Most tokens of prompt and answer together.")
    max_input_tokens: int | None = Field(None, ge=1, description="Most tokens of a prompt.")
    max_batch_size: int | None = Field(None, ge=1, description="Requests a model works on at a time; others wait.")
    max_image_pixels: int = Field(
        96_000_000, ge=1, description="Most pixels of all images of a request together, as they are when decoded."
    )
    max_images: int = Field(100, ge=1, description="Most images of a request.")
    streaming_default: bool = Field(
        False, description="Stream when a request omits `stream` and accepts text/event-stream."
    )
    optimize_first_token: bool = Field(
        True, description="Prefix cache, prefill favoured, and a warm-up before a model counts as ready."
    )


class MediaConfig(Section):
    """Images that requests name by URL. Engines never fetch: the gateway does, from these hosts."""

    hosts: list[str] = Field(
        [],
        description="Hosts that images are fetched from, by https; `*` as in file names, a port other than 443 is part"
        " of it. None: images come as data: URLs only.",
    )
    timeout: float = Field(10, gt=0, description="Seconds that one image may take, redirects included.")
    max_bytes: int = Field(20 * 1024 * 1024, ge=1, description="Most bytes of one image.")
    max_redirects: int = Field(3, ge=0, le=10, description="Redirects that are followed; each is checked like a URL.")


class StorageConfig(Section):
    """Keys made while it runs, who changed them, and what was used."""

    url: str = Field(
        "sqlite:///llm-api-server.db",
        repr=False,
        description="Database: sqlite:///FILE, relative to the configuration file, or postgresql://USER:PASSWORD@HOST/NAME.",
    )
    key_grace: Seconds = Field(
        3600, description="Seconds that keys already seen stay valid while the database cannot be reached."
    )
    keep_requests: Days = Field(30, description="Days that the row of each request is kept.")
    keep_hours: Days = Field(90, description="Days that sums per hour are kept.")
    keep_days: Annotated[Days, Field(ge=31)] = Field(1100, description="Days that sums per day are kept; at least 31.")
    record_prompts: bool = Field(False, description="Keep the prompts too, for as long as keep_requests says.")


class TracingConfig(Section):
    """Traces of requests, sent to a collector by OTLP over HTTP."""

    endpoint: str | None = Field(None, description="Address of the collector, such as http://127.0.0.1:4318.")
    headers: dict[str, str] = Field({}, repr=False, description="Sent along, such as authorization: ${ENV}.")
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of requests that are traced where their callers have not decided."
    )
    service_name: str = Field("llm-api-server", min_length=1, description="What the traces call this server.")

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        url = urlsplit(endpoint or "http://none")
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise ValueError("give an address such as http://127.0.0.1:4318, where OTLP over HTTP is taken")
        return endpoint


class VllmConfig(Section):
    """vLLM."""

    python: str | None = Field(None, description="Interpreter that has vLLM; default: .venv-vllm, else this one.")
    zygote: bool = Field(True, description="Import vLLM once and fork engines from that: loads in seconds.")


class LlamaCppConfig(Section):
    """llama.cpp."""

    python: str | None = Field(None, description="Interpreter that has xllamacpp; default: this one.")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: the physical cores.")


class EnginesConfig(Section):
    """The programs that run the models; each may live in an environment of its own."""

    vllm: VllmConfig = VllmConfig()
    llama_cpp: LlamaCppConfig = LlamaCppConfig()


class Config(Section):
    """The whole file. `source` is where it was read from; relative paths start at its folder."""

    server: ServerConfig = ServerConfig()
    auth: AuthConfig = AuthConfig()
    logging: LoggingConfig = LoggingConfig()
    models: ModelsConfig = ModelsConfig()
    devices: DevicesConfig = DevicesConfig()
    inference: InferenceConfig = InferenceConfig()
    limits: LimitsConfig = LimitsConfig()
    media: MediaConfig = MediaConfig()
    storage: StorageConfig = StorageConfig()
    engines: EnginesConfig = EnginesConfig()
    tracing: TracingConfig = TracingConfig()
    source: SkipJsonSchema[Path] = Field(Path("config.yaml"), exclude=True, repr=False)

    @property
    def folder(self) -> Path:
        return self.source.absolute().parent

    @property
    def models_dir(self) -> Path:
        return self.folder / Path(self.models.models_dir).expanduser()

    @property
    def log_dir(self) -> Path:
        return self.folder / Path(self.logging.path).expanduser()

    def resolve_model_path(self, path: str) -> Path:
        """Where a file or folder of a model is; URLs and hub ids are the caller's to tell apart."""
        return self.models_dir / Path(path).expanduser()

    @property
    def storage_url(self) -> str:
        """`storage.url` with the file of SQLite made absolute."""
        scheme, found, file = self.storage.url.partition("sqlite:///")
        if scheme or not found or file in {"", ":memory:"}:
            return self.storage.url
        return f"sqlite:///{self.folder / Path(file).expanduser()}"

    @property
    def vllm_python(self) -> str:
        """`engines.vllm.python`, else what `make vllm` made beside the file or the project, else this interpreter."""
        if self.engines.vllm.python:
            return _interpreter(self.folder, self.engines.vllm.python)
        for folder in (self.folder, Path(sys.prefix).parent, Path(__file__).parents[3]):
            python = folder / ".venv-vllm" / "bin" / "python"
            if python.exists():
                return str(python)
        return sys.executable

    @property
    def llama_cpp_python(self) -> str:
        python = self.engines.llama_cpp.python
        return _interpreter(self.folder, python) if python else sys.executable

    @property
    def run_dir(self) -> Path:
        """Where sockets and process records are; the same for every process with the same configuration file."""
        if self.server.run_dir:
            return self.folder / Path(self.server.run_dir).expanduser()
        name = hashlib.sha256(os.fsencode(self.source.absolute())).hexdigest()[:8]
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        if runtime and _is_ours(Path(runtime)):
            return Path(runtime) / "llm-api-server" / name
        return Path(tempfile.gettempdir()) / f"llm-api-server-{os.getuid()}" / name

    def ensure_run_dir(self) -> Path:
        """Make the run directory, for this user alone. Raises `ConfigError` where others could put files into it."""
        path = self.run_dir
        own = [path] if self.server.run_dir else [path.parent, path]
        try:
            for folder in own:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            reason = f"The run directory {path} cannot be made: {error.strerror}. Set server.run_dir."
            raise ConfigError([reason]) from error
        for folder in own:
            if not _is_ours(folder):
                reason = f"The run directory {folder} is another user's, or others may write to it. Set server.run_dir."
                raise ConfigError([reason])
        return path


def find_config(given: Path | None = None) -> Path:
    """The file to read: the one given, else the environment's, else `config.yaml` in the current directory."""
    return given or Path(os.environ.get(CONFIG_VARIABLE) or "config.yaml")


def load_config(path: Path, checks: config_checks.Checks | None = None) -> Config:
    """Read and check the file. Raises `ConfigError` with every problem at once.

    `checks` come on top of `config_checks`: those that know more than a configuration (`engines/config_problems.py`).
    """
    document = read_document(path)
    for variable, key_path in OVERRIDES.items():
        if value := os.environ.get(variable):
            document.override(key_path, value, f"environment variable {variable}")
    config = document.validate(Config).model_copy(update={"source": path.absolute()})
    config_checks.check(config, document, checks or {})
    if document.problems:
        raise ConfigError(document.problems)
    return config


def config_from_environment() -> Config:
    """What `CONFIG_VARIABLE` names, else `config.yaml` here: for processes that get no arguments of ours."""
    return load_config(find_config())


def _interpreter(folder: Path, python: str) -> str:
    """A bare name is searched for in PATH by whoever starts it."""
    return str(folder / Path(python).expanduser()) if "/" in python else python


def _is_ours(folder: Path) -> bool:
    """Whether `folder` is a real directory of this user that nobody else may write to."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
