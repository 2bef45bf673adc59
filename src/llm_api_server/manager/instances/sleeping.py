"""An instance falls asleep or wakes as the scheduler decided; whether it did is seen, not believed. For the manager."""

from __future__ import annotations

import asyncio
import time

from loguru import logger

from llm_api_server.engines.sleep import SleepFailed
from llm_api_server.manager.instances.device_watch import DeviceWatch
from llm_api_server.manager.instances.instance import Instance

#: Seconds that either may take.
_TIMEOUT = 120.0


async def put_to_sleep(instance: Instance, level: int, from_level: int, devices: DeviceWatch) -> bool:
    """True when it sleeps and its memory was seen free."""
    try:
        async with asyncio.timeout(_TIMEOUT):
            await instance.sleep(level, from_level=from_level)
        problem = None if await devices.wait_freed(instance.id) else "its memory was not seen free"
    except (SleepFailed, TimeoutError) as error:
        problem = str(error) or "it took too long"
    if problem is None:
        logger.info("model {} sleeps (level {})", instance.model, level)
        return True
    logger.warning("model {} does not sleep, so it is unloaded: {}", instance.model, problem)
    return False


async def wake(instance: Instance, level: int) -> bool:
    """True when it is awake again, with its weights."""
    started = time.time()
    try:
        async with asyncio.timeout(_TIMEOUT):
            await instance.wake(level)
    except (SleepFailed, TimeoutError) as error:
        logger.warning("model {} does not wake, so it is loaded anew: {}", instance.model, str(error) or "too slow")
        return False
    logger.info("model {} awake after {:.1f} s", instance.model, time.time() - started)
    return True
