"""The zygote: a process that imports vLLM once and forks engines. A script of the standard library and vLLM only.

The manager holds the other end of a socket pair. Each engine gets the arguments, environment and output that exec
would have given it, under a guard of its own (`manager/instances/guard.py`), and keeps nothing of this process. The
zygote stays single-threaded, touches no device, and ends with its manager.

Usage: zygote.py SOCKET_FD MODULE      (engines run MODULE, as `python -m MODULE` would)

Messages are one JSON object per packet. The first is `{"ready": seconds}` or `{"error": reason}`. A request is
`{"argv", "env", "guard"}` with two descriptors: the engine's output, and a socket for the responses. These are
`{"pid"}` with a pidfd of the guard, and when the guard ends `{"code"}`.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_MAX_MESSAGE_BYTES = 1 << 20
#: Signals the guard waits for; blocked until then, so that none is lost.
_GUARDED_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
#: Modules that vLLM imports late in a start, in one of its processes. Names unknown to a version are skipped.
_LATE_IMPORTS = [
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.core_client",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.transformers",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.llama.configuration_llama",
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "torch._dynamo",
    "torch._inductor.config",
    "torch.distributed",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.quantization.compressed_tensors.utils",
    "vllm.model_executor.layers.quantization.online",
    "vllm.transformers_utils.chat_templates",
    "vllm.v1.pool.flash_maxsim",
    "compressed_tensors",
    "llguidance",
    "loguru",
    "model_hosting_container_standards.sagemaker",
    "openai_harmony",
    "prometheus_fastapi_instrumentator",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
    "uvloop",
    "xgrammar",
]


class _Job(NamedTuple):
    """Arguments and environment of an engine, run after the fork has left the zygote's stack."""

    argv: list[str]
    env: dict[str, str]


def main() -> None:
    """Return in the zygote when the manager is gone, in a forked engine when the engine ends."""
    control, module = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    _end_with_the_manager()
    _set_title(" ".join(sys.orig_argv))  # before the environment moves: setproctitle locates its memory at first use
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # otherwise importing numpy starts threads
    _preload_openmp()
    job = _serve(control, module)
    if job is None:
        sys.stdout.flush()
        os._exit(0)  # skip exit handlers that vLLM registered for servers
    _run(job, module)


def _end_with_the_manager() -> None:
    """End with the manager even during the imports, when the socket is not read."""
    manager = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if manager == 1:
        sys.exit("the manager is gone")


def _preload_openmp() -> None:
    """Start again on CPUs with torch's OpenMP library preloaded.

    vLLM preloads it for the workers it spawns; a forked worker cannot preload anything.
    """
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ or "libgomp" in os.environ.get("LD_PRELOAD", ""):
        return
    torch = importlib.util.find_spec("torch")
    for folder in (torch.submodule_search_locations or []) if torch else []:
        for library in sorted([*Path(folder).glob("lib/libgomp*.so*"), *Path(f"{folder}.libs").glob("libgomp*.so*")]):
            os.environ["LD_PRELOAD"] = ":".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _serve(control: socket.socket, module: str) -> _Job | None:
    """Serve requests until the manager is gone. Return a job in each engine, None in the zygote itself."""
    begun = time.monotonic()
    try:
        _import_all(module)
        problem = _unfit_to_fork()
    except Exception as error:  # noqa: BLE001 - whatever the imports raise is reported to the manager
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
    if problem:
        _send(control, {"error": problem})
        return None
    gc.collect()
    gc.freeze()
    _send(control, {"ready": time.monotonic() - begun})
    return _loop(control)


def _import_all(module: str) -> None:
    for name in (module, *_LATE_IMPORTS, *_platform_modules(), *_routers()):
        with contextlib.suppress(Exception):  # only `module` is required
            importlib.import_module(name)
    if module not in sys.modules:
        importlib.import_module(module)  # raises the reason


