"""`chat` in scripts and in conversations, against a server that says what the test wants. Terminals: tests/e2e."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llm_api_server.cli import base
from llm_api_server.cli.client import chat
from llm_api_server.cli.client.api_client import ApiClient, ApiFailure, reach
from llm_api_server.cli.main import app
from tests.tiny_api import TinyApi, event, words

MODELS = [{"id": "embedder", "tasks": ["embed"]}, {"id": "talker", "tasks": ["generate"]}]


@pytest.fixture
def api() -> Iterator[TinyApi]:
    with TinyApi(lambda _: words("Hel", "lo"), MODELS) as server:
        yield server


def run(api: TinyApi, *more: str, prompt: str = "Hi\n") -> Result:
    result = CliRunner().invoke(app, ["chat", "--url", f"{api.url}/v1", *more], input=prompt)
    assert "Traceback" not in result.output
    return result


def test_a_prompt_on_standard_input_is_answered_and_nothing_else_is_printed(api: TinyApi) -> None:
    api.answer = lambda _: [
        ": waiting for talker",
        event({"choices": [{"delta": {"reasoning_content": "hm"}}]}),
        *words("Hel", "lo"),
    ]
    result = run(api, "--system", "Be brief.", "--max-tokens", "9", "--key", "sk-1")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello\n", "")
    (body,) = api.requests
    assert (body["model"], body["max_tokens"]) == ("talker", 9), "the first that generates"
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert api.keys == ["Bearer sk-1"]


def test_the_key_may_come_from_the_environment(api: TinyApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(base.KEY_VARIABLE, "sk-2")
    assert run(api).exit_code == 0
    assert api.keys == ["Bearer sk-2"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, "No such key."), f"No such key. (--key, or the environment's {base.KEY_VARIABLE})"),
        ((429, "Slow down."), "Slow down."),
        ([event({"error": {"message": "The engine died."}})], "The engine died."),
        ([event({"choices": [{"delta": {"content": "Hel"}}]})], "broke off"),
        (["data: {"], "cannot be read"),
    ],
)
def test_an_error_of_the_server_is_its_message(api: TinyApi, answer: list[str] | tuple[int, str], message: str) -> None:
    api.answer = lambda _: answer
    result = run(api)
    assert result.exit_code == 1
    assert message in result.stderr


def test_what_cannot_work_says_so_with_its_exit_code(api: TinyApi, tmp_path: Path) -> None:
    assert run(api, prompt=" \n").exit_code == 2
    result = run(api, "nobody")
    assert (result.exit_code, result.stderr) == (1, "There is no nobody.\n")
    assert run(api, "--key", "ключ").exit_code == 2
    for url, code in (("localhost", 2), ("http://127.0.0.1:1", 3)):
        result = CliRunner().invoke(app, ["chat", "--url", url], input="Hi")
        assert (result.exit_code, url in result.stderr) == (code, True)
    api.models = []
    assert "models.available" in run(api).stderr


def test_a_conversation_is_kept_until_it_is_reset(api: TinyApi) -> None:
    conversation = chat.Conversation(ApiClient(api.url, None), "talker", "Be brief.")
    conversation.ask("one")
    conversation.ask("two")
    conversation.reset()
    conversation.ask("three")
    said = [[message["content"] for message in body["messages"]] for body in api.requests]
    assert said == [["Be brief.", "one"], ["Be brief.", "one", "Hello", "two"], ["Be brief.", "three"]]


def test_a_question_that_failed_is_forgotten(api: TinyApi) -> None:
    conversation = chat.Conversation(ApiClient(api.url, None), "talker")
    api.answer = lambda _: (503, "Not now.")
    with pytest.raises(ApiFailure, match="Not now"):
        conversation.ask("one")
    api.answer = lambda _: words("Hello")
    conversation.ask("two")
    assert [message["content"] for message in api.requests[-1]["messages"]] == ["two"]


CONFIG = """
server: {{run_dir: run, port: 1}}
auth: {{enabled: {enabled}, api_keys: [{keys}]}}
models: {{available: {{m: {{path: a.gguf}}}}}}
"""
HASHED = "{key: 'sha256:" + 64 * "0" + "', name: hashed}"
ENDED = "{key: sk-ended-0123456789, name: ended, expires_at: 2020-01-01}"
OTHER = "{key: sk-other-0123456789, name: other, permissions: [embeddings]}"
NARROW = "{key: sk-narrow-0123456789, name: narrow, models: [x]}"
GOOD = "{key: sk-good-0123456789ab, name: good, permissions: [chat], models: [m]}"


@pytest.mark.parametrize(
    ("keys", "enabled", "key"),
    [
        ([HASHED, ENDED, OTHER, NARROW, GOOD], "true", "Bearer sk-good-0123456789ab"),
        ([GOOD], "false", None),
    ],
)
def test_the_configurations_first_usable_key_is_taken(
    api: TinyApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str], enabled: str, key: str | None
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(enabled=enabled, keys=", ".join(keys)))
    api.models = [{"id": "m"}]
    monkeypatch.setattr("llm_api_server.cli.client.api_client.ServerLock.holder", lambda _: 1)
    monkeypatch.setattr("llm_api_server.cli.client.api_client.local_url", lambda _host, _port: api.url)
    client, name = reach(path, None, None, "m")
    chat.Conversation(client, name).ask("Hi")
    assert api.keys == [key]


def test_without_a_usable_key_it_says_how_to_give_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.format(enabled="true", keys=f"{HASHED}, {OTHER}"))
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["chat"], input="Hi").exit_code == 3
    monkeypatch.setattr("llm_api_server.cli.client.api_client.ServerLock.holder", lambda _: 1)
    result = CliRunner().invoke(app, ["chat"], input="Hi")
    assert result.exit_code == 2
    assert f"--key or {base.KEY_VARIABLE}" in result.stderr
