"""NVIDIA devices and their memory, read with the driver's own library. Imported only if a driver is installed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

import pynvml
from loguru import logger

from llm_api_server.devices.device import Device


class NvidiaInventory:
    """`Inventory` of NVIDIA GPUs. NVML stays open until the process ends."""

    def __init__(self, wanted: Sequence[int] | None) -> None:
        """`wanted`: indexes as in nvidia-smi; None: the GPUs of `CUDA_VISIBLE_DEVICES` if it is set, else all."""
        self._handles = _find(wanted)
        self.devices: Sequence[Device] = list(self._handles)

    def used(self) -> Mapping[str, int]:
        used = {}
        for device, handle in self._handles.items():
            with suppress(pynvml.NVMLError):
                used[device.id] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        return used


def _find(wanted: Sequence[int] | None) -> dict[Device, object]:
    """Return the wanted devices, each with its NVML handle."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        logger.warning("the NVIDIA driver does not respond ({}); no GPU is used", error)
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = {}
    for index, handle in enumerate(handles):
        is_wanted = index in wanted if wanted is not None else _is_visible(index, handle, visible)
        if is_wanted:
            name = str(pynvml.nvmlDeviceGetName(handle))
            total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            found[Device(f"gpu{index}", "gpu", total, name, index)] = handle
    return found


def _is_visible(index: int, handle: object, visible: str | None) -> bool:
    if visible is None:
        return True
    uuid = str(pynvml.nvmlDeviceGetUUID(handle))
    parts = [part.strip() for part in visible.split(",") if part.strip()]
    return any(part == str(index) or (part.startswith("GPU-") and uuid.startswith(part)) for part in parts)
