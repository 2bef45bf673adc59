"""Ten minutes of mixed load with random kills of real engines, workers and the manager: `make soak`.

Clients swap two models in one slot, stream, disconnect, embed, change the configuration, and send bad requests;
engines, workers and the manager are killed with SIGKILL. Every request has one end: complete, aborted, refused by a
limit, or failed by a kill while it ran; all others are lost. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.models import gemma3_gguf, smollm2_gguf
from tests.running import KEY, TLS, Server, running
from tests.waiting import wait_until

MODELS = ("small", "other")
CLIENTS = 12
WORKERS = 2
#: Seconds between two kills.
KILL_INTERVALS = (6.0, 15.0)
#: Seconds after a kill in which requests may still fail by it.
AFTERMATH = 5.0
#: Seconds after which a request counts as lost.
PATIENCE = 120.0
#: Errors of limits and of refused requests.
RULES = frozenset(
    {
        "model_load_failed", "model_loading", "slow_down", "server_overloaded", "rate_limit_exceeded",
        "context_length_exceeded", "invalid_api_key", "model_not_found", "unknown_url", "not_supported",
        "invalid_configuration", None,
    }
)  # fmt: skip
#: Errors that only a killed process can cause.
OF_KILLS = frozenset({"engine_error", "engine_unavailable"})


@dataclass
class Score:
    """The ends of requests; `odd` describes the lost ones."""

    ends: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    kills: list[tuple[float, str]] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)

    def end(self, kind: str, how: str) -> None:
        self.kinds[kind] += 1
        self.ends[how] += 1

    def broke(self, kind: str, begun: float, what: str) -> None:
        """Count an error that only a kill may cause."""
        now = time.monotonic()
        if any(begun - AFTERMATH <= at <= now for at, _ in self.kills):
            self.end(kind, "errored_by_kill")
        else:
            self.lose(kind, what)

    def lose(self, kind: str, what: str) -> None:
        self.end(kind, "lost")
        self.odd.append(f"{kind}: {what}")


class Soak:
    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.chance = random.Random(seed)
        self.score = Score()
        self.longest_without_manager = 0.0
        self._is_over = asyncio.Event()

    async def run(self, seconds: float) -> None:
        clients = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
        others = [asyncio.create_task(self._kill()), asyncio.create_task(self._look_for_managers())]
        await asyncio.sleep(seconds)
        self._is_over.set()
        await asyncio.gather(*clients, *others)

    async def _client(self, number: int) -> None:
        """Send requests one after the other, on new or kept connections."""
        actions = [self._plain, self._stream, self._leave, self._embed, self._wrong, self._swap, self._reload]
        weights = [4, 4, 3, 2, 2, 0.3, 0.3]
        headers = {"Authorization": f"Bearer {KEY}", "x-client": str(number)}
        while not self._is_over.is_set():
            async with httpx.AsyncClient(
                base_url=self.server.url, headers=headers, timeout=PATIENCE, verify=TLS
            ) as client:
                for _ in range(self.chance.randint(1, 12)):
                    if self._is_over.is_set():
                        return
                    (action,) = self.chance.choices(actions, weights)
                    await self._watched(action, client)
                    await asyncio.sleep(self.chance.random() / 5)

    async def _watched(self, action: Any, client: httpx.AsyncClient) -> None:
        kind, begun = action.__name__.strip("_"), time.monotonic()
        try:
            how = await action(client)
        except httpx.TimeoutException as error:
            self.score.lose(kind, f"no response within {PATIENCE:.0f} s ({type(error).__name__})")
        except httpx.TransportError as error:
            self.score.broke(kind, begun, f"{type(error).__name__}: {error}")
        else:
            if how in {"answered", "left"}:
                self.score.end(kind, how)
            elif how.startswith("refused"):
                self.score.end(kind, "refused")
                self.score.refusals[how] += 1
            elif how.startswith("broken "):
                self.score.broke(kind, begun, how)
            else:
                self.score.lose(kind, how)

    def _text(self, **more: Any) -> tuple[str, dict[str, Any]]:
        """Return path and body of a chat or a completion; the second model cannot chat."""
        text = f"{self.chance.randint(0, 10**9)}: tell me of the sea"
        model = self.chance.choice(MODELS)
        body = {"model": model, "max_tokens": self.chance.randint(1, 40), **more}
        if model == MODELS[0] and self.chance.random() < 0.5:
            return "/v1/chat/completions", self._chat(**body)
        return "/v1/completions", {"prompt": text, **body}

    def _chat(self, **more: Any) -> dict[str, Any]:
        return {"model": MODELS[0], "messages": [{"role": "user", "content": "Of the sea."}], "max_tokens": 9, **more}

    async def _plain(self, client: httpx.AsyncClient) -> str:
        path, body = self._text()
        response = await client.post(path, json=body)
        return _judged(response, lambda body: body["usage"]["completion_tokens"] > 0)

    async def _stream(self, client: httpx.AsyncClient) -> str:
        path, body = self._text(stream=True)
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                return _judged(response, lambda _: False)
            payloads = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
        if payloads and payloads[-1] == "[DONE]":
            return "answered"
        error = json.loads(payloads[-1]).get("error") if payloads else None
        return _judged_error(error["code"]) if error else f"a stream without an end, {len(payloads)} events"

    async def _leave(self, client: httpx.AsyncClient) -> str:
        """Disconnect at a random moment."""
        is_stream = self.chance.random() < 0.5
        path, body = self._text(stream=is_stream, max_tokens=400)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.chance.random() * 2):
                if not is_stream:
                    return _judged(await client.post(path, json=body), lambda body: "usage" in body)
                async with client.stream("POST", path, json=body) as response:
                    if response.status_code != httpx.codes.OK:
                        await response.aread()
                        return _judged(response, lambda _: False)
                    async for _ in response.aiter_bytes():
                        pass
        return "left"

    async def _embed(self, client: httpx.AsyncClient) -> str:
        texts = [f"{self.chance.random()} of the sea"] * self.chance.randint(1, 4)
        response = await client.post("/v1/embeddings", json={"model": MODELS[0], "input": texts})
        return _judged(response, lambda body: len(body["data"]) == len(texts))

    async def _wrong(self, client: httpx.AsyncClient) -> str:
        """Send a request that must be refused."""
        wrong: list[dict[str, Any]] = [
            {"content": b"{", "headers": {"content-type": "application/json"}},
            {"json": self._chat(model="nobody")},
            {"json": self._chat(max_tokens=-1)},
            {"json": {"model": MODELS[0], "messages": []}},
            {"json": self._chat(), "headers": {"Authorization": "Bearer sk-nobody-has-this-key"}},
            {"json": self._chat(messages=[{"role": "user", "content": "long " * 20_000}])},
            {"json": self._chat(stop=["x"] * 100)},
        ]
        response = await client.post("/v1/chat/completions", **self.chance.choice(wrong))
        return _judged(response, lambda _: False)

    async def _swap(self, client: httpx.AsyncClient) -> str:
        """Load or unload a model by the admin API."""
        verb, model = self.chance.choice(("load", "unload")), self.chance.choice(MODELS)
        response = await client.post(f"/admin/api/models/{model}/{verb}", params={"wait": "false"})
        return _judged(response, lambda _: True)

    async def _reload(self, client: httpx.AsyncClient) -> str:
        """Reload a file with a change for the second model, with none, or with an error."""
        changed = config()
        match self.chance.randint(0, 2):
            case 0:
                changed["models"]["available"][MODELS[1]]["max_tokens"] = self.chance.choice([1024, 1000])
            case 1:
                changed["limits"]["queue_per_key"] = self.chance.choice([400, 500])
            case _:
                changed["models"]["max_loaded"] = 0
        self.server.configure(changed)
        response = await client.post("/admin/api/reload")
        return _judged(response, lambda body: body["applied"])

    async def _look_for_managers(self) -> None:
        """Record the longest time without a manager."""
        seen_at = time.monotonic()
        while not self._is_over.is_set():
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_unix_connection(str(self.server.run_dir / "manager.sock"))
                writer.close()
                seen_at = time.monotonic()
            self.longest_without_manager = max(self.longest_without_manager, time.monotonic() - seen_at)
            await asyncio.sleep(0.05)

    async def _kill(self) -> None:
        while not self._is_over.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.chance.uniform(*KILL_INTERVALS)):
                    await self._is_over.wait()
                    return
            role = self.chance.choice(("engine", "worker", "manager"))
            victims = [process for process in self.server.processes() if role_of(process, self.server) == role]
            if victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.score.kills.append((time.monotonic(), role))
                    self.chance.choice(victims).kill()


def _judged(response: httpx.Response, is_whole: Any) -> str:
    try:
        body = response.json()
    except ValueError:
        return f"status {response.status_code} with {response.content[:80]!r}"
    if response.is_success:
        return "answered" if is_whole(body) else f"an answer that is not whole: {str(body)[:80]}"
    return _judged_error(body["error"]["code"])


def _judged_error(code: str | None) -> str:
    if code in RULES:
        return f"refused: {code}"
    return f"broken by {code}" if code in OF_KILLS else f"error {code}"


def role_of(process: psutil.Process, server: Server) -> str | None:
    """Return the role of a process, or None if it has just ended."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return None
    text = " ".join(words)
    if "llm_api_server.manager.main" in words:
        return "manager"
    if "guard.py" in text:
        return "guard"
    if "llama_cpp_server" in text:
        return "engine"
    if "spawn_main" in text:
        return "worker"
    return "server" if server.process is not None and process.pid == server.process.pid else "other"


