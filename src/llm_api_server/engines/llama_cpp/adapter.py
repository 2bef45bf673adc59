"""The llama.cpp adapter: sizes context, slots and batches by the file's header, and plans the engine process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_api_server.config.models import ModelConfig
from llm_api_server.devices.host import Host
from llm_api_server.engines import explain, readiness
from llm_api_server.engines.base import LaunchPlan, ModelFacts, ModelProblem, Need, Placement, Warmup
from llm_api_server.engines.model_formats.chat_template import given_template, template_text
from llm_api_server.engines.model_formats.gguf import GGUFFacts, read_facts
from llm_api_server.engines.settings import EngineSettings
from llm_api_server.formats import memory_size
from llm_api_server.types import EngineName, Task

_TASKS: dict[str, tuple[Task, ...]] = {
    "generate": ("generate",),
    "both": ("generate", "embed"),
    "embed": ("embed",),
    "rerank": ("rank",),
}

_CHILD = Path(__file__).with_name("llama_cpp_server.py")

_DEFAULT_SLOTS = 4
_MIN_CONTEXT = 4096
_MAX_EMBEDDING_TOKENS = 8192
_CONTEXT_STEP = 256  # llama.cpp rounds up to multiples of it
_MIN_BATCH, _MAX_BATCH = 512, 2048
_POOLING_RANK = 4
_MIB = 1024 * 1024
_MAX_PROMPT_CACHE = 8192 * _MIB
#: Typical size of the compute buffers.
_COMPUTE_BYTES = 256 * _MIB
#: Allowance for compute buffers, outputs, images and the HTTP server in the memory limit.
_SLACK_BYTES = 4096 * _MIB

#: Bytes of one value in the cache by its type, block scales included.
_CACHE_BYTES = {"f32": 4.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32}

#: Architectures that only embed (llama.cpp, llama-arch.cpp); others do so if the file names a pooling type.
_EMBEDDING_ARCHITECTURES = frozenset(
    {
        "bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llama-embed", "modern-bert",
        "neo-bert", "nomic-bert", "nomic-bert-moe", "t5encoder",
    }
)  # fmt: skip

#: Options that the server sets; another value would leave the engine unreachable.
_RESERVED = ("hostnames", "port", "model", "api_keys", "api_prefix", "reuse_port", "ssl_file_cert", "ssl_file_key")

_REASONS = [
    (r"^llama\.cpp: (engine_args: .*|the engine's Python .*)$", r"\1"),
    (r"unknown model architecture: '([^']*)'", r"llama.cpp does not know the model architecture '\1'"),
    (
        r"(?i:(?:unable|failed) to allocate .*buffer|bad_alloc|out of memory)",
        explain.OUT_OF_MEMORY + ": lower max_tokens or inference.max_batch_size, or use a smaller model",
    ),
    (r"failed to open GGUF file .*\((.*)\)", r"the model's file cannot be opened: \1"),
    (r"(tensor '[^']*' data is not within the file bounds)", r"the model's file is damaged or cut off: \1"),
    (r"error loading model: (.*)", r"llama.cpp cannot load the model: \1"),
    (r"couldn't bind HTTP server socket", "the engine's socket cannot be made"),
    (r"(GGML_ASSERT\(.*\) failed)", r"llama.cpp stopped itself: \1"),
    (r"^\d+\.\d+\.\d+\.\d+ E (?!.*exiting due to)(.*)$", r"llama.cpp: \1"),
]


@dataclass(frozen=True)
class Sizing:
    """Sizes of an instance. `context` is that of one slot; `notes` explain reductions, for the engine's log."""

    context: int
    slots: int
    batch: int
    task: str
    notes: tuple[str, ...] = ()


