"""The only declaration of every option: one pydantic model per section of `config.yaml`.

The field descriptions feed `config.example.yaml`, the JSON schema, the settings page and the documentation.
"""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from llm_api_server.config.run_dir import default_run_dir, make_private
from llm_api_server.config.secrets import SHA256_PREFIX, is_weak_secret
from llm_api_server.config.value_types import (
    Days,
    HeaderName,
    HeaderValue,
    Name,
    Network,
    Seconds,
    Secret,
    SentSecret,
    Size,
)
from llm_api_server.types import EngineChoice, ModelType, Permission, PriorityClass

#: Folder of the project when it runs from a checkout.
_PROJECT = Path(__file__).parents[3]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _blank_means_default(cls, data: Any) -> Any:
        """Treat `workers:` without a value as absent, unless null is a value of that option."""
        if data is None:
            return {}
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or not cls._needs_value(key)}

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `port: true`, which pydantic reads as 1, alone or in a list."""
        if any(isinstance(item, bool) for item in (value if isinstance(value, list) else [value])):
            kinds = _kinds_of(cls.model_fields[str(info.field_name)].annotation)
            if not kinds & {bool, Any} and kinds & {int, float, datetime}:
                raise ValueError("must not be true or false (YAML reads yes, no, on and off as these, too)")
        return value

    @classmethod
    def _needs_value(cls, key: str) -> bool:
        field = cls.model_fields.get(key)
        return field is not None and not field.is_required() and type(None) not in get_args(field.annotation)


def _kinds_of(annotation: Any) -> set[Any]:
    """Return the plain types within `annotation`."""
    inner = get_args(annotation)
    return {annotation} if not inner else {kind for part in inner for kind in _kinds_of(part)}


class ServerConfig(Section):
    """Listen address, worker processes and timeouts of the server."""

    host: str = Field("127.0.0.1", description="Listen address; 0.0.0.0: all interfaces.")
    port: int = Field(8050, ge=0, le=65535, description="Listen port; 0 picks a free one.")
    workers: int = Field(1, ge=1, le=256, description="Number of API worker processes; they share the loaded models.")
    timeout: Seconds = Field(
        300, gt=0, description="Longest duration of a request in seconds, queueing and model load included."
    )
    drain_timeout: Seconds = Field(30, description="Seconds that running requests get to finish after SIGTERM.")
    max_body_bytes: int = Field(
        64 * 1024 * 1024, ge=1024, description="Largest request body in bytes; larger ones get 413."
    )
    cors_origins: list[str] = Field([], description="Origins that browsers may call from (CORS); empty: none.")
    trusted_proxies: list[Network] = Field(
        [], description="Networks of proxies whose X-Forwarded-For header is trusted; empty: none."
    )
    allow_unauthenticated: bool = Field(
        False, description="Allow auth.enabled: false on an address other than loopback."
    )
    run_dir: str | None = Field(
        None, description="Directory of sockets and process records; default: one per user and configuration file."
    )


class KeyLimits(BaseModel):
    """Limits of one key; None: unlimited."""

    requests_per_minute: int | None = Field(None, ge=1, description="Maximum number of requests in any 60 seconds.")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Maximum number of tokens, prompt and completion, in any 60 seconds."
    )
    max_concurrent: int | None = Field(None, ge=1, description="Maximum number of concurrent requests.")
    tokens_per_day: int | None = Field(None, ge=1, description="Maximum number of tokens in a day (UTC).")
    tokens_per_month: int | None = Field(None, ge=1, description="Maximum number of tokens in a month (UTC).")


class LimitedConfig(KeyLimits, Section):
    """Limits and priority of a caller."""

    priority: float = Field(1.0, gt=0, le=1000, description="Weight of the key's requests in the queue.")
    priority_class: PriorityClass = Field(
        "interactive", description="batch: served only when no interactive request waits."
    )


class ApiKeyConfig(LimitedConfig):
    """An API key."""

    key: Secret = Field(min_length=8, repr=False, description="The key, `sha256:` and its hex digest, or ${ENV}.")
    name: Name = Field(description="Name of the key in logs and usage reports.")
    permissions: list[Permission] = Field(["all"], description="Endpoints the key may call.")
    models: list[str] = Field(["*"], description="Models the key may use, as shell patterns.")
    expires_at: datetime | None = Field(
        None, description="End of validity, such as 2027-01-31T12:00:00Z; UTC by default."
    )
    networks: list[Network] = Field(
        [], description="Networks the key may be used from, such as 10.0.0.0/8; empty: any."
    )
    enabled: bool = Field(True, description="Accept the key.")

    @field_validator("key")
    @classmethod
    def _check_digest(cls, key: str) -> str:
        if not key.lower().startswith(SHA256_PREFIX):
            return key
        key = key.lower()
        if not re.fullmatch("[0-9a-f]{64}", key.removeprefix(SHA256_PREFIX)):
            raise ValueError("after sha256: there must be 64 hexadecimal digits; `llm-api-server keys new` prints them")
        return key

    @field_validator("expires_at", mode="before")
    @classmethod
    def _is_no_number(cls, time: Any) -> Any:
        if isinstance(time, int | float):
            raise ValueError(  # noqa: TRY004 - pydantic reports only ValueError as a problem
                "give a date or time such as 2027-01-31T12:00:00Z, not a number"
            )
        return time

    @field_validator("expires_at")
    @classmethod
    def _in_utc(cls, time: datetime | None) -> datetime | None:
        return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time

    @property
    def is_hashed(self) -> bool:
        return self.key.startswith(SHA256_PREFIX)


Algorithm = Literal["RS256", "ES256"]


class IssuerConfig(LimitedConfig):
    """An identity provider (OpenID Connect) whose tokens are accepted."""

    issuer: str = Field(min_length=1, description="Exact value of the tokens' `iss` claim.")
    audience: list[str] = Field(min_length=1, description="Accepted values of the tokens' `aud` claim.")
    jwks: str = Field(
        min_length=1, description="Key set of the provider: an https URL, or a file relative to the configuration file."
    )
    algorithms: list[Algorithm] = Field(["RS256", "ES256"], min_length=1, description="Accepted signature algorithms.")
    name_claim: str = Field("sub", min_length=1, description="Claim with the caller's name for logs and usage reports.")
    permissions: list[Permission] = Field(
        ["chat", "completions", "embeddings", "responses", "messages", "rerank", "tokenize"],
        description="Endpoints its callers may call.",
    )
    models: list[str] = Field(["*"], description="Models its callers may use, as shell patterns.")


class AuthConfig(Section):
    """Keys and tokens that clients authenticate with."""

    enabled: bool = Field(True, description="Require a key or token.")
    secret_key: str | None = Field(
        None, repr=False, description="Secret that signs short-lived tokens; at least 32 bytes, or ${ENV}."
    )
    algorithm: Literal["HS256"] = Field("HS256", description="Signature algorithm of tokens.")
    tokens: bool | None = Field(
        None,
        description="Offer POST /auth/token. null: only if secret_key is strong; true: refuse to start if it is weak.",
    )
    token_timeout: Seconds = Field(3600, gt=0, le=86400 * 30, description="Longest validity of a token in seconds.")
    api_keys: list[ApiKeyConfig] = Field(
        [],
        description="Keys defined in this file.",
        examples=[[{"key": "${LLM_API_KEY}", "name": "default", "permissions": ["all"], "models": ["*"]}]],
    )
    issuers: list[IssuerConfig] = Field([], description="Identity providers whose tokens are accepted as well.")

    @property
    def are_tokens_on(self) -> bool:
        return self.tokens is not False and not is_weak_secret(self.secret_key)


Level = Literal["TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"]


class LoggingConfig(Section):
    """Logs of gateway and manager; each engine's output has a file of its own beside them."""

    level: Annotated[Level, BeforeValidator(lambda word: word.upper() if isinstance(word, str) else word)] = Field(
        "INFO", description="Least severe level that is logged."
    )
    format: str = Field(
        "{time:YYYY-MM-DD HH:mm:ss} | {level} | {message}", description="Format of a line, in loguru's syntax."
    )
    retention: str | int | None = Field(
        "7 days", description="Age after which old files are deleted, or number of files to keep; null: keep all."
    )
    rotation: str | int | None = Field("1 day", description="Age or size at which a new file begins; null: never.")
    path: str = Field("logs", description="Directory of the log files, relative to the configuration file.")
    console: bool = Field(True, description="Log to standard error as well.")


