"""Checks of `doctor`. Each returns findings and changes nothing."""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pynvml

from llm_api_server import __version__
from llm_api_server.config.checks import config_warnings
from llm_api_server.config.load import load_config
from llm_api_server.config.models import Config, DevicesConfig, ServerConfig
from llm_api_server.devices.device import RAM
from llm_api_server.devices.host import Host, this_host
from llm_api_server.devices.inventory import HostInventory
from llm_api_server.engines.config_problems import engine_checks
from llm_api_server.engines.select import engine_for
from llm_api_server.errors import ConfigError, StoreError
from llm_api_server.formats import memory_size
from llm_api_server.http_client import blocking
from llm_api_server.lifecycle.config_handover import running_config
from llm_api_server.lifecycle.server_lock import CannotServe, ServerLock, listen, local_host, local_url
from llm_api_server.store.database import Database
from llm_api_server.store.schema import HEAD

Verdict = Literal["ok", "warning", "problem"]

_INTERPRETER_TIMEOUT = 60.0
_RESPONSE_TIMEOUT = 10.0
#: Bytes of free RAM and of free disk space below which a check warns.
_LOW_RAM = 1024**3
_LOW_DISK = 1024**3
#: Each connection takes one descriptor, and each request in flight two.
_FEW_DESCRIPTORS = 4096


class Finding(msgspec.Struct, omit_defaults=True):
    """Result of one check. `advice` is one sentence on what to do."""

    name: str
    verdict: Verdict
    message: str
    advice: str | None = None


def examine(path: Path) -> list[Finding]:
    """Run all checks with the configuration file `path`; if it is invalid, those that do not depend on it."""
    host = this_host()
    config, findings = _configuration(path)
    usable = config or Config()
    needed = {engine_for(model) for model in usable.models.available.values()}
    found = [
        Finding("server", "ok", f"LLM API Server {__version__}, Python {platform.python_version()} ({sys.executable})"),
        _llama_cpp(usable.llama_cpp_python, is_needed="llama_cpp" in needed),
        _vllm(usable.vllm_python, host, is_needed="vllm" in needed),
        *_gpus(host),
        _ram(usable.devices, host),
        _descriptors(),
        *findings,
    ]
    if config is not None:
        found += [_port(config.server, config.run_dir), *_folders(config), _database(config.storage_url)]
    return found


def _llama_cpp(python: str, *, is_needed: bool) -> Finding:
    """Import xllamacpp in a process of its own: a build for another processor kills it."""
    output, reason = _run(python, "import importlib.metadata as m, xllamacpp; print(m.version('xllamacpp'))")
    if reason is None:
        return Finding("llama.cpp", "ok", f"xllamacpp {output} in {python}")
    return Finding(
        "llama.cpp",
        "problem" if is_needed else "warning",
        f"xllamacpp cannot be used in {python}: {reason}",
        "Run `make install`, or set engines.llama_cpp.python to an interpreter that has it.",
    )


def _vllm(python: str, host: Host, *, is_needed: bool) -> Finding:
    """Look for vLLM's files, since importing it takes half a minute."""
    program = (
        "from importlib import metadata as m, util; name = m.packages_distributions()['vllm'][0]; "
        "assert util.find_spec('vllm'); print(name, m.version(name))"
    )
    output, reason = _run(python, program)
    if reason is None:
        return Finding("vLLM", "ok", f"{output} in {python}")
    advice = "Run `make vllm`, or set engines.vllm.python to an interpreter that has it."
    if is_needed:
        return Finding("vLLM", "problem", f"not in {python}, but configured models need it", advice)
    if host.has_nvidia:
        return Finding("vLLM", "warning", f"not in {python}, so it cannot run models on the GPU", advice)
    return Finding("vLLM", "ok", "not installed; only models in Hugging Face folders need it (`make vllm`)")


