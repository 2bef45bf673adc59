"""Chat templates of an entry: found beside the models or the configuration, and what both engines make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.config.models import Config, ModelConfig, ModelsConfig
from llm_api_server.devices.host import Host
from llm_api_server.engines.base import ModelProblem
from llm_api_server.engines.llama_cpp.adapter import LlamaCppEngine
from llm_api_server.engines.model_formats.chat_template import given_template, template_text
from llm_api_server.engines.vllm.adapter import VllmEngine
from tests.gguf_files import LLAMA, write_gguf
from tests.unit.engines.model_formats.test_hf_folder import LLAMA as LLAMA_CONFIG
from tests.unit.engines.model_formats.test_hf_folder import write_folder

HOST = Host(16 * 1024**3, 4, has_nvidia=False)
HERMES = "{% if tools %}<tool_call>{% endif %}"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "models").mkdir()
    return Config(models=ModelsConfig(), source=tmp_path / "config.yaml")


def test_a_file_is_found_in_models_dir_then_beside_the_configuration(config: Config) -> None:
    args = {"chat_template": "mine.jinja"}
    (config.folder / "mine.jinja").write_text("beside")
    assert template_text(given_template(config, args)) == "beside"
    (config.models_dir / "mine.jinja").write_text("in models_dir")
    assert template_text(given_template(config, args)) == "in models_dir"
    absolute = {"chat_template": str(config.folder / "mine.jinja")}
    assert given_template(config, absolute) == config.folder / "mine.jinja"


def test_text_and_names_are_the_engines_matter(config: Config) -> None:
    assert template_text(given_template(config, {"chat_template": HERMES})) == HERMES
    for name in ("chatml", "template_chatml.jinja"):
        template = given_template(config, {"chat_template": name})
        assert (template, template_text(template)) == (name, None)
    assert given_template(config, {}) is None
    assert given_template(config, {"chat_template": None}) is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [("none.jinja", "no file 'none.jinja'"), ("a/b", "no file 'b'"), (7, "must be"), ("", "must be")],
)
def test_what_is_not_there_is_told_without_the_folder(config: Config, value: Any, reason: str) -> None:
    with pytest.raises(ModelProblem, match=reason) as caught:
        given_template(config, {"chat_template": value})
    assert str(config.folder) not in str(caught.value)


def test_a_file_that_is_not_text_is_told(config: Config) -> None:
    (config.folder / "bad.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelProblem, match="not UTF-8"):
        template_text(given_template(config, {"chat_template": "bad.jinja"}))


@pytest.mark.parametrize("key", ["chat_template", "--chat-template"])
def test_vllm_gets_the_file_and_the_parser_that_fits_it(config: Config, key: str) -> None:
    (config.models_dir / "mine.jinja").write_text(HERMES)
    folder = config.models_dir / "any"
    folder.mkdir()
    write_folder(folder, LLAMA_CONFIG, chat_template__jinja="{{ messages }}")
    model = ModelConfig(path=str(folder), engine_args={key: "mine.jinja"})
    argv = VllmEngine(config, HOST).plan("name", model, Path("/run/e.sock")).argv
    assert argv[argv.index("--chat-template") + 1] == str(config.models_dir / "mine.jinja")
    assert argv.count("--chat-template") == 1
    assert argv[argv.index("--tool-call-parser") + 1] == "hermes"


def test_a_missing_file_is_a_problem_before_any_load(config: Config) -> None:
    folder = config.models_dir / "any"
    folder.mkdir()
    gguf = write_gguf(config.models_dir / "any.gguf")
    args = {"chat_template": "none.jinja"}
    for engine, path in ((VllmEngine(config, HOST), write_folder(folder)), (LlamaCppEngine(config, HOST), gguf)):
        with pytest.raises(ModelProblem, match="no file"):
            engine.inspect(ModelConfig(path=str(path), engine_args=args))


def test_llama_cpp_gets_the_text(config: Config) -> None:
    (config.models_dir / "mine.jinja").write_text(HERMES)
    path = str(write_gguf(config.models_dir / "any.gguf"))
    for value, passed in (("mine.jinja", HERMES), (HERMES, HERMES), ("chatml", "chatml")):
        model = ModelConfig(path=path, engine_args={"chat_template": value})
        plan = LlamaCppEngine(config, HOST).plan("name", model, Path("/run/e.sock"))
        assert json.loads(plan.argv[-1])["params"]["chat_template"] == passed


def test_a_gguf_without_a_template_cannot_chat_unless_it_is_given_one(config: Config) -> None:
    bare = {key: value for key, value in LLAMA.items() if key != "tokenizer.chat_template"}
    path = str(write_gguf(config.models_dir / "bare.gguf", bare))
    engine = LlamaCppEngine(config, HOST)
    assert engine.inspect(ModelConfig(path=path)).chat_template is False
    assert engine.inspect(ModelConfig(path=path, engine_args={"chat_template": "chatml"})).chat_template is True
    assert engine.inspect(ModelConfig(path=path, task="embed")).chat_template is None
    whole = str(write_gguf(config.models_dir / "whole.gguf", LLAMA | {"tokenizer.chat_template": "x"}))
    assert engine.inspect(ModelConfig(path=whole)).chat_template is True
