"""`chat` in scripts and in conversations, against a server that responds as the test wants. Terminals: tests/e2e."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner, Result

from llm_api_server.cli import base
from llm_api_server.cli.client import chat
from llm_api_server.cli.client.api_client import ApiClient, ApiFailure
from llm_api_server.cli.main import app
from tests.tiny_api import TinyApi, event, words


def run(api: TinyApi, *more: str, prompt: str = "Hi\n") -> Result:
    result = CliRunner().invoke(app, ["chat", "--url", f"{api.url}/v1", *more], input=prompt)
    assert "Traceback" not in result.output
    return result


def test_a_script_gets_the_response_and_nothing_else(api: TinyApi) -> None:
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
    ("response", "message"),
    [
        ((401, "No such key."), f"No such key. (--key, or the environment variable {base.KEY_VARIABLE})"),
        ((429, "Slow down."), "Slow down."),
        ([event({"error": {"message": "The engine died."}})], "The engine died."),
        ([event({"choices": [{"delta": {"content": "Hel"}}]})], "is incomplete"),
        (["data: {"], "cannot be parsed"),
    ],
)
def test_an_error_of_the_server_is_printed(api: TinyApi, response: list[str] | tuple[int, str], message: str) -> None:
    api.answer = lambda _: response
    result = run(api)
    assert result.exit_code == 1
    assert message in result.stderr


def test_an_empty_prompt_is_refused(api: TinyApi) -> None:
    assert run(api, prompt=" \n").exit_code == 2
    assert api.requests == []


def test_an_unknown_model_is_an_error(api: TinyApi) -> None:
    result = run(api, "nobody")
    assert (result.exit_code, result.stderr) == (1, "There is no nobody.\n")


def test_a_server_without_chat_models_is_an_error(api: TinyApi) -> None:
    api.models = []
    result = run(api)
    assert result.exit_code == 1
    assert "models.available" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--url", "localhost"], 2, "localhost"),
        (["--url", "http://127.0.0.1:1"], 3, "http://127.0.0.1:1"),
        (["--url", "http://127.0.0.1:1", "--key", "ключ"], 2, "--key"),
    ],
)
def test_an_unusable_address_or_key_has_its_exit_code(options: list[str], code: int, text: str) -> None:
    result = CliRunner().invoke(app, ["chat", *options], input="Hi")
    assert (result.exit_code, text in result.stderr) == (code, True)


def test_a_conversation_is_kept_until_it_is_reset(api: TinyApi) -> None:
    conversation = chat.Conversation(ApiClient(api.url, None), "talker", "Be brief.")
    conversation.send("one")
    conversation.send("two")
    conversation.reset()
    conversation.send("three")
    sent = [[message["content"] for message in body["messages"]] for body in api.requests]
    assert sent == [["Be brief.", "one"], ["Be brief.", "one", "Hello", "two"], ["Be brief.", "three"]]


def test_a_message_without_response_is_not_kept(api: TinyApi) -> None:
    conversation = chat.Conversation(ApiClient(api.url, None), "talker")
    api.answer = lambda _: (503, "Not now.")
    with pytest.raises(ApiFailure, match="Not now"):
        conversation.send("one")
    api.answer = lambda _: words("Hello")
    conversation.send("two")
    assert [message["content"] for message in api.requests[-1]["messages"]] == ["two"]
