"""The zygote and its launcher with a small stand-in for vLLM: inheritance, fallbacks and kills."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import struct
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_api_server.engines.base import LaunchPlan
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.manager.instances.process import LocalLauncher, Process
from llm_api_server.manager.instances.zygote_launcher import ZygoteLauncher
from tests.waiting import until

pytestmark = pytest.mark.anyio

ENGINE = """
import json, os, signal, sys
IMPORTED_BY = os.getpid()
BROKEN = {broken}
if BROKEN == "raises": raise RuntimeError("no such device")
if BROKEN == "dies": os._exit(9)
if BROKEN == "threads":
    import threading, time
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.signal(signal.SIGUSR1, lambda *_: None)
if __name__ == "__main__":
    print(json.dumps({{
        "argv": sys.argv[1:],
        "marker": os.environ.get("MARKER"),
        "device": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "preloaded": "preloaded_by_zygote" in sys.modules,
        "handlers": [n for n in range(1, 32) if n not in (9, 19, 2, 10) and callable(signal.getsignal(n))],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "fds": sorted(int(n) for n in os.listdir("/proc/self/fd"))[:-1],
        "pids": [os.getpid(), os.getppid(), os.getsid(0), os.getpgid(0)],
    }}), flush=True)
    if "--exit" in sys.argv: sys.exit(int(sys.argv[-1]))
    while True: signal.pause()
sys.modules["preloaded_by_zygote"] = sys
"""


class Bench:
    """A launcher in a folder, whose lock is held as by a running manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launcher = ZygoteLauncher(LocalLauncher(RunDir(folder)), folder / "zygote.log")
        self.log = folder / "engine.log"
        self.started: list[Process] = []
        self.write()

    def write(self, broken: str = "") -> None:
        (self.folder / "stand_in.py").write_text(ENGINE.format(broken=json.dumps(broken)))

    def plan(self, *arguments: str, **env: str) -> LaunchPlan:
        argv = [sys.executable, "-m", "stand_in", *arguments]
        return LaunchPlan(argv, "", {"PYTHONPATH": str(self.folder), **env}, is_forkable=True)

    async def start(self, plan: LaunchPlan) -> Process:
        process = await self.launcher.start(plan, self.log)
        self.started.append(process)
        return process

    async def said(self) -> dict[str, Any]:
        """Return what the newest engine printed about itself."""
        await until(lambda: self.log.exists() and self.log.read_text().endswith("}\n"))
        response: dict[str, Any] = json.loads(self.log.read_text().splitlines()[-1])
        self.log.unlink()
        return response


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    with (tmp_path / "manager.lock").open("w+b") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhllixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        bench = Bench(tmp_path)
        yield bench
        for process in bench.started:
            process.terminate()
            await process.wait()
        await bench.launcher.close()
        assert bench.launcher.zygote_pid is None


async def test_forked_engine_equals_an_execed_one(bench: Bench) -> None:
    plan = bench.plan("--model", "a b", MARKER="seen")
    forked_process = await bench.start(plan)
    forked = await bench.said()
    await bench.start(replace(plan, is_forkable=False))
    plain = await bench.said()
    assert forked["preloaded"]
    assert not plain["preloaded"]
    for item in ("argv", "marker", "handlers", "blocked", "fds"):
        assert forked[item] == plain[item], item
    _pid, parent, session, group = forked["pids"]
    assert parent == session == group == forked_process.pid


async def test_engines_share_one_zygote(bench: Bench) -> None:
    await asyncio.gather(*(bench.start(bench.plan(str(number))) for number in range(3)))
    parents = {psutil.Process(process.pid).ppid() for process in bench.started}
    assert parents == {bench.launcher.zygote_pid}


async def test_exit_code_of_the_engine_is_passed_on(bench: Bench) -> None:
    assert await (await bench.start(bench.plan("--exit", "7"))).wait() == 7


async def test_terminate_ends_the_engine(bench: Bench) -> None:
    process = await bench.start(bench.plan())
    engine = (await bench.said())["pids"][0]
    process.terminate()
    assert await process.wait() == 128 + signal.SIGTERM
    assert not psutil.pid_exists(engine)


async def test_forked_engine_may_differ_in_device_only(bench: Bench) -> None:
    await bench.start(bench.plan(CUDA_VISIBLE_DEVICES="0"))
    await bench.said()
    await bench.start(bench.plan(CUDA_VISIBLE_DEVICES="1"))
    said = await bench.said()
    assert (said["preloaded"], said["device"]) == (True, "1")
    await bench.start(bench.plan(MARKER="other"))
    said = await bench.said()
    assert (said["preloaded"], said["marker"]) == (False, "other")


@pytest.mark.parametrize("broken", ["raises", "dies", "threads"])
async def test_engine_that_cannot_be_forked_is_execed(bench: Bench, broken: str) -> None:
    bench.write(broken)
    process = await bench.start(bench.plan())
    assert psutil.Process(process.pid).ppid() == os.getpid()


async def test_killed_zygote_leaves_its_engines_and_is_replaced(bench: Bench) -> None:
    first = await bench.start(bench.plan())
    await bench.said()
    old = bench.launcher.zygote_pid
    assert old is not None
    zygote = psutil.Process(old)
    zygote.kill()
    await until(lambda: not zygote.is_running() or zygote.status() == psutil.STATUS_ZOMBIE)
    second = await bench.start(bench.plan())
    assert (await bench.said())["preloaded"]
    assert psutil.Process(second.pid).ppid() == bench.launcher.zygote_pid != old
    assert psutil.pid_exists(first.pid)
    first.terminate()
    assert await first.wait() is None


async def test_load_cancelled_during_the_imports_leaves_no_engine(bench: Bench) -> None:
    load = asyncio.create_task(bench.start(bench.plan()))
    while bench.launcher.zygote_pid is None:
        await asyncio.sleep(0)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    await bench.start(bench.plan())
    children = psutil.Process(bench.launcher.zygote_pid).children()
    assert [child.pid for child in children] == [process.pid for process in bench.started]
