"""Choice of the files of a repository."""

from __future__ import annotations

import pytest

from llm_api_server.downloads.choice import Choice, RemoteFile, choose
from llm_api_server.downloads.source import parse_source
from llm_api_server.errors import DownloadError

GIB = 1 << 30
GB = 10**9


def files(**sizes: int) -> list[RemoteFile]:
    return [RemoteFile(path, size) for path, size in sizes.items()]


QUANTIZED = files(**{
    "README.md": 1, "m-Q2_K.gguf": 2 * GB, "m-Q4_K_M.gguf": 4 * GB, "m-Q4_K_S.gguf": 3 * GB, "m-Q8_0.gguf": 8 * GB,
    "m-F16.gguf": 16 * GB, "config.json": 1,
})  # fmt: skip


def choice_of(text: str, of: list[RemoteFile], memory: int = 100 * GB) -> Choice:
    return choose(parse_source(text), of, memory)


def paths(choice: Choice) -> list[str]:
    return [file.path for file in choice.files]


@pytest.mark.parametrize(
    ("memory", "main"),
    [(100 * GB, "m-Q4_K_M.gguf"), (5 * GB, "m-Q4_K_M.gguf"), (4 * GB, "m-Q4_K_S.gguf"), (3 * GB, "m-Q2_K.gguf")],
)
def test_the_preferred_quantization_is_chosen_if_it_fits(memory: int, main: str) -> None:
    choice = choice_of("o/m", QUANTIZED, memory)
    assert (choice.main, paths(choice)) == (main, [main])


def test_an_error_names_the_smallest_file_if_none_fits() -> None:
    with pytest.raises(
        DownloadError, match=r"smallest, m-Q2_K.gguf, has 2.0 GB, and weights may take 800 MB of the 1.0 GB"
    ):
        choice_of("o/m", QUANTIZED, GB)


def test_without_the_preferred_one_the_largest_quantized_file_is_chosen() -> None:
    others = [file for file in QUANTIZED if "Q4_K_M" not in file.path]
    assert choice_of("o/m", others).main == "m-Q8_0.gguf"
    assert choice_of("o/m", files(**{"m-F16.gguf": GB, "m-BF16.gguf": GB - 1})).main == "m-F16.gguf"


@pytest.mark.parametrize(
    ("wanted", "main"),
    [("Q8_0", "m-Q8_0.gguf"), ("q4_k_s", "m-Q4_K_S.gguf"), ("m-F16.gguf", "m-F16.gguf"), ("*q2*", "m-Q2_K.gguf")],
)
def test_a_quantization_file_or_pattern_chooses_regardless_of_memory(wanted: str, main: str) -> None:
    assert choice_of(f"o/m:{wanted}", QUANTIZED, memory=1).main == main


@pytest.mark.parametrize("wanted", ["Q5_K_M", "*Q4_K*", "Q4_K"])
def test_a_name_that_matches_no_file_or_several_is_an_error(wanted: str) -> None:
    with pytest.raises(DownloadError, match=r"has no file|matches several files"):
        choice_of(f"o/m:{wanted}", QUANTIZED)


def test_a_split_model_is_chosen_with_all_its_parts() -> None:
    parts = {f"q/m-Q4_K_M-0000{n}-of-00003.gguf": GB for n in (3, 1, 2)}
    choice = choice_of("o/m", files(**parts))
    assert choice.main == "q/m-Q4_K_M-00001-of-00003.gguf"
    assert paths(choice) == sorted(parts)
    assert choice.size == 3 * GB
    with pytest.raises(DownloadError, match="parts of a split model are missing"):
        choice_of("o/m", files(**dict(list(parts.items())[:2])))


def test_the_smallest_projector_is_chosen_with_the_model() -> None:
    choice = choice_of("o/m", files(**{"m-Q4_K_M.gguf": GB, "mmproj-m-f16.gguf": 2, "mmproj-m-f32.gguf": 4}))
    assert paths(choice) == ["m-Q4_K_M.gguf", "mmproj-m-f16.gguf"]
    assert choice.projector == "mmproj-m-f16.gguf"


def test_a_folder_is_chosen_without_files_that_no_engine_reads() -> None:
    of = files(**{
        "config.json": 1, "tokenizer.json": 1, "model-1.safetensors": 5, "model-2.safetensors": 5, "model.onnx": 9,
        "pytorch_model.bin": 9, "consolidated.safetensors": 9, "onnx/model.onnx": 9, "original/x.pth": 9, "logo.png": 1,
        "1_Pooling/config.json": 1, ".gitattributes": 1, "../evil.json": 1, "chat_template.jinja": 1,
    })  # fmt: skip
    choice = choice_of("o/m", of)
    assert choice.main == ""
    assert sorted(paths(choice)) == [
        "1_Pooling/config.json", "chat_template.jinja", "config.json", "model-1.safetensors", "model-2.safetensors",
        "tokenizer.json",
    ]  # fmt: skip


def test_pytorch_weights_are_chosen_if_there_are_no_others() -> None:
    assert "pytorch_model.bin" in paths(
        choice_of("o/m", files(**{"config.json": 1, "pytorch_model.bin": 9, "x.bin": 9}))
    )


@pytest.mark.parametrize("of", [files(), files(**{"README.md": 1}), files(**{"config.json": 1})])
def test_a_repository_without_a_model_is_an_error(of: list[RemoteFile]) -> None:
    with pytest.raises(DownloadError, match="is not a model that can be loaded here"):
        choice_of("o/m", of)


def test_a_quantization_of_a_folder_is_an_error() -> None:
    with pytest.raises(DownloadError, match=r"has no \.gguf files"):
        choice_of("o/m:Q4_K_M", files(**{"config.json": 1, "model.safetensors": 1}))
