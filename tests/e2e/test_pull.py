"""`models pull` and `models rm` with the hubs' own client libraries, against a hub on this machine."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.gguf_files import write_gguf
from tests.hub import COMMIT, Hub, Repo, hub
from tests.running import BIN, Server, running
from tests.waiting import wait_until

GGUF = "model-Q4_K_M.gguf"
REPO = "tests/tiny-GGUF"
MIB = 1 << 20


@pytest.fixture
def weights(tmp_path: Path) -> bytes:
    """A valid GGUF header followed by random bytes."""
    return write_gguf(tmp_path / "made.gguf").read_bytes() + random.Random(1).randbytes(10 * MIB)


@pytest.fixture
def here(weights: bytes) -> Iterator[Hub]:
    with hub() as one:
        one.repos[REPO] = Repo({"README.md": b"# tiny", GGUF: weights})
        one.files["tiny.Q4_0.gguf"] = weights
        yield one


class User:
    """A user with a configuration file in an empty folder."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder = folder
        self.file = folder / "config.yaml"
        self.models = folder / "models"
        self.file.write_text("# mine\nserver:\n  run_dir: run\nauth:\n  enabled: false\nmodels:\n  available: {}\n")
        self.environment = {
            **os.environ, **hub.environment(), "HOME": str(folder), "LLM_API_SERVER_CONFIG": str(self.file)
        }  # fmt: skip

    def command(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "llm-api-server"), "models", *words], cwd=self.folder, env={**self.environment, **environment},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def pull(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.command("pull", *words, "--yes", **environment)

    def entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = yaml.safe_load(self.file.read_text())["models"]["available"]
        return entries

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.models)) for path in self.models.rglob("*") if path.is_file())


@pytest.fixture
def user(tmp_path: Path, here: Hub) -> User:
    return User(tmp_path, here)


def of_weights(hub: Hub, path: str = GGUF) -> list[tuple[str | None, int]]:
    return [(wanted, count) for _, asked, wanted, count in hub.asked if asked == path]


