"""The vLLM adapter: sizes the context and the cache, chooses parsers and builds the arguments of `vllm serve`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loguru import logger

from llm_api_server.config.models import ModelConfig
from llm_api_server.devices.host import Host
from llm_api_server.engines import explain, readiness
from llm_api_server.engines.base import LaunchPlan, ModelFacts, ModelProblem, Need, Placement, SleepFootprint, Warmup
from llm_api_server.engines.families import Clues, Parsers, family_of, parsers_for
from llm_api_server.engines.model_formats.chat_template import given_template, template_text
from llm_api_server.engines.model_formats.hf_folder import FolderFacts, read_folder
from llm_api_server.engines.model_formats.lora_adapters import adapter_options
from llm_api_server.engines.settings import EngineSettings
from llm_api_server.engines.vllm.engine_args import (
    checked,
    command_line,
    names_parsers,
    positive_integer,
    positive_number,
    underscored_names,
    unknown_parsers,
)
from llm_api_server.engines.vllm.installed import InstalledVllm, ParserNames, VllmNotInstalled
from llm_api_server.formats import memory_size
from llm_api_server.types import EngineName, Task

# Deprecated in favour of `vllm serve`, which fails on builds whose distribution is not called `vllm`.
_MODULE = "vllm.entrypoints.openai.api_server"

_DEFAULT_CPU_SEQUENCES = 4
_DEFAULT_GPU_SEQUENCES = 256
_MIN_CONTEXT = 4096
#: Block size of vLLM's cache on CPUs. Each sequence may leave half of one unused.
_BLOCK_TOKENS = 128
_GIB = 1024**3
_CACHE_VALUE_BYTES = 2
#: Images per request: more than chats send, few enough that the engine's server stays responsive meanwhile.
_MAX_IMAGES = 16
#: Fraction of a GPU that vLLM takes by default.
_DEFAULT_SHARE = 0.9
#: Size of the weights behind a hub id, in messages.
_UNKNOWN_SIZE = "whose size is not known before they are downloaded"
#: Memory besides weights and cache: on a CPU that of vLLM's three processes; on a GPU the minimum, and the maximum with
#: buffers of a step and graphs.
_CPU_OVERHEAD = 3 * _GIB // 2
_MIN_GPU_OVERHEAD = _GIB
_MAX_GPU_OVERHEAD = 3 * _GIB
#: GPU memory that a sleeping engine keeps: contexts, graphs, communication buffers.
_SLEEPING_BYTES = 2 * _GIB
#: Tokens per step on GPUs: large, so that prefill of a long prompt takes few steps.
_PREFILL_TOKENS = 8192

_EMBEDDING_TASKS: tuple[Task, ...] = ("embed", "rank", "score", "pool")
_RANKING_TASKS: tuple[Task, ...] = ("rank", "score", "classify", "pool")
_CLASSIFYING_TASKS: tuple[Task, ...] = ("classify", "pool")

_LOG_PREFIX = re.compile(
    r"^(?:\([^)]*\) )?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?", re.MULTILINE
)
_REASONS = [
    (r"No module named '?vllm\b", "vLLM is not installed where engines.vllm.python points; run `make vllm`"),
    (r"error: (unrecognized arguments: .*|argument .*)$", r"vLLM does not accept engine_args: \1"),
    (r"(Model architectures \[.*?\] are not supported)", r"\1 by this version of vLLM"),
    (r"(?:CUDA|HIP) out of memory.*?(Tried to allocate [^.]*)", explain.OUT_OF_MEMORY + r" on the device: \1"),
    (r"((?:Available|Free) memory on (?:node|device).*?)(?: On the CPU backend,| Decrease GPU|$)", r"\1"),
    (r"Value error, (.*?)(?: \[type=|$)", r"\1"),
]
#: `configuration` ends when the worker starts, after its own imports if it is not forked.
_PHASE_MARKS = (
    ("imports", r"non-default args|vLLM API server version|\bversion \d"),
    ("configuration", r"Starting to load model|Initializing model took"),
    ("weights", r"Loading weights took|Model loading took"),
    ("kv_cache", r"KV cache size|init engine"),
    ("server", r"Application startup complete"),
)
_EXCEPTION = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?([A-Z]\w*(?:Error|Exception)): (.+)$", re.MULTILINE)
#: Errors raised in one process because another has failed; never the reason.
_WRAPPERS = ("Engine core initialization failed", "WorkerProc initialization failed", "Cancelled", "EngineCore")


@dataclass(frozen=True)
class _Sizing:
    """Sizes of an instance; None: left to vLLM."""

    context: int | None
    sequences: int | None
    cache_bytes: int | None = None
    #: Total memory of the engine, on CPUs only.
    memory_bytes: int = 0


class VllmEngine:
    """Adapter of vLLM (`base.Engine`). `inspect`, which may block, fetches the parsers that vLLM registers."""

    name: EngineName = "vllm"
    phase_marks: Sequence[tuple[str, str]] = _PHASE_MARKS

    def __init__(self, settings: EngineSettings, host: Host, *, zygote: bool = True) -> None:
        self._python = settings.python
        self._inference = settings.inference
        self._template_folders = settings.template_folders
        self._host = host
        self._zygote = zygote
        self._installed = InstalledVllm(settings.python)
        self._registered: ParserNames | None = None

    def inspect(self, model: ModelConfig) -> ModelFacts:
        if "CUDA_VISIBLE_DEVICES" in model.env:
            raise ModelProblem("env: CUDA_VISIBLE_DEVICES is set by the server; name the devices with gpus: [0, 1]")
        facts = self._facts(model)
        self._check_parsers(model, facts)
        adapter_options(model.adapters, facts)
        task = _task(model, facts)
        sizing = self._sizing(model, facts)
        return ModelFacts(
            context_length=sizing.context,
            vision=facts.has_vision and task != "embed" if facts else None,
            tasks=_tasks(task, facts),
            embedding_tasks=_EMBEDDING_TASKS if task == "generate" else (),
            need=self._need(model, facts, sizing),
            sleep_footprint=self._sleep_footprint(model, facts),
            slots=positive_integer(model, "max_num_seqs") or self._sequences(sizing, task),
        )

    def plan(self, name: str, model: ModelConfig, socket: Path, placement: Placement | None = None) -> LaunchPlan:
        facts = self._facts(model)
        task = _task(model, facts)
        given = checked(model.engine_args, has_adapters=bool(model.adapters))
        if (template := given_template(self._template_folders, given)) is not None:
            given["chat_template"] = str(template)
        options = self._options(name, model, facts, task) | self._device_options(facts, placement) | given
        options.setdefault("enable_auto_tool_choice", True if options.get("tool_call_parser") else None)
        fixed = {"model": model.path, "served_model_name": name, "uds": str(socket)}
        return LaunchPlan(
            argv=[self._python, "-m", _MODULE, *command_line(fixed | options)],
            address=f"unix:{socket}",
            env=self._env(is_local=facts is not None) | _visible_devices(placement) | model.env,
            warmup=self._warmup(name, task),
            is_forkable=self._zygote,
        )

    async def wait_ready(self, plan: LaunchPlan) -> None:
        await readiness.wait_healthy(plan.address)
        await readiness.warm_up(plan)

    def explain_failure(self, log_tail: str, exit_code: int | None) -> str:
        text = _LOG_PREFIX.sub("", log_tail)
        if known := explain.first_match(_REASONS, text):
            return known
        causes = [m for m in _EXCEPTION.finditer(text) if not m[2].startswith(_WRAPPERS)]
        if causes:
            return explain.without_paths(f"vLLM: {causes[-1][2]}")
        return explain.exit_reason("vLLM", exit_code)

    def _facts(self, model: ModelConfig) -> FolderFacts | None:
        """Return None for a hub id, of which nothing is known without the network."""
        path = Path(model.path)
        if not path.is_absolute():
            return None
        if not path.exists():
            raise ModelProblem("the model's path does not exist; check models.available.NAME.path")
        if path.is_file():
            raise ModelProblem("the model's path is a file; vLLM needs the folder with config.json")
        return read_folder(path)

    def _sizing(self, model: ModelConfig, facts: FolderFacts | None) -> _Sizing:
        own = facts.context_length if facts else None
        lengths = [n for n in (model.max_tokens, self._inference.max_total_tokens) if n]
        context = min([*lengths, *([own] if own else [])]) if lengths else None
        if self._host.has_nvidia:
            sequences = self._inference.max_batch_size or _DEFAULT_GPU_SEQUENCES
            return _Sizing(positive_integer(model, "max_model_len") or context or own, sequences)
        return self._cpu_sizing(model, facts, context or own)

    def _cpu_sizing(self, model: ModelConfig, facts: FolderFacts | None, context: int | None) -> _Sizing:
        """Size the cache in bytes, because vLLM would otherwise claim nearly all RAM and fail if it is in use."""
        sequences = self._inference.max_batch_size or _DEFAULT_CPU_SEQUENCES
        budget = self._host.memory_bytes // 4
        token_bytes = facts.kv_values_per_token * _CACHE_VALUE_BYTES if facts else 0
        if token_bytes and context and not (model.max_tokens or self._inference.max_total_tokens):
            context = min(context, max(_MIN_CONTEXT, budget // token_bytes - _BLOCK_TOKENS))
        context = positive_integer(model, "max_model_len") or context
        tokens = (context or _MIN_CONTEXT) + _BLOCK_TOKENS
        cache = max(min(tokens * sequences * token_bytes, budget), tokens * token_bytes) if token_bytes else _GIB
        needed = (facts.weight_bytes if facts else _GIB) + cache + _CPU_OVERHEAD
        return _Sizing(context, sequences, cache, needed)

    def _sequences(self, sizing: _Sizing, task: str) -> int | None:
        """Return the number of concurrent sequences; for pooling models vLLM chooses it unless configured."""
        return sizing.sequences if task == "generate" else self._inference.max_batch_size

    def _need(self, model: ModelConfig, facts: FolderFacts | None, sizing: _Sizing) -> Need:
        if not self._host.has_nvidia:
            weights = (
                f"{memory_size(facts.weight_bytes)} of weights"
                if facts
                else f"{memory_size(_GIB)} for weights {_UNKNOWN_SIZE}"
            )
            cache = memory_size(sizing.cache_bytes or 0)
            note = f"{weights}, {cache} of cache, {memory_size(_CPU_OVERHEAD)} for vLLM"
            return Need("ram", sizing.memory_bytes, note=note)
        count = model.tensor_parallel_size * (positive_integer(model, "pipeline_parallel_size") or 1)
        weights_bytes = facts.weight_bytes // count if facts else 0
        share = positive_number(model, "gpu_memory_utilization") or model.gpu_memory_utilization
        return Need(
            "gpu",
            weights_bytes + _MIN_GPU_OVERHEAD,
            count,
            share or _DEFAULT_SHARE,
            is_share_soft=share is None,
            measures_memory=True,
            gpus=None if model.gpus is None else tuple(model.gpus),
            note=f"{memory_size(weights_bytes)} of weights on each" if facts else f"without weights, {_UNKNOWN_SIZE}",
        )

    def _sleep_footprint(self, model: ModelConfig, facts: FolderFacts | None) -> SleepFootprint | None:
        """Return None on CPUs, where vLLM cannot sleep, and for hub ids, whose weights have no known size."""
        if not (model.sleep and self._host.has_nvidia and facts):
            return None
        return SleepFootprint(_SLEEPING_BYTES, facts.weight_bytes)

    def _device_options(self, facts: FolderFacts | None, placement: Placement | None) -> dict[str, Any]:
        """Return the share of the devices that vLLM may use.

        Beside another instance the cache size is given in bytes, because vLLM would count memory that the other
        allocates or frees during the start as its own.
        """
        if placement is None or not placement.devices or not self._host.has_nvidia:
            return {}
        options: dict[str, Any] = {"gpu_memory_utilization": math.floor(placement.share * 1000) / 1000}
        if placement.is_shared and facts is not None:
            weights = facts.weight_bytes * 21 // 20 // len(placement.devices)
            cache = min(device.size for device in placement.devices) - weights - _MAX_GPU_OVERHEAD
            if cache > 0:
                options["kv_cache_memory_bytes"] = cache
        return options

    def _options(self, name: str, model: ModelConfig, facts: FolderFacts | None, task: str) -> dict[str, Any]:
        sizing = self._sizing(model, facts)
        options: dict[str, Any] = {
            "max_model_len": self._passed_context(model, facts, sizing, task),
            "max_num_seqs": self._sequences(sizing, task),
            "tensor_parallel_size": model.tensor_parallel_size if model.tensor_parallel_size > 1 else None,
            "quantization": model.quantization,
            "gpu_memory_utilization": model.gpu_memory_utilization if self._host.has_nvidia else None,
            "trust_remote_code": model.trust_remote_code or None,
            "disable_uvicorn_access_log": True,
            **adapter_options(model.adapters, facts),
        }
        if facts and facts.has_vision:
            options |= _vision_options(facts)
        if task == "generate":
            options |= self._generation_options(name, model, facts)
        else:
            options |= {"runner": "pooling", "convert": _conversion(task, facts)}
        if self._sleep_footprint(model, facts) is not None:
            options["enable_sleep_mode"] = True
        if not self._host.has_nvidia:
            options |= self._cpu_options(sizing)
        return options

    def _passed_context(self, model: ModelConfig, facts: FolderFacts | None, sizing: _Sizing, task: str) -> int | None:
        """Return the context length if it may differ from the one vLLM derives."""
        is_configured = bool(model.max_tokens or self._inference.max_total_tokens)
        is_reduced = facts is not None and sizing.context != facts.context_length
        is_sized = not self._host.has_nvidia and (task == "generate" or is_reduced)
        return sizing.context if is_configured or is_sized else None

    def _generation_options(self, name: str, model: ModelConfig, facts: FolderFacts | None) -> dict[str, Any]:
        parsers = self._default_parsers(name, model, facts)
        favours_first_token = self._inference.optimize_first_token
        return {
            "enable_prefix_caching": favours_first_token,
            "max_num_batched_tokens": _PREFILL_TOKENS if favours_first_token and self._host.has_nvidia else None,
            "tool_call_parser": parsers.tool,
            "reasoning_parser": parsers.reasoning,
        }

    def _default_parsers(self, name: str, model: ModelConfig, facts: FolderFacts | None) -> Parsers:
        """Return the parsers of the model's family that the installed vLLM has."""
        parsers = self._family_parsers(model, facts)
        if self._registered is None:
            return parsers
        tool = parsers.tool if parsers.tool in self._registered.tool else None
        reasoning = parsers.reasoning if parsers.reasoning in self._registered.reasoning else None
        for wanted, kept in ((parsers.tool, tool), (parsers.reasoning, reasoning)):
            if wanted != kept:
                logger.warning(
                    "model {}: the installed vLLM has no parser '{}'; it is served without one", name, wanted
                )
        return Parsers(tool, reasoning)

    def _family_parsers(self, model: ModelConfig, facts: FolderFacts | None) -> Parsers:
        clues = Clues(model.path.lower())
        if facts is not None:
            clues = Clues(Path(model.path).name.lower(), facts.model_type, facts.template, facts.tokens)
        if (template := given_template(self._template_folders, underscored_names(model.engine_args))) is not None:
            clues = replace(clues, template=template_text(template))
        return parsers_for(family_of(model.type, clues), clues)

    def _check_parsers(self, model: ModelConfig, facts: FolderFacts | None) -> None:
        """Raise `ModelProblem` if the entry names a parser that vLLM does not have."""
        if self._family_parsers(model, facts) == Parsers() and not names_parsers(model):
            return
        try:
            self._registered = self._installed.parser_names(may_import=True)
        except VllmNotInstalled:
            return  # the load reports it
        for _, sentence in unknown_parsers(model, self._registered):
            raise ModelProblem(sentence)

    def _cpu_options(self, sizing: _Sizing) -> dict[str, Any]:
        """Return options without compilation: it gave a small model 20 % more tokens/s, but starts of 60 s, not 3 s."""
        share = min(0.9, max(0.05, round(sizing.memory_bytes / self._host.memory_bytes, 2)))
        return {
            "gpu_memory_utilization": share,
            "kv_cache_memory_bytes": sizing.cache_bytes,
            "enforce_eager": True,
            "compilation_config": {"custom_ops": ["none"]},
        }

    def _env(self, *, is_local: bool) -> dict[str, str]:
        env = {
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_MAX_IMAGE_PIXELS": str(self._inference.max_image_pixels),  # vLLM's default may be lower
            # Endpoints that abort a request and put the engine to sleep; only this server can reach its socket.
            "VLLM_SERVER_DEV_MODE": "1",
            "PYTHONSAFEPATH": "1",  # `-m` must not import from the folder the server was started in
            # vLLM builds kernels at run time with the `ninja` of its own environment.
            "PATH": os.pathsep.join([str(Path(self._python).parent), os.environ.get("PATH", os.defpath)]),
        }
        if is_local:
            env["HF_HUB_OFFLINE"] = "1"
        if not self._host.has_nvidia:
            # Not bound to cores: several engines would all use the first ones.
            env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(self._host.cores)}
        return env

    def _warmup(self, name: str, task: str) -> Warmup | None:
        if not self._inference.optimize_first_token or task == "rank":
            return None
        if task == "embed":
            return Warmup("/v1/embeddings", {"model": name, "input": "Hello"})
        return Warmup("/v1/completions", {"model": name, "prompt": "Hello", "max_tokens": 1})