def _run(python: str, program: str) -> tuple[str, str | None]:
    """Return the output of a program in another environment, and the reason if it failed."""
    try:
        result = subprocess.run(
            [python, "-I", "-c", program],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd="/", check=False,
            timeout=_INTERPRETER_TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "", f"it does not finish within {_INTERPRETER_TIMEOUT:.0f} s"
    except OSError as error:
        return "", f"the interpreter cannot be started: {error.strerror}"
    if result.returncode < 0:
        return "", f"it ends with signal {-result.returncode}, as a build for another processor does"
    if result.returncode > 0:
        return "", (result.stderr.strip().splitlines() or ["it fails"])[-1]
    return result.stdout.strip(), None


def _gpus(host: Host) -> Iterator[Finding]:
    if not host.has_nvidia:
        yield Finding("GPU", "ok", "no NVIDIA GPU; models run on the processor")
        return
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            sizes = f"{memory_size(int(memory.free))} of {memory_size(int(memory.total))} free"
            yield Finding(f"gpu{index}", "ok", f"{pynvml.nvmlDeviceGetName(handle)}, {sizes}, driver {driver}")
    except pynvml.NVMLError as error:
        advice = (
            "Models run on the processor until `nvidia-smi` works: install the driver, or give the container its GPUs."
        )
        yield Finding("GPU", "problem", f"the NVIDIA driver does not respond: {error}", advice)


def _ram(devices: DevicesConfig, host: Host) -> Finding:
    inventory = HostInventory(devices, dataclasses.replace(host, has_nvidia=False))
    free = host.memory_bytes - inventory.used().get(RAM, 0)
    message = f"{memory_size(free)} of {memory_size(host.memory_bytes)} free, {host.cores} cores"
    if free < _LOW_RAM:
        return Finding("RAM", "warning", message, "End other programs: models in RAM need more than that.")
    return Finding("RAM", "ok", message)


def _descriptors() -> Finding:
    """Check the hard limit, to which the server raises its own limit."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard_limit == resource.RLIM_INFINITY:
        return Finding("descriptors", "ok", "open files are not limited")
    message = f"at most {hard_limit} open files"
    if hard_limit < _FEW_DESCRIPTORS:
        advice = f"Raise the hard limit to {_FEW_DESCRIPTORS} or more (`ulimit -Hn`; LimitNOFILE= for systemd)."
        return Finding("descriptors", "warning", message, advice)
    return Finding("descriptors", "ok", message)


def _configuration(path: Path) -> tuple[Config | None, list[Finding]]:
    try:
        config = load_config(path, engine_checks(may_import=False))
    except ConfigError as error:
        return None, [Finding("configuration", "problem", problem) for problem in error.problems]
    warnings = [Finding("configuration", "warning", warning) for warning in config_warnings(config)]
    count = len(config.models.available)
    message = f"{path} is valid; {count} model{'' if count == 1 else 's'}"
    return config, [Finding("configuration", "ok", message), *warnings]


def _port(server: ServerConfig, run_dir: Path) -> Finding:
    pid = ServerLock(run_dir).holder()
    if pid is not None:
        # The server may have been started with another port than the file's.
        running = running_config(run_dir)
        return _running_server(running.server if running else server, pid)
    try:
        listen(server.host, server.port).close()
    except CannotServe as error:
        return Finding("port", "problem", str(error))
    port = f"port {server.port}" if server.port else "a port that the server chooses (server.port: 0)"
    return Finding("port", "ok", f"{port} on {server.host} is free; no server runs with this configuration")


def _running_server(server: ServerConfig, pid: int) -> Finding:
    if not server.port:
        return Finding("port", "ok", f"the server runs (pid {pid}) on a port that it chose itself (server.port: 0)")
    url = f"http://{local_host(server.host)}:{server.port}/livez"
    try:
        with blocking.request("GET", url, timeout=_RESPONSE_TIMEOUT) as response:
            status = response.status
    except blocking.FAILURES as error:
        return Finding(
            "port",
            "problem",
            f"the server (pid {pid}) does not respond on port {server.port}: {error}",
            "It may be starting or stopping; see `llm-api-server logs`.",
        )
    return Finding("port", "ok", f"the server (pid {pid}) responds at {local_url(server.host, server.port)} ({status})")


def _folders(config: Config) -> Iterator[Finding]:
    yield _folder("run directory", config.run_dir, "problem", "Set server.run_dir to a folder that this user owns.")
    yield _folder("log directory", config.log_dir, "warning", "Set logging.path; else logs go only to the console.")
    advice = "Set models.models_dir, or put the files there as another user."
    yield _folder("models directory", config.models_dir, "warning", advice)
    if config.run_dir.exists():
        try:
            config.ensure_run_dir()
        except ConfigError as error:
            yield Finding("run directory", "problem", str(error))


def _folder(name: str, path: Path, unwritable: Verdict, advice: str) -> Finding:
    """Check that the folder is writable, or can be created in its nearest existing parent."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(name, unwritable, f"{path} is not writable", advice)
    free = shutil.disk_usage(existing).free
    message = f"{path} {'is writable' if existing == path else 'can be created'}, {memory_size(free)} free on its disk"
    if free < _LOW_DISK:
        return Finding(name, "warning", message, "Free disk space: logs, the database and models need it.")
    return Finding(name, "ok", message)


def _database(url: str) -> Finding:
    database = Database(url)
    try:
        version = database.version()
    except StoreError as error:
        return Finding("database", "problem", str(error), "Repair it, or set storage.url to another one.")
    if version == HEAD:
        return Finding("database", "ok", f"{database} responds")
    if version is not None:
        return Finding("database", "ok", f"{database} responds; starting the server upgrades its tables")
    scheme, _, file = url.partition("sqlite:///")
    if not scheme and not Path(file).exists():
        return _folder(
            "database", Path(file).parent, "problem", "Set storage.url to a file in a folder that this user owns."
        )
    return Finding("database", "ok", f"{database} responds; starting the server creates its tables")
