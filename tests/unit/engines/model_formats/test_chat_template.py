"""Chat templates given in `engine_args`: how they are found, and how both engines pass them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.config.models import ModelConfig
from llm_api_server.devices.host import Host
from llm_api_server.engines.base import ModelProblem
from llm_api_server.engines.llama_cpp.adapter import LlamaCppEngine
from llm_api_server.engines.model_formats.chat_template import given_template, template_text
from llm_api_server.engines.settings import EngineSettings
from llm_api_server.engines.vllm.adapter import VllmEngine
from tests.gguf_files import LLAMA, write_gguf
from tests.unit.engines.model_formats.test_hf_folder import LLAMA as LLAMA_CONFIG
from tests.unit.engines.model_formats.test_hf_folder import write_folder

HOST = Host(16 * 1024**3, 4, has_nvidia=False)
HERMES = "{% if tools %}<tool_call>{% endif %}"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "models").mkdir()
    return tmp_path / "models", tmp_path


def test_a_file_is_found_in_the_first_folder_that_has_it(folders: tuple[Path, Path]) -> None:
    args = {"chat_template": "mine.jinja"}
    (folders[1] / "mine.jinja").write_text("beside")
    assert template_text(given_template(folders, args)) == "beside"
    (folders[0] / "mine.jinja").write_text("in models")
    assert template_text(given_template(folders, args)) == "in models"
    absolute = {"chat_template": str(folders[1] / "mine.jinja")}
    assert given_template(folders, absolute) == folders[1] / "mine.jinja"


def test_templates_and_names_are_left_to_the_engine(folders: tuple[Path, Path]) -> None:
    assert template_text(given_template(folders, {"chat_template": HERMES})) == HERMES
    for name in ("chatml", "template_chatml.jinja"):
        template = given_template(folders, {"chat_template": name})
        assert (template, template_text(template)) == (name, None)
    assert given_template(folders, {}) is None
    assert given_template(folders, {"chat_template": None}) is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [("none.jinja", "no file 'none.jinja'"), ("a/b", "no file 'b'"), (7, "must be"), ("", "must be")],
)
def test_a_missing_file_is_reported_without_its_folder(folders: tuple[Path, Path], value: Any, reason: str) -> None:
    with pytest.raises(ModelProblem, match=reason) as caught:
        given_template(folders, {"chat_template": value})
    assert str(folders[1]) not in str(caught.value)


def test_a_file_that_is_not_text_is_reported(folders: tuple[Path, Path]) -> None:
    (folders[1] / "bad.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelProblem, match="not UTF-8"):
        template_text(given_template(folders, {"chat_template": "bad.jinja"}))


@pytest.mark.parametrize("key", ["chat_template", "--chat-template"])
def test_vllm_gets_the_file_and_the_parser_that_fits_it(folders: tuple[Path, Path], key: str) -> None:
    (folders[0] / "mine.jinja").write_text(HERMES)
    folder = folders[0] / "any"
    folder.mkdir()
    write_folder(folder, LLAMA_CONFIG, chat_template__jinja="{{ messages }}")
    model = ModelConfig(path=str(folder), engine_args={key: "mine.jinja"})
    argv = VllmEngine(EngineSettings(template_folders=folders), HOST).plan("name", model, Path("/run/e.sock")).argv
    assert argv[argv.index("--chat-template") + 1] == str(folders[0] / "mine.jinja")
    assert argv.count("--chat-template") == 1
    assert argv[argv.index("--tool-call-parser") + 1] == "hermes"


def test_a_missing_file_is_a_problem_before_any_load(folders: tuple[Path, Path]) -> None:
    folder = folders[0] / "any"
    folder.mkdir()
    gguf = write_gguf(folders[0] / "any.gguf")
    args = {"chat_template": "none.jinja"}
    for engine, path in (
        (VllmEngine(EngineSettings(template_folders=folders), HOST), write_folder(folder)),
        (LlamaCppEngine(EngineSettings(template_folders=folders), HOST), gguf),
    ):
        with pytest.raises(ModelProblem, match="no file"):
            engine.inspect(ModelConfig(path=str(path), engine_args=args))


def test_llama_cpp_gets_the_text(folders: tuple[Path, Path]) -> None:
    (folders[0] / "mine.jinja").write_text(HERMES)
    path = str(write_gguf(folders[0] / "any.gguf"))
    for value, passed in (("mine.jinja", HERMES), (HERMES, HERMES), ("chatml", "chatml")):
        model = ModelConfig(path=path, engine_args={"chat_template": value})
        plan = LlamaCppEngine(EngineSettings(template_folders=folders), HOST).plan("name", model, Path("/run/e.sock"))
        assert json.loads(plan.argv[-1])["params"]["chat_template"] == passed


def test_a_gguf_without_a_template_cannot_chat_unless_it_is_given_one(folders: tuple[Path, Path]) -> None:
    bare = {key: value for key, value in LLAMA.items() if key != "tokenizer.chat_template"}
    path = str(write_gguf(folders[0] / "bare.gguf", bare))
    engine = LlamaCppEngine(EngineSettings(template_folders=folders), HOST)
    assert engine.inspect(ModelConfig(path=path)).chat_template is False
    assert engine.inspect(ModelConfig(path=path, engine_args={"chat_template": "chatml"})).chat_template is True
    assert engine.inspect(ModelConfig(path=path, task="embed")).chat_template is None
    whole = str(write_gguf(folders[0] / "whole.gguf", LLAMA | {"tokenizer.chat_template": "x"}))
    assert engine.inspect(ModelConfig(path=whole)).chat_template is True
