"""The files in `deploy/` agree with the server's defaults, with each other and with what is in the repository."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_api_server.config.load import load_config
from llm_api_server.config.models import ServerConfig
from llm_api_server.types import ExitCode
from tests.needs import missing
from tests.running import ROOT

UNIT = ROOT / "deploy/systemd/llm-api-server.service"
DOCKER = ROOT / "deploy/docker"
CONFIGS = {"systemd": ROOT / "deploy/systemd/config.yaml", "docker": DOCKER / "config/config.yaml"}
#: As long as `llm-api-server stop` waits.
LONGEST_STOP = 2 * ServerConfig().drain_timeout + 60


def unit() -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign] # names keep their case
    parser.read_string(UNIT.read_text())
    return parser["Service"]


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return content


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_can_be_used(name: str) -> None:
    assert load_config(CONFIGS[name]).server.workers > 1, "one worker cannot be replaced while it serves"


def test_who_stops_the_server_waits_long_enough() -> None:
    assert int(unit()["TimeoutStopSec"]) > LONGEST_STOP
    assert int(compose()["services"]["server"]["stop_grace_period"].removesuffix("s")) > LONGEST_STOP


def test_the_unit_has_the_folders_of_its_configuration() -> None:
    config = load_config(CONFIGS["systemd"])
    service = unit()
    assert str(config.run_dir) == f"/run/{service['RuntimeDirectory']}"
    assert str(config.log_dir) == f"/var/log/{service['LogsDirectory']}"
    assert config.storage_url.startswith(f"sqlite:////var/lib/{service['StateDirectory']}/")
    assert int(service["RestartPreventExitStatus"]) == ExitCode.WRONG


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze") or missing("systemd", "systemd-analyze is not installed")
    (tmp_path / UNIT.name).write_text(re.sub(r"/opt/\S+/llm-api-server", "/bin/true", UNIT.read_text()))
    command = [program, "verify", str(tmp_path / UNIT.name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_images_are_made_of_what_is_here(name: str) -> None:
    text = (DOCKER / name).read_text()
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [word for words in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for word in words.split()]
    assert "requirements.lock" in copied
    for word in copied:
        assert (ROOT / word).exists()
        assert f"!{word}" in allowed
    assert re.search(r"^USER \d+:\d+$", text, re.MULTILINE), "runAsNonRoot needs a numeric user"


def test_volumes_are_where_the_configuration_looks() -> None:
    config = load_config(CONFIGS["docker"])
    mounted = {entry.split(":")[1] for entry in compose()["services"]["server"]["volumes"]}
    assert {str(config.models_dir), str(config.log_dir)} <= mounted
    assert config.storage_url.startswith("sqlite:////data/")
    assert "/data" in mounted


def test_files_that_services_mount_exist() -> None:
    for service in compose()["services"].values():
        for entry in service.get("volumes", []):
            source = entry.split(":")[0]
            if source.startswith(".") and "secrets" not in source:
                assert (DOCKER / source).exists(), source


def test_prometheus_takes_its_configuration() -> None:
    program = shutil.which("promtool") or missing("promtool", "promtool is not installed (apt-get install prometheus)")
    command = [program, "check", "config", "--syntax-only", str(ROOT / "deploy/prometheus/prometheus.yml")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
