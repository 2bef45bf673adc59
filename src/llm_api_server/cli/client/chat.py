"""`llm-api-server chat`: a conversation with a model of the running server, on the terminal or in a script."""

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

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


def chat(
    *,
    model: ModelArgument = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told before all else.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="M", help="Most tokens of an answer; default: until the model ends it.")
    ] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    config: ConfigOption = None,
) -> None:
    """Chat with a model of the running server. Without a terminal: answer the prompt on standard input, and end."""
    from llm_api_server.cli.client import api_client

    prompt = None if sys.stdin.isatty() else sys.stdin.read().strip()
    if prompt == "":
        base.fail("Standard input is empty: write a prompt to it, or use a terminal.", ExitCode.WRONG)
    client, name = api_client.reach(config, url, key, model)
    conversation = Conversation(client, name, system, max_tokens)
    if prompt is None:
        _talk(conversation, f"{name} at {client.url}. {_HELP}")
    else:
        with base.errors():
            conversation.ask(prompt)


class Conversation:
    """What was said so far; each question is answered with all of it."""

    def __init__(self, client: ApiClient, model: str, system: str | None = None, max_tokens: int | None = None) -> None:
        self._client = client
        self._options = {"model": model} | ({} if max_tokens is None else {"max_tokens": max_tokens})
        self._first = [{"role": "system", "content": system}] if system is not None else []
        self._messages = list(self._first)

    def reset(self) -> None:
        self._messages = list(self._first)

    def ask(self, question: str) -> None:
        """Print the answer as it comes. Ctrl-C stops it, and what came stays. A question without answer is forgotten.

        Raises `ServerError`.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        screen = _Screen()
        with closing(self._client.stream({**self._options, "messages": messages})) as parts:
            screen.show(parts)
        if screen.text:
            self._messages = [*messages, {"role": "assistant", "content": screen.text}]


class _Screen:
    """One answer on standard output. On a terminal, reasoning and waiting are shown too, and controls are escaped."""

    def __init__(self) -> None:
        self.text = ""
        self._is_terminal = sys.stdout.isatty()
        self._is_waiting = False
        self._has_written = False

    def show(self, parts: Iterable[ContentDelta]) -> None:
        try:
            for part in parts:
                self._show(part)
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
            self._write("\n[stopped]" if self._has_written else "[stopped]", dim=True)
        finally:
            self._clear()
            if self._has_written:
                self._write("\n")

    def _show(self, part: ContentDelta) -> None:
        if part.comment and self._is_terminal:
            self._clear()
            typer.secho(f"{part.comment} ...", nl=False, dim=True)
            self._is_waiting = True
        if part.reasoning and self._is_terminal:
            self._clear()
            self._write(part.reasoning, dim=True)
        if part.text:
            self._clear()
            self._write(part.text)
            self.text += part.text

    def _clear(self) -> None:
        """Take the line away that says what is waited for."""
        if self._is_waiting:
            typer.echo("\r\x1b[K", nl=False)
            self._is_waiting = False

    def _write(self, text: str, *, dim: bool = False) -> None:
        from llm_api_server.redaction import one_line

        if self._is_terminal:
            text = "\n".join(one_line(line) for line in text.replace("\r\n", "\n").split("\n"))
        typer.echo(typer.style(text, dim=True) if dim else text, nl=False)
        self._has_written = True


def _talk(conversation: Conversation, greeting: str) -> None:
    from llm_api_server.errors import ServerError

    with suppress(ImportError):
        import readline  # noqa: F401 - from then on input() can edit lines and repeat earlier ones
    typer.echo(f"{greeting}\n")
    while (question := _next_question()) is not None:
        match question.split():
            case []:
                continue
            case ["/exit" | "/quit"]:
                return
            case ["/reset"]:
                conversation.reset()
                typer.echo("Forgotten.\n")
            case [word] if word[0] == "/" and word[1:].isalpha():
                typer.echo(f"There is no command {word}. {_HELP}\n")
            case _:
                try:
                    conversation.ask(question)
                except KeyboardInterrupt:
                    typer.echo()  # it came just before or after the answer
                except ServerError as error:
                    typer.echo(str(error), err=True)
                typer.echo()


def _next_question() -> str | None:
    """None at the end of the input. Ctrl-C takes back the line."""
    while True:
        try:
            return input("> ")
        except KeyboardInterrupt:
            typer.echo()
        except EOFError:
            typer.echo()
            return None
