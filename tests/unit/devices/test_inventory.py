"""Devices of a host: NVIDIA GPUs, from a simulated driver, and the RAM of this machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from llm_api_server.config.models import DevicesConfig
from llm_api_server.devices.host import Host, this_host
from llm_api_server.devices.inventory import HostInventory
from llm_api_server.devices.nvml import NvidiaInventory
from tests.machine import GIB


class Driver:
    """Driver of two GPUs of 24 and 80 GiB. Functions named in `broken` fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes, self.used = [24 * GIB, 80 * GIB], [GIB, 3 * GIB]
        self.broken: set[str] = set()
        for name, function in {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: len(self.sizes),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda index: f"GPU number {index}",
            "nvmlDeviceGetUUID": lambda index: f"GPU-{'ab'[index] * 8}-1234",
            "nvmlDeviceGetMemoryInfo": lambda index: SimpleNamespace(total=self.sizes[index], used=self.used[index]),
        }.items():
            monkeypatch.setattr(pynvml, name, self.checked(name, function))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def checked(self, name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if name in self.broken:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
            return function(*arguments)

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_every_gpu_and_ram_are_devices(driver: Driver) -> None:
    inventory = HostInventory(DevicesConfig(), Host(64 * GIB, 8, has_nvidia=True))
    assert [(d.id, d.kind, d.total, d.index) for d in inventory.devices] == [
        ("gpu0", "gpu", 24 * GIB, 0),
        ("gpu1", "gpu", 80 * GIB, 1),
        ("ram", "ram", 64 * GIB, None),
    ]
    assert inventory.devices[0].name == "GPU number 0"
    assert inventory.devices[2].capacity == int(64 * GIB * 0.95)
    driver.used[0] = 5 * GIB
    assert inventory.used()["gpu0"] == 5 * GIB


@pytest.mark.parametrize(
    ("visible", "wanted", "expected"),
    [
        (None, None, ["gpu0", "gpu1"]),
        (None, [1], ["gpu1"]),
        ("1", None, ["gpu1"]),
        ("1, 0", None, ["gpu0", "gpu1"]),
        ("GPU-bbbb", None, ["gpu1"]),
        ("", None, []),
        ("0", [1], ["gpu1"]),
    ],
)
def test_the_configuration_or_the_environment_chooses_gpus(
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    wanted: list[int] | None,
    expected: list[str],
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [device.id for device in NvidiaInventory(wanted).devices] == expected


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"])
def test_a_driver_that_does_not_respond_means_no_gpus(driver: Driver, function: str) -> None:
    driver.broken.add(function)
    assert list(NvidiaInventory(None).devices) == []


def test_a_gpu_that_falls_off_is_left_out(driver: Driver) -> None:
    inventory = NvidiaInventory(None)
    driver.broken.add("nvmlDeviceGetMemoryInfo")
    assert inventory.used() == {}


def test_ram_of_this_machine_is_read() -> None:
    host = this_host()
    inventory = HostInventory(DevicesConfig(memory=123456), Host(host.memory_bytes, 1, has_nvidia=False))
    (ram,) = inventory.devices
    assert (ram.total, ram.capacity) == (host.memory_bytes, 123456)
    before = inventory.used()["ram"]
    assert 0 < before < host.memory_bytes
    ballast = bytearray(b"x" * (512 * 1024**2))
    assert inventory.used()["ram"] > before + 256 * 1024**2
    assert len(ballast) > 0