class ModelConfig(Section):
    """A model."""

    path: str = Field(min_length=1, description="A .gguf file, a Hugging Face folder or hub id, or a URL.")
    type: ModelType = Field("auto", description="Model family; selects parsers and template defaults.")
    engine: EngineChoice = Field(
        "auto", description="Engine to use; auto: llama_cpp for .gguf, vllm for a folder or hub id, remote for a URL."
    )
    task: Literal["auto", "generate", "embed", "rank"] = Field(
        "auto", description="Task the model is loaded for; auto: as its files say; a generating model also embeds."
    )
    aliases: list[Name] = Field([], description="Other names of the model for clients.")
    adapters: dict[Name, Annotated[str, Field(min_length=1)]] = Field(
        {}, description="vLLM: LoRA adapters as {NAME: FOLDER}; each NAME is a model for clients."
    )
    max_tokens: int | None = Field(None, ge=16, description="Context length in tokens; default: the model's own.")
    quantization: str | None = Field(
        None, description="vLLM: quantization method, if the model's files do not name it."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="Number of devices the model is split across.")
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Fraction of each GPU's memory to use; default: the engine's; ignored without a GPU.",
    )
    gpus: list[int] | None = Field(None, description="NVIDIA devices to use, by number; default: devices.gpus.")
    sleep: bool = Field(False, description="vLLM on GPUs: free memory by sleeping instead of ending the process.")
    trust_remote_code: bool = Field(False, description="Run Python code shipped with the model.")
    unload_timeout: Seconds | None = Field(None, description="Override of models.unload_timeout; 0: never unload.")
    mmproj: str | None = Field(None, description="llama.cpp: file of the vision projector.")
    api_key: SentSecret | None = Field(None, repr=False, description="Remote: API key, as ${ENV}.")
    upstream_model: str | None = Field(None, description="Remote: name of the model at the remote server.")
    engine_args: dict[str, Any] = Field({}, description="Further arguments, passed to the engine unchanged.")
    env: dict[str, str] = Field({}, repr=False, description="Further environment variables of the engine.")


