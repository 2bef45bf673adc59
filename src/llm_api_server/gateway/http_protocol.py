"""Old name of `http.fast_path`: a main process of version 0.1 starts the workers of this version by it."""

from llm_api_server.gateway.http.fast_path import HttpProtocol

__all__ = ["HttpProtocol"]