def _vision_options(facts: FolderFacts) -> dict[str, Any]:
    """Return limits of media per request. vLLM's default is 999, and it reserves memory for the largest video."""
    return {
        "limit_mm_per_prompt": {"image": _MAX_IMAGES, "video": int(facts.has_video), "audio": int(facts.has_audio)},
        # With vLLM 0.32's cache of processed images, `/v1/messages/count_tokens` makes the next request with the same
        # image fail: the server assumes that the engine has an image it never sent.
        "mm_processor_cache_gb": 0,
    }


def _visible_devices(placement: Placement | None) -> dict[str, str]:
    indexes = [str(device.index) for device in placement.devices if device.index is not None] if placement else []
    if not indexes:
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(indexes)}


def _task(model: ModelConfig, facts: FolderFacts | None) -> str:
    """Return `generate`, `embed`, or `rank` for a classifier; with a single label it serves `/rerank`, `/score`."""
    args = underscored_names(model.engine_args)
    overrides = args.get("hf_overrides")
    override = overrides.get("architectures") if isinstance(overrides, dict) else None
    architectures = override if isinstance(override, list) else facts.architectures if facts else ()
    if any(str(one).endswith("ForSequenceClassification") for one in architectures):
        return "rank"
    if model.task != "auto":
        return model.task
    if args.get("runner") == "pooling":
        return "rank" if args.get("convert") == "classify" else "embed"
    return "embed" if facts and facts.is_embedding else "generate"


def _conversion(task: str, facts: FolderFacts | None) -> str | None:
    """Return the conversion of a generative model for pooling; vLLM detects it for the embeddings of a hub id."""
    if task == "rank":
        return "classify" if facts is None or facts.is_generative else None
    return "embed" if facts and facts.is_generative else None


def _tasks(task: str, facts: FolderFacts | None) -> tuple[Task, ...]:
    """Return the tasks of vLLM's server. It ranks with embeddings, by cosine, and with classifiers of one label."""
    if task == "generate":
        return ("generate",)
    if task == "embed":
        return _EMBEDDING_TASKS
    return _RANKING_TASKS if facts is None or facts.labels in {1, None} else _CLASSIFYING_TASKS