class ModelsConfig(Section):
    """Models to serve, and when they are loaded and unloaded."""

    default: str | None = Field(
        None, description="Model of requests that name none.", examples=["SmolLM2-135M-Instruct"]
    )
    preload: list[str] = Field([], description="Models to load at start and keep loaded.")
    max_loaded: int = Field(
        1, ge=1, description="Maximum number of loaded models; the least recently used is unloaded for another."
    )
    unload_timeout: Seconds = Field(3600, description="Seconds without a request until a model is unloaded; 0: never.")
    sleep_timeout: Seconds = Field(
        300,
        description="Seconds without a request until a model with sleep: true is put to sleep; 0: never.",
    )
    deep_sleep_timeout: Seconds = Field(
        1800, description="Seconds without a request until a sleeping model's weights are dropped from RAM; 0: never."
    )
    load_timeout: Seconds = Field(600, gt=0, description="Longest duration of a load in seconds; a longer one fails.")
    min_loaded_time: Seconds = Field(
        1, description="Seconds a model stays loaded before it may be unloaded for another."
    )
    max_wait_time: Seconds = Field(
        5, description="Seconds a request waits for a busy model to become idle; then that model gets no new requests."
    )
    models_dir: str = Field(
        "models", description="Base of relative model paths, itself relative to the configuration file."
    )
    available: dict[Name, ModelConfig] = Field(
        {},
        description="The models, by name.",
        examples=[{"SmolLM2-135M-Instruct": {"path": "SmolLM2-135M-Instruct.Q4_1.gguf", "type": "llama"}}],
    )


class DevicesConfig(Section):
    """Memory that models may use; memory held by other programs is measured before each load."""

    memory: Size | None = Field(
        None, ge=1, description="RAM limit for all models together, such as 16GiB; default: nearly all RAM."
    )
    sleep_memory: Size | None = Field(
        None, description="RAM limit for weights of sleeping models, within devices.memory; default: half of it."
    )
    gpus: list[int] | None = Field(
        None, description="NVIDIA devices to use, by number as in nvidia-smi; default: all, or CUDA_VISIBLE_DEVICES."
    )


class LimitsConfig(Section):
    """Queue lengths, and the timeout of stalled engines."""

    queue_per_model: int = Field(
        1000, ge=1, description="Maximum number of requests waiting for one model; further ones get 503."
    )
    queue_per_key: int = Field(
        500, ge=1, description="Maximum number of waiting requests of one key, for all models; further ones get 429."
    )
    when_loading: Literal["wait", "reject"] = Field(
        "wait", description="Handling of requests while their model loads; reject: 503 at once, and the load continues."
    )
    stall_timeout: Seconds = Field(
        120, description="Seconds without progress after which a busy engine is restarted; 0: never."
    )


class InferenceConfig(Section):
    """Limits and defaults of every model."""

    max_total_tokens: int | None = Field(
        None, ge=16, description="Maximum number of tokens of prompt and completion together."
    )
    max_input_tokens: int | None = Field(None, ge=1, description="Maximum number of tokens of a prompt.")
    max_batch_size: int | None = Field(
        None, ge=1, description="Maximum number of requests a model processes at once; others wait."
    )
    max_image_pixels: int = Field(
        96_000_000, ge=1, description="Maximum number of decoded pixels of all images of a request together."
    )
    max_images: int = Field(100, ge=1, description="Maximum number of images of a request.")
    streaming_default: bool = Field(
        False, description="Stream if a request omits `stream` and accepts text/event-stream."
    )
    optimize_first_token: bool = Field(
        True, description="Use the prefix cache, favour prefill, and warm models up before they are ready."
    )


