"""Asynchronous HTTP/1.1 client: unix sockets, TCP and TLS, keep-alive connections pooled per address.

A caller passes a `Receiver` (the data path) or awaits a `Response`. One client per event loop.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping

from llm_api_server.event_loop.write_buffer import WriteBuffer
from llm_api_server.http_client.address import encode_request, parse_address
from llm_api_server.http_client.connection import CONNECT_TIMEOUT, Connection, Pool, Resolve
from llm_api_server.http_client.response import NoResponse, Receiver, Response


class HttpClient:
    """Pools of connections by address.

    `resolve` picks the numeric address of every new connection; TLS still checks the name of the URL. `tls` replaces
    the system's certificates.
    """

    def __init__(
        self,
        *,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
        connect_timeout: float = CONNECT_TIMEOUT,
    ) -> None:
        self.write_buffer = WriteBuffer()
        self._resolve = resolve
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._pools: dict[str, Pool] = {}

    def send_on_idle(self, address: str, request: bytes, receiver: Receiver) -> Connection | None:
        """Write one request (`encode_request`) on an idle connection; return None if there is none.

        If the receiver then gets `NoResponse`, the server may have closed the connection before: use `send_on_new`.
        """
        pool = self._pools.get(address)
        connection = pool.take_idle() if pool is not None else None
        if connection is not None:
            connection.start(request, receiver)
        return connection

    async def send_on_new(self, address: str, request: bytes, receiver: Receiver) -> Connection:
        """Write one request on a new connection. Raises `NoResponse` if connecting fails."""
        connection = await self._pool(address).connect()
        connection.start(request, receiver)
        return connection

    async def post(
        self, address: str, path: str, body: bytes, *, content_type: str, headers: Mapping[str, str]
    ) -> Response:
        """Send `body` and wait for the head of the response; see `request`."""
        return await self.request("POST", address, path, body, headers={**headers, "content-type": content_type})

    async def request(
        self, method: str, address: str, path: str, body: bytes | None = None, *, headers: Mapping[str, str]
    ) -> Response:
        """Send a request and wait for the head of the response.

        A pooled connection that the server closed meanwhile is replaced by a new one, once. Raises `NoResponse` if
        nothing arrived, `BrokenResponse` if the head is broken.
        """
        request = encode_request(method, address, path, headers, body)
        response = Response()
        connection = self.send_on_idle(address, request, response)
        if connection is None:
            connection = await self.send_on_new(address, request, response)
        try:
            try:
                await response.wait_head(connection)
            except NoResponse:
                if not connection.is_reused:
                    raise
                response = Response()
                connection = await self.send_on_new(address, request, response)
                await response.wait_head(connection)
        except asyncio.CancelledError:
            connection.abort()
            raise
        return response

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _pool(self, key: str) -> Pool:
        if (known := self._pools.get(key)) is not None:
            return known
        # Every load of a model has a socket path of its own: drop the pools of those that are gone.
        self._pools = {name: one for name, one in self._pools.items() if not one.is_unused}
        address = parse_address(key)
        if address.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        pool = self._pools[key] = Pool(
            address,
            self.write_buffer,
            tls=self._tls if address.tls else None,
            resolve=self._resolve,
            connect_timeout=self._connect_timeout,
        )
        return pool