@pytest.mark.parametrize(
    ("source", "path", "name"),
    [
        pytest.param(REPO, f"tiny-GGUF/{GGUF}", "tiny", marks=pytest.mark.story),
        (f"ms:{REPO}", f"tiny-GGUF/{GGUF}", "tiny"),
        ("URL", "tiny.Q4_0.gguf", "tiny"),
    ],
)
def test_model_is_pulled_and_removed(user: User, here: Hub, weights: bytes, source: str, path: str, name: str) -> None:
    done = user.pull(source if source != "URL" else f"{here.url}/files/tiny.Q4_0.gguf")
    assert done.returncode == 0, done.stderr
    assert user.entries() == {name: {"path": path, "engine": "llama_cpp", "type": "llama"}}
    assert user.file.read_text().startswith("# mine\n")
    assert user.files() == [path]
    assert (user.models / path).read_bytes() == weights
    check = subprocess.run(
        [str(BIN / "llm-api-server"), "check-config"], env=user.environment, capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr
    here.asked.clear()
    again = user.pull(source if source != "URL" else f"{here.url}/files/tiny.Q4_0.gguf")
    assert again.returncode == 0, again.stderr
    assert "already" in again.stdout
    assert of_weights(here, path.rpartition("/")[2]) == []
    gone = user.command("rm", name, "--yes")
    assert gone.returncode == 0, gone.stderr
    assert (user.entries(), user.files()) == ({}, [])


@pytest.mark.parametrize("source", [REPO, f"ms:{REPO}", "URL"])
def test_broken_connection_is_resumed(user: User, here: Hub, weights: bytes, source: str) -> None:
    path = GGUF if source != "URL" else "tiny.Q4_0.gguf"
    here.breaks[path] = [4 * MIB, 3 * MIB]
    done = user.pull(source if source != "URL" else f"{here.url}/files/tiny.Q4_0.gguf")
    assert done.returncode == 0, done.stderr
    (only,) = (user.models / one for one in user.files())
    assert only.read_bytes() == weights
    assert sum(count for _, count in of_weights(here, path)) < len(weights) + MIB


@pytest.mark.parametrize("source", [REPO, f"ms:{REPO}"])
def test_killed_download_is_resumed(user: User, here: Hub, weights: bytes, source: str) -> None:
    here.breaks[GGUF] = [4 * MIB] + [0] * 100
    process = subprocess.Popen(
        [str(BIN / "llm-api-server"), "models", "pull", source, "--json"], cwd=user.folder, env=user.environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: any(count == 0 for _, count in of_weights(here)))
    process.send_signal(signal.SIGKILL)
    process.wait()
    here.breaks.clear()
    here.asked.clear()
    done = user.pull(source)
    assert done.returncode == 0, done.stderr
    assert (user.models / "tiny-GGUF" / GGUF).read_bytes() == weights
    assert sum(count for _, count in of_weights(here)) <= len(weights) - 3 * MIB


@pytest.mark.parametrize("source", [REPO, f"ms:{REPO}"])
def test_damaged_download_is_not_kept(user: User, here: Hub, source: str) -> None:
    here.damaged.add(GGUF)
    done = user.pull(source)
    assert done.returncode == 1
    assert "damaged" in done.stderr
    assert (user.entries(), [path for path in user.files() if path.endswith(".gguf")]) == ({}, [])
    here.damaged.clear()
    assert user.pull(source).returncode == 0


def test_file_changed_on_disk_is_downloaded_again(user: User, here: Hub, weights: bytes) -> None:
    assert user.pull(REPO).returncode == 0
    path = user.models / "tiny-GGUF" / GGUF
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert user.pull(REPO).returncode == 0
    assert path.read_bytes() == weights


def test_model_folder_is_pulled_for_vllm(user: User, here: Hub) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 131072}
    header = json.dumps({"w": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
    files = {
        "config.json": json.dumps(config).encode(),
        "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}',
        "model.safetensors": len(header).to_bytes(8, "little") + header + bytes(64),
    }
    here.repos["tests/folder"] = Repo({**files, "onnx/model.onnx": b"x" * 1000, ".gitattributes": b""})
    done = user.pull("tests/folder", "--revision", COMMIT)
    assert done.returncode == 0, done.stderr
    assert user.entries() == {"folder": {"path": "folder", "engine": "vllm", "type": "llama", "max_tokens": 32768}}
    assert user.files() == sorted(f"folder/{name}" for name in files)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["tests/nothing"], "does not exist on Hugging Face, or is private"),
        (["ms:tests/nothing"], "does not exist on ModelScope, or is private: check both"),
        (["tests/no-model"], "it has neither .gguf files nor a config.json"),
        (["tests/no-gguf"], "It is kept in"),
        ([REPO, "--revision", "v9"], "has no revision 'v9'"),
        ([f"{REPO}:Q9_9"], "has no file 'Q9_9'. It has model-Q4_K_M.gguf (10 MB)"),
        (["nonsense"], "is not a source of models"),
        (["http://127.0.0.1:9/x.gguf"], "x.gguf cannot be reached: Connection refused. Check the network"),
    ],
)
def test_failed_pull_is_explained_in_one_line(user: User, here: Hub, words: list[str], reason: str) -> None:
    here.repos["tests/no-model"] = Repo({"data.csv": b"1,2"})
    here.repos["tests/no-gguf"] = Repo({GGUF: b"<html>"})
    done = user.pull(*words)
    assert done.returncode == 1
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert user.entries() == {}


def test_gated_model_needs_a_token(user: User, here: Hub) -> None:
    here.repos[REPO].is_gated = True
    refused = user.pull(REPO, HF_TOKEN="hf_wrong")
    assert refused.returncode == 1
    assert "accept its licence on that page, with the account of the configured token" in refused.stderr
    unknown = user.pull(REPO, HF_TOKEN="")
    assert "then set HF_TOKEN" in unknown.stderr
    assert user.pull(REPO).returncode == 0