def held(server: Server) -> dict[str, Any]:
    """Return the descriptors and memory in MB of the long-lived processes, and the files in the run directory."""
    roles, descriptors, memory = Counter[str](), Counter[str](), Counter[str]()
    for process in server.processes():
        role = role_of(process, server) or "other"
        with contextlib.suppress(psutil.Error):
            roles[role] += 1
            descriptors[role] += process.num_fds()
            memory[role] += process.memory_full_info().pss // 2**20
    return {
        "processes": dict(roles),
        "descriptors": dict(descriptors),
        "memory_mb": dict(memory),
        "run_files": sum(1 for _ in server.run_dir.rglob("*")),
    }


def settle(server: Server) -> None:
    """Wait until no model is loaded and no request runs."""
    wait_until(server.has_manager, timeout=30)

    def is_quiet() -> bool:
        with server.client() as client:
            for model in MODELS:
                client.post(f"/admin/api/models/{model}/unload")
        is_idle = all(
            one["state"] in {"stopped", "failed"} and not one["in_flight"] for one in server.models().values()
        )
        return is_idle and not server.engines()

    wait_until(is_quiet, timeout=90)
    time.sleep(3)


def config() -> dict[str, Any]:
    return {
        "server": {"workers": WORKERS, "timeout": PATIENCE - 20, "drain_timeout": 5},
        "logging": {"console": False},
        "models": {
            "default": MODELS[0],
            "max_loaded": 1,
            "available": {
                MODELS[0]: {"path": str(smollm2_gguf()), "max_tokens": 1024},
                MODELS[1]: {"path": str(gemma3_gguf()), "max_tokens": 1024},
            },
        },
        "limits": {"stall_timeout": 30},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name, running(Path(name), config()) as server:
        with server.client() as client:
            for model in MODELS:
                client.post(f"/admin/api/models/{model}/load").raise_for_status()
        settle(server)
        before = held(server)
        soak = Soak(server, given.seed)
        asyncio.run(soak.run(given.seconds))
        settle(server)
        after = held(server)
    score = soak.score
    print(f"seed {given.seed}, kills: {dict(Counter(role for _, role in score.kills))}")
    print(f"requests: {dict(score.kinds)}; refusals: {dict(score.refusals)}")
    for what in ("processes", "descriptors", "memory_mb", "run_files"):
        print(f"{what:12} before {before[what]}, after {after[what]}")
    for odd in score.odd:
        print(f"lost: {odd}")
    result = {
        "seconds": given.seconds,
        "seed": given.seed,
        "kills": len(score.kills),
        "longest_seconds_without_manager": round(soak.longest_without_manager, 1),
        "sent": sum(score.kinds.values()),
        "answered": score.ends["answered"],
        "left": score.ends["left"],
        "refused": score.ends["refused"],
        "errored_by_kill": score.ends["errored_by_kill"],
        "lost": score.ends["lost"],
        "leaked_fds": max(0, sum(after["descriptors"].values()) - sum(before["descriptors"].values())),
        "leaked_processes": max(0, sum(after["processes"].values()) - sum(before["processes"].values())),
        "leaked_run_files": max(0, after["run_files"] - before["run_files"]),
    }
    print(json.dumps(result))
    return 1 if result["lost"] or result["leaked_processes"] else 0


if __name__ == "__main__":
    sys.exit(main())