class LlamaCppEngine:
    """Adapter of llama.cpp (`base.Engine`). Caches headers of files by path, size and modification time."""

    name: EngineName = "llama_cpp"
    phase_marks: Sequence[tuple[str, str]] = ()

    def __init__(self, settings: EngineSettings, host: Host, *, threads: int | None = None) -> None:
        self._python = settings.python
        self._inference = settings.inference
        self._template_folders = settings.template_folders
        self._host = host
        self._threads = threads or host.cores
        self._headers: dict[tuple[str, int, int], GGUFFacts] = {}

    def inspect(self, model: ModelConfig) -> ModelFacts:
        if model.adapters:
            raise ModelProblem("adapters need vLLM; llama.cpp takes engine_args: {lora_adapters: [FILE.gguf]}")
        facts = self._facts(Path(model.path))
        vision = bool(model.mmproj) and self._facts(Path(model.mmproj or "")).has_vision_encoder
        sizing = self._sizing(model, facts)
        template = given_template(self._template_folders, model.engine_args)
        chats = facts.has_chat_template or template is not None
        return ModelFacts(
            sizing.context,
            vision,
            _TASKS[sizing.task],
            need=self._need(model, facts, sizing),
            chat_template=chats if sizing.task in {"generate", "both"} else None,
            slots=sizing.slots,
        )

    def plan(self, name: str, model: ModelConfig, socket: Path, placement: Placement | None = None) -> LaunchPlan:
        facts = self._facts(Path(model.path))
        sizing = self._sizing(model, facts)
        params = self._params(name, model, facts, sizing) | _checked(model.engine_args)
        params["hostnames"] = [str(socket)]
        if text := template_text(given_template(self._template_folders, model.engine_args)):
            params["chat_template"] = text
        job = {"params": params, "notes": list(sizing.notes), "memory_limit": self._memory_limit(model, facts, sizing)}
        return LaunchPlan(
            # -I: modules of this folder must not hide those of the standard library.
            argv=[self._python, "-I", str(_CHILD), json.dumps(job, ensure_ascii=False)],
            address=f"unix:{socket}",
            env=self._visible_devices(placement) | model.env,
            warmup=self._warmup(sizing.task),
        )

    async def wait_ready(self, plan: LaunchPlan) -> None:
        await readiness.wait_healthy(plan.address)
        await readiness.warm_up(plan)

    def explain_failure(self, log_tail: str, exit_code: int | None) -> str:
        return explain.first_match(_REASONS, log_tail) or explain.exit_reason("llama.cpp", exit_code)

    def _facts(self, path: Path) -> GGUFFacts:
        try:
            stat = path.stat()
        except OSError:
            return read_facts(path)  # raises the reason
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self._headers:
            self._headers[key] = read_facts(path)
        return self._headers[key]

    def _sizing(self, model: ModelConfig, facts: GGUFFacts) -> Sizing:
        task = _task(model, facts)
        if task in {"embed", "rerank"}:
            return self._embedding_sizing(model, facts, task)
        token_bytes = facts.kv_values_per_token * _cache_bytes(model.engine_args)
        budget = self._host.memory_bytes // 4
        fitting = int(budget // token_bytes) if token_bytes else sys.maxsize
        context, notes = self._context(model, facts, fitting)
        wanted = _integer(model.engine_args, "n_parallel") or self._inference.max_batch_size or _DEFAULT_SLOTS
        slots = max(1, min(wanted, fitting // context))
        if "n_parallel" in model.engine_args:
            slots = wanted
        if slots < wanted:
            size = int(token_bytes * context) // _MIB
            notes.append(
                f"{slots} slots instead of {wanted}: one's cache is {size} MiB, and caches get a quarter of memory"
            )
        if total := _integer(model.engine_args, "n_ctx"):
            context = total if model.engine_args.get("kv_unified") else total // slots
        return Sizing(context, slots, _divisible(self._batch(context, facts, task), slots, task), task, tuple(notes))

    def _need(self, model: ModelConfig, facts: GGUFFacts, sizing: Sizing) -> Need:
        """Return the need of RAM, or of GPU memory for all layers if any are offloaded."""
        mmproj = Path(model.mmproj).stat().st_size if model.mmproj else 0
        size = facts.file_bytes + mmproj + _cache_size(model, facts, sizing) + _COMPUTE_BYTES
        cache = memory_size(_cache_size(model, facts, sizing))
        note = (
            f"{memory_size(facts.file_bytes + mmproj)} of weights, {cache} of cache for "
            f"{_cache_contents(model, sizing)}; less with a lower max_tokens or a smaller model"
        )
        if self._host.has_nvidia and model.engine_args.get("n_gpu_layers"):
            only = None if model.gpus is None else tuple(model.gpus)
            return Need("gpu", size, model.tensor_parallel_size, gpus=only, note=note)
        return Need("ram", size, note=note)

    def _visible_devices(self, placement: Placement | None) -> dict[str, str]:
        """Return the variables that limit the engine to its GPUs, or to none if it was given no GPU memory."""
        if not self._host.has_nvidia:
            return {}
        indexes = [str(device.index) for device in placement.devices if device.index is not None] if placement else []
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(indexes)}

    def _memory_limit(self, model: ModelConfig, facts: GGUFFacts, sizing: Sizing) -> int | None:
        """Return the number of bytes that the process may allocate.

        A request that makes llama.cpp allocate without end, as some grammars do, must end the process and not exhaust
        the machine. Weights count twice, because repacking copies them.
        """
        if self._host.has_nvidia:
            return None  # CUDA maps far more memory than it uses
        files = facts.file_bytes + (Path(model.mmproj).stat().st_size if model.mmproj else 0)
        needed = 2 * files + _cache_size(model, facts, sizing) + self._prompt_cache_bytes + _SLACK_BYTES
        return min(needed, self._host.memory_bytes * 9 // 10)

    @property
    def _prompt_cache_bytes(self) -> int:
        if not self._inference.optimize_first_token:
            return 0
        return min(_MAX_PROMPT_CACHE, self._host.memory_bytes // 16)

    def _context(self, model: ModelConfig, facts: GGUFFacts, fitting: int) -> tuple[int, list[str]]:
        """Return the context length of a slot: as configured, else the model's own as far as it fits in memory."""
        own = facts.context_length or _MIN_CONTEXT
        configured = [n for n in (model.max_tokens, self._inference.max_total_tokens) if n]
        if configured:
            return min(own, *configured), []
        context = min(own, max(_MIN_CONTEXT, fitting // _CONTEXT_STEP * _CONTEXT_STEP))
        if context == own:
            return context, []
        return context, [f"context of {context} tokens instead of the model's {own}, to fit in a quarter of memory"]

    def _embedding_sizing(self, model: ModelConfig, facts: GGUFFacts, task: str) -> Sizing:
        """Size an embedding model. An input must fit in one batch, so the context is the size of a batch."""
        own = facts.context_length or _MIN_BATCH
        configured = [n for n in (model.max_tokens, self._inference.max_total_tokens) if n]
        context = min(own, _MAX_EMBEDDING_TOKENS, *configured)
        context = min(context, self._batch(context, facts, task))
        slots = _integer(model.engine_args, "n_parallel") or self._inference.max_batch_size or _DEFAULT_SLOTS
        return Sizing(context, slots, _divisible(context, slots, task), task)

    def _batch(self, context: int, facts: GGUFFacts, task: str) -> int:
        """Return the number of tokens computed at a time, which is also the longest input to embed.

        The results take 4 bytes per token and vocabulary entry; they get a sixteenth of memory.
        """
        if task == "generate" and self._inference.optimize_first_token:
            return _MIN_BATCH  # short steps, so that a long prompt delays running responses little
        most = _MAX_EMBEDDING_TOKENS if task in {"embed", "rerank"} else _MAX_BATCH
        fitting = self._host.memory_bytes // 16 // (4 * max(1, facts.vocabulary))
        if facts.architecture in _EMBEDDING_ARCHITECTURES:
            fitting = most  # their results have no vocabulary
        return max(_MIN_BATCH, min(context, most, fitting // _MIN_BATCH * _MIN_BATCH))

    def _params(self, name: str, model: ModelConfig, facts: GGUFFacts, sizing: Sizing) -> dict[str, Any]:
        keeps_prefixes = self._inference.optimize_first_token
        params: dict[str, Any] = {
            "model.path": model.path,
            "model_alias": [name],
            "n_ctx": sizing.context * sizing.slots,
            "n_parallel": sizing.slots,
            "n_batch": sizing.batch,
            "n_ubatch": min(sizing.batch, _MIN_BATCH) if sizing.task == "generate" else sizing.batch,
            "cpuparams.n_threads": self._threads,
            "cpuparams_batch.n_threads": self._threads,
            "embedding": sizing.task != "generate",
            "ctx_shift": False,
            "cache_prompt": keeps_prefixes,
            "cache_ram_mib": self._prompt_cache_bytes // _MIB,
            "endpoint_metrics": True,
            "endpoint_slots": False,
            "ui": False,
            "warmup": True,
        }
        if pooling := _pooling(sizing.task, facts):
            params["pooling_type"] = pooling
        if sizing.task != "generate":
            # With one cache per slot llama.cpp splits inputs of unequal length over several steps and pools over the
            # last step alone: wrong embeddings, without an error.
            params |= {"kv_unified": True, "kv_unified_per_slot": sizing.context}
        if model.mmproj:
            params["mmproj.path"] = model.mmproj
        return params

    def _warmup(self, task: str) -> Warmup | None:
        if not self._inference.optimize_first_token or task == "rerank":
            return None
        if task == "embed":
            return Warmup("/v1/embeddings", {"input": "Hello"})
        return Warmup("/v1/completions", {"prompt": "Hello", "max_tokens": 1, "cache_prompt": False})


def _divisible(batch: int, slots: int, task: str) -> int:
    """Round the batch up to a multiple of the slots, without which llama.cpp aborts at start when it pools."""
    return batch if task == "generate" else -(-batch // slots) * slots


def _task(model: ModelConfig, facts: GGUFFacts) -> str:
    """Return `generate`, `embed`, `rerank`, or `both` for a chat model that also embeds."""
    if model.task == "rank":
        return "rerank"
    wanted = str(model.engine_args.get("pooling_type", "")).lower()
    if wanted in {"rank", "llama_pooling_type_rank", str(_POOLING_RANK)} or facts.pooling_type == _POOLING_RANK:
        return "rerank"
    if model.task == "embed" or facts.architecture in _EMBEDDING_ARCHITECTURES:
        return "embed"
    if model.task == "generate" or model.engine_args.get("embedding") is False:
        return "generate"
    return "embed" if facts.pooling_type else "both"


def _pooling(task: str, facts: GGUFFacts) -> str | None:
    if task == "rerank":
        return "rank"
    if task == "generate" or facts.pooling_type:
        return None
    return "mean"


def _checked(engine_args: dict[str, Any]) -> dict[str, Any]:
    for name in engine_args:
        if name.split(".")[0] in _RESERVED:
            raise ModelProblem(f"engine_args: {name} is set by the server and cannot be changed")
    return engine_args


def _integer(engine_args: dict[str, Any], name: str) -> int | None:
    value = engine_args.get(name)
    return value if isinstance(value, int) and value > 0 else None


def _cached_tokens(model: ModelConfig, sizing: Sizing) -> int:
    return _integer(model.engine_args, "n_ctx") or sizing.context * sizing.slots


def _cache_contents(model: ModelConfig, sizing: Sizing) -> str:
    """Return the contents of the cache for messages, such as `4 requests of 2048 tokens`."""
    if sizing.slots == 1 or _integer(model.engine_args, "n_ctx"):
        return f"{_cached_tokens(model, sizing)} tokens"
    return f"{sizing.slots} requests of {sizing.context} tokens"


def _cache_size(model: ModelConfig, facts: GGUFFacts, sizing: Sizing) -> int:
    """Return the size of the key-value cache in bytes."""
    return int(_cached_tokens(model, sizing) * facts.kv_values_per_token * _cache_bytes(model.engine_args))


def _cache_bytes(engine_args: dict[str, Any]) -> float:
    """Return the mean size of a cached number in bytes; keys and values may have different types."""
    kinds = [str(engine_args.get(f"cache_type_{part}", "f16")).lower().removeprefix("ggml_type_") for part in "kv"]
    return sum(_CACHE_BYTES.get(kind, 2.0) for kind in kinds) / 2
