"""Sources of models as users write them."""

from __future__ import annotations

import pytest

from llm_api_server.downloads.source import Source, file_name, parse_source
from llm_api_server.errors import DownloadError

GGUF = "https://example.org/models/tiny%20model.Q4_0.gguf?download=true"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("Qwen/Qwen3-0.6B", Source("huggingface", "Qwen/Qwen3-0.6B")),
        ("hf:Qwen/Qwen3-0.6B", Source("huggingface", "Qwen/Qwen3-0.6B")),
        ("ms:Qwen/Qwen3-0.6B", Source("modelscope", "Qwen/Qwen3-0.6B")),
        ("org/name@v1.0", Source("huggingface", "org/name", "v1.0")),
        ("org/name@refs/pr/1:Q8_0", Source("huggingface", "org/name", "refs/pr/1", "Q8_0")),
        ("org/name-GGUF:Q4_K_M", Source("huggingface", "org/name-GGUF", None, "Q4_K_M")),
        ("https://huggingface.co/org/name", Source("huggingface", "org/name")),
        ("https://huggingface.co/org/name/tree/v2", Source("huggingface", "org/name", "v2")),
        (
            "https://huggingface.co/org/name/blob/main/q/x.Q4_0.gguf",
            Source("huggingface", "org/name", "main", "q/x.Q4_0.gguf"),
        ),
        ("https://modelscope.cn/models/org/name", Source("modelscope", "org/name")),
        ("https://huggingface.co/org/name/resolve/v1/x.gguf", Source("huggingface", "org/name", "v1", "x.gguf")),
        (GGUF, Source("url", GGUF)),
        (" starter ", Source("starter", "starter")),
    ],
)
def test_a_source_is_parsed(text: str, source: Source) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize(
    "text",
    ["", "name", "a/b/c", "../etc", "org/..", "./x", "https://example.org/", "https://example.org/x.bin",
     "https://user:secret@example.org/x.gguf", "https://huggingface.co/", "https://huggingface.co/org", "https://huggingface.co/org/name/blob/main/README.md",
     "https://example.org/..%2Fx.gguf",
     "https://example.org/.gguf", "ftp://example.org/x.gguf", "org/name:", "org/name@", "org /name", "-org/name"],
)  # fmt: skip
def test_anything_else_is_refused_without_showing_passwords(text: str) -> None:
    with pytest.raises(DownloadError) as failure:
        parse_source(text)
    assert "secret" not in str(failure.value)


def test_options_are_equal_to_the_parts_of_the_text() -> None:
    source = parse_source("org/name", "v1", "Q8_0")
    assert source == parse_source("org/name@v1:Q8_0")
    assert source.text == "org/name@v1:Q8_0"
    assert parse_source(parse_source("ms:org/name@v1").text) == Source("modelscope", "org/name", "v1")


def test_folders_and_file_names() -> None:
    assert parse_source("org/name").folder == "name"
    assert parse_source(GGUF).folder == ""
    assert file_name(GGUF) == "tiny model.Q4_0.gguf"
