"""Old name of `event_loop.accept_loop`: a main process of version 0.1 starts the workers of this version by it."""

from llm_api_server.event_loop.accept_loop import Loop

__all__ = ["Loop"]
