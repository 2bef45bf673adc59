"""The only declaration of an option: one pydantic model per section of `config.yaml`, and how the file is read.

The field descriptions feed `config.example.yaml`, the JSON schema and the documentation. Reading collects every
problem of a file, with its line, before it raises.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llm_api_server.types import EngineChoice, ModelType, Permission

Seconds = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ServerConfig(Section):
    host: str = Field("127.0.0.1", description="Listen address; 0.0.0.0 for all interfaces.")
    port: int = Field(8050, ge=0, le=65535, description="Listen port; 0 picks a free one.")
    workers: int = Field(1, ge=1, le=256, description="API worker processes. They share the loaded models.")
    timeout: Seconds = Field(300, gt=0, description="Seconds a request may take, queue and load included.")
    drain_timeout: Seconds = Field(30, description="Seconds that running requests may take to finish on SIGTERM.")
    max_body_bytes: int = Field(64 * 1024 * 1024, ge=1024, description="Largest request body; beyond it 413.")
    cors_origins: list[str] = Field([], description="Origins that browsers may call from; empty: CORS is off.")
    allow_unauthenticated: bool = Field(
        False, description="Permit auth.enabled: false on an address that is not loopback."
    )
    run_dir: str | None = Field(
        None, description="Directory for sockets and process records; default: per user and configuration file."
    )


class ApiKeyConfig(Section):
    key: str = Field(min_length=8, description="The key, or `sha256:` and its hex digest, or ${ENV}.")
    name: Name = Field(description="Shown in logs and accounts instead of the key.")
    permissions: list[Permission] = Field(["all"], description="What it may call.")
    models: list[str] = Field(["*"], description="Models it may use; shell patterns.")


class AuthConfig(Section):
    enabled: bool = Field(True, description="Require a key.")
    secret_key: str | None = Field(None, description="Signs short-lived tokens; at least 32 bytes, or ${ENV}.")
    algorithm: Literal["HS256"] = Field("HS256", description="How tokens are signed.")
    tokens: bool | None = Field(
        None,
        description="POST /auth/token. Unset: on when secret_key is a real secret; true: refuse to start without one.",
    )
    token_timeout: Seconds = Field(3600, gt=0, le=86400 * 30, description="Longest life of a token, in seconds.")
    api_keys: list[ApiKeyConfig] = Field([], description="Keys known from the start.")


class LoggingConfig(Section):
    level: Literal["TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"] = Field(
        "INFO", description="Least severe level that is written."
    )
    format: str = Field(
        "{time:YYYY-MM-DD HH:mm:ss} | {level} | {message}", description="loguru format of a line."
    )
    retention: str | int | None = Field("7 days", description="How long old files are kept.")
    rotation: str | int | None = Field("1 day", description="When a new file is begun.")
    path: str = Field("logs", description="Directory of the log files, relative to the configuration file.")
    console: bool = Field(True, description="Also write to standard error.")


class ModelConfig(Section):
    path: str = Field(min_length=1, description="A .gguf file, a Hugging Face folder or hub id, or a URL.")
    type: ModelType = Field("auto", description="Model family: sets parsers and template defaults.")
    engine: EngineChoice = Field("auto", description="auto: .gguf llama_cpp, folder or hub id vllm, URL remote.")
    task: Literal["auto", "generate", "embed"] = Field("auto", description="What the model is loaded for.")
    aliases: list[Name] = Field([], description="Other names that clients may use.")
    max_tokens: int | None = Field(None, ge=16, description="Context length; default: the model's own.")
    quantization: str | None = Field(None, description="vLLM's quantization method, when the files do not say.")
    tensor_parallel_size: int = Field(1, ge=1, description="Devices that share the model.")
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="Share of each device's memory; default: the engine's."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    unload_timeout: Seconds | None = Field(None, description="Overrides models.unload_timeout; 0: never unload.")
    mmproj: str | None = Field(None, description="llama.cpp: file of the vision projector.")
    api_key: str | None = Field(None, description="Remote: its key, as ${ENV}.")
    upstream_model: str | None = Field(None, description="Remote: the model's name there.")
    engine_args: dict[str, Any] = Field({}, description="Further arguments, passed to the engine as they are.")
    env: dict[str, str] = Field({}, description="Further environment variables of the engine.")


class ModelsConfig(Section):
    default: str | None = Field(None, description="Model of requests that name none.")
    preload: list[str] = Field([], description="Loaded at start and kept.")
    max_loaded: int = Field(1, ge=1, description="Most models loaded at once; the least recently used makes room.")
    unload_timeout: Seconds = Field(3600, description="Seconds without a request until a model is unloaded; 0: never.")
    load_timeout: Seconds = Field(600, gt=0, description="Seconds a load may take until it counts as failed.")
    min_loaded_time: Seconds = Field(1, description="Seconds a model stays before it makes room for another.")
    max_wait_time: Seconds = Field(
        5, description="Seconds a request waits for a busy model to become idle before that one takes no new work."
    )
    models_dir: str = Field("models", description="Where relative paths start, relative to the configuration file.")
    available: dict[Name, ModelConfig] = Field({}, description="The models, by name.")


class InferenceConfig(Section):
    max_total_tokens: int | None = Field(None, ge=16, description="Most tokens of prompt and answer together.")
    max_input_tokens: int | None = Field(None, ge=1, description="Most tokens of a prompt.")
    max_batch_size: int | None = Field(None, ge=1, description="Sequences decoded together.")
    streaming_default: bool = Field(
        False, description="Stream when a request omits `stream` and accepts text/event-stream."
    )
    optimize_first_token: bool = Field(True, description="Prefix cache, short prefill chunks and a warm-up.")


class VllmConfig(Section):
    python: str | None = Field(None, description="Interpreter that has vLLM; default: .venv-vllm, else this one.")


class LlamaCppConfig(Section):
    python: str | None = Field(None, description="Interpreter that has xllamacpp; default: this one.")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: the physical cores.")


class EnginesConfig(Section):
    vllm: VllmConfig = VllmConfig()
    llama_cpp: LlamaCppConfig = LlamaCppConfig()


class Config(Section):
    """The whole file. `source` is where it was read from; relative paths start at its folder."""

    server: ServerConfig = ServerConfig()
    auth: AuthConfig = AuthConfig()
    logging: LoggingConfig = LoggingConfig()
    models: ModelsConfig = ModelsConfig()
    inference: InferenceConfig = InferenceConfig()
    engines: EnginesConfig = EnginesConfig()
    source: Path = Field(Path("config.yaml"), exclude=True, repr=False)