def _platform_modules() -> list[str]:
    """Return the modules of the worker for this machine's device."""
    kind = "cpu" if _is_cpu() else "gpu"
    attention = ["vllm.v1.attention.backends.cpu_attn"] if _is_cpu() else []
    return [f"vllm.v1.worker.{kind}_worker", f"vllm.v1.worker.{kind}_model_runner", *attention]


def _routers() -> list[str]:
    """Return the modules of all endpoints; vLLM imports those that suit the model."""
    package = getattr(sys.modules.get("vllm"), "__file__", None)
    if package is None:
        return []
    root = Path(package).parent
    files = sorted((root / "entrypoints").rglob("api_router.py"))
    return [".".join(["vllm", *file.relative_to(root).with_suffix("").parts]) for file in files]


def _is_cpu() -> bool:
    """Return whether vLLM runs on the CPU; False without vLLM, as in tests."""
    try:
        platform = importlib.import_module("vllm.platforms").current_platform
    except ImportError:
        return False
    return bool(platform.is_cpu())


def _unfit_to_fork() -> str | None:
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        return f"importing left {threads} threads running"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "importing initialised CUDA"
    return None


def _loop(control: socket.socket) -> _Job | None:
    guards: dict[int, tuple[int, socket.socket]] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor in guards:
                poll.unregister(descriptor)
                _report_end(descriptor, *guards.pop(descriptor))
                continue
            data, received, _, _ = socket.recv_fds(control, _MAX_MESSAGE_BYTES, 2)
            if not data:
                return None
            output, report = received[0], socket.socket(fileno=received[1])
            pid, job = _fork(json.loads(data), output)
            if job is not None:
                return job
            os.close(output)
            pidfd = os.pidfd_open(pid)
            guards[pidfd] = (pid, report)
            poll.register(pidfd, select.POLLIN)
            try:
                socket.send_fds(report, [json.dumps({"pid": pid}).encode()], [pidfd])
            except OSError:  # the manager no longer waits for this engine
                os.kill(pid, signal.SIGTERM)


def _report_end(pidfd: int, pid: int, report: socket.socket) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    _send(report, {"code": code})
    report.close()
    os.close(pidfd)


def _fork(request: dict[str, Any], output: int) -> tuple[int, _Job | None]:
    """Fork a guard, which forks the engine and execs its script. Return the guard's pid, and a job in the engine."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid, None
    try:
        _detach(output)
        guard = os.getpid()
        engine = os.fork()
        if engine:
            command = [*request["guard"], "--child", str(engine)]
            os.execve(command[0], command, request["env"])
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _GUARDED_SIGNALS)
        return 0, _Job(request["argv"], request["env"])
    except BaseException:  # noqa: BLE001 - a failed fork must never become a second zygote
        traceback.print_exc()
        os._exit(127)


def _detach(output: int) -> None:
    """Start a session, keep only null and the output, reset signal handlers, and adopt orphans."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _GUARDED_SIGNALS)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)) and number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _run(job: _Job, module: str) -> None:
    """Do what `python -m MODULE ARGUMENTS` does, in an interpreter that has imported everything."""
    os.environ.clear()
    os.environ.update(job.env)
    if _is_cpu() and "VLLM_WORKER_MULTIPROC_METHOD" not in job.env and "--numa-bind" not in job.argv:
        _fork_workers()
    _set_title(f"{sys.executable} -m {module} {' '.join(job.argv)}")
    sys.argv = [module, *job.argv]
    sys.modules.pop(module, None)  # as with -m, it runs as __main__ and is not imported before
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _fork_workers() -> None:
    """Make `multiprocessing` fork where vLLM asks for `spawn`, which would import everything again in each process.

    vLLM's CPU platform asks for it because OpenMP may have threads. The zygote has none.
    """
    get_context = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        return get_context("fork" if method == "spawn" else method)

    multiprocessing.get_context = forking


def _set_title(title: str) -> None:
    """Set the title in process lists, where every engine would look like the zygote."""
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle").setproctitle(title)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        connection.send(json.dumps(message).encode())


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
