"""Tuning of asyncio's event loop for many streams: accepting, writing, eager tasks, garbage collection."""
