"""Anthropic's SDK, set up by environment variables alone, as tools built on it use it."""

from __future__ import annotations

from typing import Any

from anthropic import Anthropic
from findings import LONG, MODEL, WRONG_KEY, error_of, report

HELLO: Any = [{"role": "user", "content": "Say hello"}]
CITY: Any = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOLS: Any = [{"name": "get_weather", "description": "Weather now", "input_schema": CITY}]

FACES = "Reply with emoji only: 😀 😀 😀"
#: Most answers to it begin with a token that is part of a character.
EMOJI: Any = [
    {"role": "user", "content": FACES},
    {"role": "assistant", "content": "😀" * 10},
    {"role": "user", "content": FACES},
]
CALLED: Any = [
    *HELLO,
    {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}}],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "Rain"}]},
]


def main() -> None:
    client = Anthropic(max_retries=0)
    answer: Any = client.messages.create(model=MODEL, messages=HELLO, system="Be short.", max_tokens=8)
    with client.messages.stream(model=MODEL, messages=HELLO, max_tokens=8) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    with client.messages.stream(model=MODEL, messages=EMOJI, max_tokens=4) as stream:
        emoji = stream.get_final_message()
    offered = client.messages.create(model=MODEL, messages=HELLO, tools=TOOLS, max_tokens=8)
    bearer = Anthropic(auth_token=client.api_key, api_key=None, max_retries=0)
    wrong = Anthropic(api_key=WRONG_KEY, max_retries=0)
    facts = {
        "models": [model.id for model in client.models.list()],
        "chat": answer.content[0].text,
        "stream": text,
        "stop_reason": final.stop_reason,
        "output_tokens": final.usage.output_tokens,
        "emoji": [emoji.role, emoji.usage.input_tokens > 0],
        "offered_tools": offered.stop_reason,
        "after_a_call": client.messages.create(model=MODEL, messages=CALLED, tools=TOOLS, max_tokens=8).stop_reason,
        "counted": client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens,
        "bearer": error_of(lambda: bearer.messages.create(model=MODEL, messages=HELLO, max_tokens=2)),
        "wrong_key": error_of(lambda: wrong.messages.create(model=MODEL, messages=HELLO, max_tokens=2)),
        "unknown_model": error_of(lambda: client.messages.create(model="nope", messages=HELLO, max_tokens=2)),
    }
    with client.messages.stream(model=MODEL, messages=[{"role": "user", "content": LONG}], max_tokens=4000) as stream:
        next(iter(stream.text_stream))
    report(**facts)


main()