class MediaConfig(Section):
    """Images that requests give by URL; the gateway fetches them, engines never do."""

    hosts: list[str] = Field(
        [],
        description="Hosts that images may be fetched from by https, as shell patterns; name a port unless it is 443."
        " Empty: only data: URLs.",
    )
    timeout: float = Field(
        10, gt=0, description="Longest duration of fetching one image in seconds, redirects included."
    )
    max_bytes: int = Field(20 * 1024 * 1024, ge=1, description="Maximum size of one image in bytes.")
    max_redirects: int = Field(
        3, ge=0, le=10, description="Maximum number of redirects to follow; each target is checked like a URL."
    )


class StorageConfig(Section):
    """Database of keys made while the server runs, of their changes and of usage."""

    url: str = Field(
        "sqlite:///llm-api-server.db",
        repr=False,
        description="Database: sqlite:///FILE, relative to the configuration file, or postgresql://USER:PASSWORD@HOST/NAME.",
    )
    key_grace: Seconds = Field(
        3600, description="Seconds that keys already seen stay valid while the database is unreachable."
    )
    keep_requests: Days = Field(30, description="Days to keep the row of each request.")
    keep_hours: Days = Field(90, description="Days to keep hourly totals.")
    keep_days: Annotated[Days, Field(ge=31)] = Field(1100, description="Days to keep daily totals; at least 31.")
    record_prompts: bool = Field(False, description="Store prompts as well, for keep_requests days.")


class TracingConfig(Section):
    """Traces of requests, exported to a collector by OTLP over HTTP."""

    endpoint: str | None = Field(None, description="Address of the collector, such as http://127.0.0.1:4318.")
    headers: dict[HeaderName, HeaderValue] = Field(
        {}, repr=False, description="Headers to send to the collector, such as authorization: ${ENV}."
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="Fraction of requests to trace, if the caller has not decided."
    )
    service_name: str = Field("llm-api-server", min_length=1, description="Name of this server in traces.")

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str | None) -> str | None:
        url = urlsplit(endpoint or "http://none")
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise ValueError("give the address of an OTLP over HTTP receiver, such as http://127.0.0.1:4318")
        return endpoint


class VllmConfig(Section):
    """Settings of vLLM."""

    python: str | None = Field(None, description="Python interpreter with vLLM; default: .venv-vllm, else this one.")
    zygote: bool = Field(True, description="Import vLLM once and fork engines from that process: loads take seconds.")


class LlamaCppConfig(Section):
    """Settings of llama.cpp."""

    python: str | None = Field(None, description="Python interpreter with xllamacpp; default: this one.")
    threads: int | None = Field(None, ge=1, description="Number of CPU threads; default: the physical cores.")


class EnginesConfig(Section):
    """Programs that run the models; each may live in a Python environment of its own."""

    vllm: VllmConfig = VllmConfig()
    llama_cpp: LlamaCppConfig = LlamaCppConfig()


class Config(Section):
    """The whole file. `source` is its path; relative paths start at its folder."""

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
        """Return the location of a model's file or folder; `path` is neither a URL nor a hub id."""
        return self.models_dir / Path(path).expanduser()

    @property
    def storage_url(self) -> str:
        """`storage.url` with an absolute path if it is a file of SQLite."""
        scheme, found, file = self.storage.url.partition("sqlite:///")
        if scheme or not found or file in {"", ":memory:"}:
            return self.storage.url
        return f"sqlite:///{self.folder / Path(file).expanduser()}"

    @property
    def vllm_python(self) -> str:
        """`engines.vllm.python`, else `.venv-vllm` beside the file or the project, else this interpreter."""
        if self.engines.vllm.python:
            return self._interpreter(self.engines.vllm.python)
        for folder in (self.folder, Path(sys.prefix).parent, _PROJECT):
            python = folder / ".venv-vllm" / "bin" / "python"
            if python.exists():
                return str(python)
        return sys.executable

    @property
    def llama_cpp_python(self) -> str:
        python = self.engines.llama_cpp.python
        return self._interpreter(python) if python else sys.executable

    def _interpreter(self, python: str) -> str:
        """Resolve a path; a bare name is left to the search in PATH."""
        return str(self.folder / Path(python).expanduser()) if "/" in python else python

    @property
    def run_dir(self) -> Path:
        """Directory of sockets and process records, the same for every process with this configuration file."""
        if self.server.run_dir:
            return self.folder / Path(self.server.run_dir).expanduser()
        return default_run_dir(self.source)

    def ensure_run_dir(self) -> Path:
        """Create the run directory for this user alone. Raises `ConfigError` if that fails or others could write."""
        path = self.run_dir
        make_private([path] if self.server.run_dir else [path.parent, path])
        return path
