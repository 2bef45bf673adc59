"""`doctor`: its findings and advice, and that it changes nothing. The state of the machine itself is not asserted."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from typer.testing import CliRunner, Result

from llm_api_server.cli import doctor_checks
from llm_api_server.cli.main import app
from llm_api_server.devices.host import Host
from llm_api_server.store.database import Database

CONFIG = """
server: {{run_dir: run, port: {port}}}
auth: {{api_keys: [{{key: sk-0123456789abcdef, name: me}}]}}
models: {{available: {{m: {{path: {path}}}}}}}
engines: {{llama_cpp: {{python: ./python}}, vllm: {{python: {vllm}}}}}
{more}
"""
Write = Callable[..., None]
Examine = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "this_host", lambda: Host(2**40, 8, has_nvidia=False))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a configuration whose engine interpreters respond at once."""
    monkeypatch.chdir(tmp_path)
    interpreter(tmp_path / "python", "echo 1.2.3")
    (tmp_path / "a.gguf").touch()

    def write_config(*, port: int = 0, path: str = "../a.gguf", vllm: str = "./python", more: str = "") -> None:
        (tmp_path / "config.yaml").write_text(CONFIG.format(port=port, path=path, vllm=vllm, more=more))

    write_config()
    return write_config


@pytest.fixture
def examine(write: Write) -> Examine:
    """Return the findings by name; of those with the same name, the worst."""

    def run_and_read(*, code: int = 0) -> dict[str, dict[str, Any]]:
        result = CliRunner().invoke(app, ["doctor", "--json"])
        assert result.exit_code == code, result.output
        found: dict[str, dict[str, Any]] = {}
        for check in sorted(json.loads(result.stdout)["checks"], key=lambda one: "owp".index(one["verdict"][0])):
            found[check["name"]] = check
        return found

    return run_and_read


def interpreter(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def text(code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == code, result.output
    return result


def test_a_healthy_machine_has_no_problems_and_nothing_is_changed(examine: Examine, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = examine()
    assert {name for name, check in found.items() if check["verdict"] == "problem"} == set()
    assert {"server", "llama.cpp", "vLLM", "GPU", "RAM", "port", "run directory", "database"} <= set(found)
    assert "1.2.3" in found["llama.cpp"]["message"]
    assert "can be created" in found["run directory"]["message"]
    assert sorted(tmp_path.rglob("*")) == before
    assert text().stdout.startswith("ok ")


def test_an_invalid_file_does_not_prevent_the_other_checks(examine: Examine, write: Write, tmp_path: Path) -> None:
    write(more="sevrer: {}")
    found = examine(code=1)
    assert "unknown key" in found["configuration"]["message"]
    assert {"llama.cpp", "RAM"} <= set(found)
    (tmp_path / "config.yaml").unlink()
    assert "llm-api-server init" in examine(code=1)["configuration"]["message"]
    assert "1 problem" in text(1).stdout


def test_warnings_of_the_configuration_are_reported(examine: Examine, write: Write) -> None:
    write(path="none.gguf")
    check = examine()["configuration"]
    assert check["verdict"] == "warning"
    assert "none.gguf does not exist" in check["message"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo 'No module named xllamacpp' >&2; exit 1", "No module named"), ("kill -ILL $$", "ends with signal 4")],
)
def test_an_unusable_llama_cpp_is_a_problem_if_a_model_needs_it(
    examine: Examine, write: Write, tmp_path: Path, script: str, reason: str
) -> None:
    interpreter(tmp_path / "python", script)
    check = examine(code=1)["llama.cpp"]
    assert (check["verdict"], reason in check["message"]) == ("problem", True)
    write(path="https://llm.example.com/v1")
    assert examine()["llama.cpp"]["verdict"] == "warning"


def test_a_missing_vllm_is_a_problem_if_a_model_needs_it(examine: Examine, write: Write) -> None:
    write(vllm="./missing")
    assert examine()["vLLM"]["verdict"] == "ok"
    write(vllm="./missing", path="org/model")
    check = examine(code=1)["vLLM"]
    assert (check["verdict"], "make vllm" in check["advice"]) == ("problem", True)


def test_gpus_are_listed_with_memory_and_driver(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "this_host", lambda: Host(2**40, 8, has_nvidia=True))
    for name, answer in {
        "nvmlInit": None, "nvmlSystemGetDriverVersion": "570.1", "nvmlDeviceGetCount": 2,
        "nvmlDeviceGetHandleByIndex": None, "nvmlDeviceGetName": "H200",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(free=2**30, total=2**31),
    }.items():  # fmt: skip
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
    found = examine()
    assert found["gpu1"]["message"] == "H200, 1.0 GiB of 2.0 GiB free, driver 570.1"


def test_an_unresponsive_driver_is_a_problem(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(doctor_checks, "this_host", lambda: Host(2**40, 8, has_nvidia=True))
    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert "nvidia-smi" in examine(code=1)["GPU"]["advice"]


def test_a_taken_port_is_a_problem_and_a_free_one_is_not(examine: Examine, write: Write) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        write(port=port)
        assert f"Port {port} on 127.0.0.1 is in use" in examine(code=1)["port"]["message"]
    assert "is free" in examine()["port"]["message"]


def test_folders_that_cannot_be_created_are_reported_with_their_option(
    examine: Examine, write: Write, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    write(more="logging: {path: file/logs}\nstorage: {url: 'sqlite:///file/x.db'}")
    found = examine(code=1)
    assert (found["log directory"]["verdict"], found["database"]["verdict"]) == ("warning", "problem")
    assert "logging.path" in found["log directory"]["advice"]
    assert "storage.url" in found["database"]["advice"]


def test_a_run_directory_that_others_may_write_to_is_a_problem(examine: Examine, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    assert "others may write" in examine(code=1)["run directory"]["message"]


def test_the_database_is_checked(examine: Examine, tmp_path: Path) -> None:
    file = tmp_path / "llm-api-server.db"
    database = Database(f"sqlite:///{file}")
    database.open()
    database.close()
    assert examine()["database"]["message"].endswith("responds")
    with database.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'older'")
    database.close()
    assert "upgrades its tables" in examine()["database"]["message"]
    file.write_text("this is no database, " * 100)
    assert "cannot be used" in examine(code=1)["database"]["message"]
    file.write_text("")
    assert "starting the server creates its tables" in examine()["database"]["message"]


def test_few_descriptors_are_a_warning(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    check = examine()["descriptors"]
    assert (check["verdict"], "LimitNOFILE" in check["advice"]) == ("warning", True)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    assert examine()["descriptors"]["verdict"] == "ok"