def test_unreachable_hub_is_explained(user: User) -> None:
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        user.environment[name] = "http://127.0.0.1:9"
    for source in (REPO, f"ms:{REPO}"):
        done = user.pull(source)
        assert done.returncode == 1
        assert "cannot be reached: Connection refused. " in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_pull_prints_events_as_json(user: User, weights: bytes) -> None:
    done = user.pull(REPO, "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["type"] == "planned"
    assert (events[0]["revision"], events[0]["files"]) == (COMMIT, {GGUF: len(weights)})
    counts = [event["bytes"] for event in events if event["type"] == "progress"]
    assert counts == sorted(counts)
    assert counts[-1] == len(weights)
    path = f"tiny-GGUF/{GGUF}"
    assert events[-2] == {"type": "pulled", "path": path, "projector": None, "verified": True}
    entry = {"path": path, "engine": "llama_cpp", "type": "llama"}
    assert events[-1] == {"type": "entry", "model": "tiny", "entry": entry}


def test_second_pull_of_a_model_is_refused(user: User, here: Hub) -> None:
    here.breaks[GGUF] = [MIB] + [0] * 100
    first = subprocess.Popen(
        [str(BIN / "llm-api-server"), "models", "pull", REPO, "--json"], cwd=user.folder, env=user.environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: bool(of_weights(here)))
        second = user.pull(REPO)
        assert second.returncode == 1
        assert "is already being downloaded" in second.stderr
    finally:
        first.kill()
        first.wait()


def test_unconfirmed_pull_writes_nothing(user: User) -> None:
    done = user.command("pull", REPO)
    assert done.returncode == 1
    assert "tiny:" in done.stdout
    assert user.entries() == {}
    assert user.pull(REPO, "--name", "mine").returncode == 0
    assert list(user.entries()) == ["mine"]


def test_ctrl_c_reports_that_the_download_can_be_resumed(user: User, here: Hub) -> None:
    here.breaks[GGUF] = [4 * MIB] + [0] * 100
    process = subprocess.Popen(
        [str(BIN / "llm-api-server"), "models", "pull", REPO], cwd=user.folder, env=user.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: any(count == 0 for _, count in of_weights(here)))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.splitlines()) == (
        130,
        ["Interrupted. Downloaded data is kept: run the same command again to resume."],
    )


def test_pulled_model_does_not_replace_another_of_its_name(user: User, here: Hub, weights: bytes) -> None:
    """A requested name that is taken is refused before the download; a derived name is made unique."""
    here.repos[REPO].files["model-Q8_0.gguf"] = weights + b"x"
    assert user.pull(REPO).returncode == 0
    here.asked.clear()
    refused = user.pull(f"{here.url}/files/tiny.Q4_0.gguf", "--name", "tiny")
    assert (refused.returncode, here.asked) == (2, [])
    assert "another model 'tiny'" in refused.stderr
    assert user.pull(f"{REPO}:Q8_0").returncode == 0
    assert {name: entry["path"] for name, entry in user.entries().items()} == {
        "tiny": f"tiny-GGUF/{GGUF}",
        "model-Q8_0": "tiny-GGUF/model-Q8_0.gguf",
    }


def test_removal_keeps_files_that_another_model_uses(user: User) -> None:
    assert user.pull(REPO).returncode == 0
    assert user.pull(REPO, "--name", "second").returncode == 0
    text = user.file.read_text().replace("    tiny:", f"    other: {{path: tiny-GGUF/{GGUF}}}\n    tiny:")
    user.file.write_text(text)
    assert user.command("rm", "tiny", "--yes").returncode == 0
    assert user.files() == [f"tiny-GGUF/{GGUF}"]
    assert user.command("rm", "other").returncode == 1
    assert user.command("rm", "second", "--yes").returncode == 0
    assert user.files() == [f"tiny-GGUF/{GGUF}"]
    assert user.command("rm", "other", "--yes", "--keep-files").returncode == 0
    assert (user.entries(), user.files()) == ({}, [f"tiny-GGUF/{GGUF}"])


def test_running_server_follows_a_pull_at_once(tmp_path: Path, here: Hub, smollm2_gguf: Path) -> None:
    here.repos[REPO].files[GGUF] = smollm2_gguf.read_bytes()
    with running(tmp_path, {"models": {"available": {}}}) as server:
        user = User.__new__(User)
        user.folder, user.file, user.models = tmp_path, tmp_path / "config.yaml", tmp_path / "models"
        user.environment = {**os.environ, **here.environment(), "HOME": str(tmp_path)}
        done = user.pull(REPO)
        assert done.returncode == 0, done.stderr
        assert "The running server has applied the change." in done.stdout
        assert status_of(server, "tiny") == 200
        gone = user.command("rm", "tiny", "--yes")
        assert gone.returncode == 0, gone.stderr
        wait_until(lambda: status_of(server, "tiny") == 404)
        assert user.files() == []


def status_of(server: Server, model: str) -> int:
    with server.client() as client:
        body = {"model": model, "prompt": "Hi", "max_tokens": 2}
        return client.post("/v1/completions", json=body).status_code
