"""The configuration as one process hands it to another."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_api_server.config.models import Config
from llm_api_server.lifecycle.config_handover import digest, likely_run_dir, pack, running_config, unpack


def test_a_configuration_is_unpacked_as_it_was_packed(tmp_path: Path) -> None:
    config = Config.model_validate({"server": {"port": 81}, "source": tmp_path / "config.yaml"})
    assert unpack(pack(config)) == config
    assert digest(pack(unpack(pack(config)))) == digest(pack(config))


def test_without_a_manager_there_is_no_running_configuration(tmp_path: Path) -> None:
    assert running_config(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "is_named"),
    [("server: {run_dir: RUN, port: no}", True), ("server: {prot: 1}", False), ("server: [", False), ("", False)],
)
def test_the_run_directory_of_an_invalid_file_is_found(tmp_path: Path, text: str, is_named: bool) -> None:
    path, named = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(text.replace("RUN", str(named)))
    default = Config().model_copy(update={"source": path}).run_dir
    assert likely_run_dir(path) == (named if is_named else default)
