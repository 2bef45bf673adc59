"""What makes asyncio's loop fit for many streams: accepting, writing, eager tasks, garbage collection."""
