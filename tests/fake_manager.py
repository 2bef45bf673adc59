"""A manager for gateway tests: uses the real messages on a real socket and records what it receives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from llm_api_server.auth.access import Key
from llm_api_server.ipc import download_messages, messages
from llm_api_server.ipc.framing import encode
from llm_api_server.ipc.lease_messages import Acquire, Cancel, Granted, InstanceInfo, RevokeSlots
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.ipc.quota_messages import NO_GRANT, Admit, Admitted, RateLimits, RevokeQuota
from llm_api_server.ipc.run_dir import RunDir


class FakeManager:
    """Grants slots on `instances`, by model. With `hold` nothing is granted until `grant_all`."""

    def __init__(self, run_dir: RunDir, models: list[ModelStatus], instances: dict[str, InstanceInfo]) -> None:
        self.run_dir = run_dir
        self.models = models
        self.instances = instances
        self.received: list[messages.ToManager] = []
        self.hold = False
        self.refusal: Callable[[int], messages.Refused] | None = None
        self.keys: dict[str, Key] = {}
        self.keeps_usage = True
        self.rate_limits = RateLimits()
        self.grant = NO_GRANT
        self.revokes_at_once = False
        self.replies_to_commands = True
        self.slots = 1000
        self.until_revoked = True
        self._clients: set[_Client] = set()
        self._waiting: list[tuple[_Client, Acquire]] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self.run_dir.socket.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Client(self), str(self.run_dir.socket))

    async def stop(self) -> None:
        """Disappear as after kill -9: the socket file stays, connections break."""
        if self._server is not None:
            self._server.close()
        for client in list(self._clients):
            client.transport.abort()
        self._waiting.clear()
        await asyncio.sleep(0)

    def received_of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.received if isinstance(message, kind)]

    def revoke_slots(self, instance: str) -> None:
        self._publish(RevokeSlots(instance))

    def revoke_quota(self, key_id: str) -> None:
        self._publish(RevokeQuota(key_id))

    def change_keys(self, ids: list[str] | None) -> None:
        self._publish(messages.KeysChanged(ids))

    def push_models(self) -> None:
        self._publish(messages.Models(self.models))

    def grant_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        for client, acquire in waiting:
            instance = self.instances[acquire.model]
            client.send(Granted(acquire.request, instance, self.slots, self.until_revoked))

    def on_message(self, client: _Client, message: messages.ToManager) -> None:
        self.received.append(message)
        match message:
            case messages.Hello():
                client.send(messages.Models(self.models))
            case Acquire(request, model):
                if self.refusal is not None:
                    client.send(self.refusal(request))
                else:
                    self._waiting.append((client, message))
                    if not self.hold and model in self.instances:
                        self.grant_all()
            case Cancel(request):
                self._waiting = [(one, acquire) for one, acquire in self._waiting if acquire.request != request]
            case Admit() if not self.hold:
                self._admit(client, message)
            case messages.FindKey(request, digest, key_id):
                client.send(messages.KeyFound(request, self.keys.get(digest or key_id or "")))
            case messages.ReportUsage(number) if self.keeps_usage:
                client.send(messages.UsageKept(number))
            case _:
                self._on_command(client, message)

    def _on_command(self, client: _Client, message: messages.ToManager) -> None:
        match message:
            case messages.GetStatus(request):
                client.send(messages.Status(request, 1, [2]))
            case download_messages.ListDownloads(request):
                client.send(download_messages.DownloadStatuses(request, []))
            case messages.GetMetrics(request):
                client.send(messages.MetricsText(request, "llm_api_server_workers 1.0\n"))
            case messages.ListModels(request) | messages.LoadModel(request) | messages.UnloadModel(request):
                if self.replies_to_commands:
                    refused = self.refusal(request) if self.refusal is not None else None
                    client.send(refused or messages.Models(self.models, request))

    def _admit(self, client: _Client, admit: Admit) -> None:
        refused = self.refusal(admit.request) if self.refusal is not None else None
        reserved = admit.tokens + admit.optional_tokens
        client.send(refused or Admitted(admit.request, self.rate_limits, reserved, self.grant))
        if self.revokes_at_once:
            client.send(RevokeQuota(admit.key_id))

    def _publish(self, message: messages.ToClient) -> None:
        for client in self._clients:
            client.send(message)


class _Client(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, manager: FakeManager) -> None:
        self._manager = manager
        self._decoder = messages.to_manager_decoder()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._manager._clients.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._manager._clients.discard(self)

    def data_received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            self._manager.on_message(self, message)

    def send(self, message: messages.ToClient) -> None:
        self.transport.write(encode(message))
