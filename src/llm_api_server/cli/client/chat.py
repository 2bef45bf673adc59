"""Command `chat`: a conversation with a model of the running server, on the terminal or in a script."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, KeyOption, ModelArgument, UrlOption
from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from llm_api_server.cli.client.api_client import ApiClient, ContentDelta

_HELP = "/reset starts a new conversation, /exit or Ctrl-D ends the chat, Ctrl-C stops a response."


def chat(
    *,
    model: ModelArgument = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="M", help="Max tokens per response. Default: until the model stops.")
    ] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Chat with a model of the running server. Without a terminal, answer the prompt on standard input and exit."""
    from llm_api_server.cli.client import api_client

    prompt = None if sys.stdin.isatty() else sys.stdin.read().strip()
    if prompt == "":
        base.fail("Standard input is empty: write a prompt to it, or use a terminal.", ExitCode.WRONG)
    client, name = api_client.connect(config, url, key, model)
    conversation = Conversation(client, name, system, max_tokens)
    if prompt is None:
        _run_terminal(conversation, f"{name} at {client.url}. {_HELP}")
    else:
        with base.errors():
            conversation.send(prompt)


class Conversation:
    """Messages so far; all of them are sent with each new one."""

    def __init__(self, client: ApiClient, model: str, system: str | None = None, max_tokens: int | None = None) -> None:
        self._client = client
        self._options = {"model": model} | ({} if max_tokens is None else {"max_tokens": max_tokens})
        self._first = [{"role": "system", "content": system}] if system is not None else []
        self._messages = list(self._first)

    def reset(self) -> None:
        self._messages = list(self._first)

    def send(self, message: str) -> None:
        """Send a message and print the response while it streams. Raises `ServerError`.

        Ctrl-C stops the response and keeps its text. A message without response is not kept.
        """
        messages = [*self._messages, {"role": "user", "content": message}]
        screen = _ChatScreen()
        with closing(self._client.stream({**self._options, "messages": messages})) as deltas:
            screen.show(deltas)
        if screen.text:
            self._messages = [*messages, {"role": "assistant", "content": screen.text}]


class _ChatScreen:
    """Response on standard output. A terminal also shows reasoning and waiting, with control characters escaped."""

    def __init__(self) -> None:
        self.text = ""
        self._is_terminal = sys.stdout.isatty()
        self._shows_comment = False
        self._has_written = False

    def show(self, deltas: Iterable[ContentDelta]) -> None:
        try:
            for delta in deltas:
                self._show(delta)
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
            self._write("\n[stopped]" if self._has_written else "[stopped]", dim=True)
        finally:
            self._clear_comment()
            if self._has_written:
                self._write("\n")

    def _show(self, delta: ContentDelta) -> None:
        if delta.comment and self._is_terminal:
            self._clear_comment()
            typer.secho(f"{delta.comment} ...", nl=False, dim=True)
            self._shows_comment = True
        if delta.reasoning and self._is_terminal:
            self._clear_comment()
            self._write(delta.reasoning, dim=True)
        if delta.text:
            self._clear_comment()
            self._write(delta.text)
            self.text += delta.text

    def _clear_comment(self) -> None:
        if self._shows_comment:
            typer.echo("\r\x1b[K", nl=False)
            self._shows_comment = False

    def _write(self, text: str, *, dim: bool = False) -> None:
        from llm_api_server.redaction import one_line

        if self._is_terminal:
            text = "\n".join(one_line(line) for line in text.replace("\r\n", "\n").split("\n"))
        typer.echo(typer.style(text, dim=True) if dim else text, nl=False)
        self._has_written = True


def _run_terminal(conversation: Conversation, greeting: str) -> None:
    """Read messages and commands until the end of the input."""
    from llm_api_server.errors import ServerError

    with suppress(ImportError):
        import readline  # noqa: F401 - from then on input() can edit lines and repeat earlier ones
    typer.echo(f"{greeting}\n")
    while (line := _next_line()) is not None:
        match line.split():
            case []:
                continue
            case ["/exit" | "/quit"]:
                return
            case ["/reset"]:
                conversation.reset()
                typer.echo("New conversation.\n")
            case [word] if word[0] == "/" and word[1:].isalpha():
                typer.echo(f"Unknown command {word}. {_HELP}\n")
            case _:
                try:
                    conversation.send(line)
                except KeyboardInterrupt:
                    typer.echo()  # Ctrl-C came just before or after the response
                except ServerError as error:
                    typer.echo(str(error), err=True)
                typer.echo()


def _next_line() -> str | None:
    """Return the next line; None at the end of the input. Ctrl-C discards the line."""
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            typer.echo()
        except EOFError:
            typer.echo()
            return None
