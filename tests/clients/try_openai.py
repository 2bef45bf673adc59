"""The openai package that LangChain and LlamaIndex take, set up by environment variables alone."""

from __future__ import annotations

from typing import Any

from findings import LONG, MODEL, WRONG_KEY, error_of, report
from openai import OpenAI

HELLO: Any = [{"role": "user", "content": "Say hello"}]
CITY: Any = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]


def main() -> None:
    client = OpenAI(max_retries=0)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
    chunks: Any = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    *parts, last = chunks
    call: Any = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=TOOLS, tool_choice="required", max_tokens=40
    )
    vectors = client.embeddings.create(model=MODEL, input=["one", "two"])
    response = client.responses.create(model=MODEL, input="Say hello", max_output_tokens=8)
    wrong = OpenAI(api_key=WRONG_KEY, max_retries=0)
    facts = {
        "models": [model.id for model in client.models.list()],
        "chat": answer.choices[0].message.content,
        "stream": "".join(part.choices[0].delta.content or "" for part in parts),
        "stream_tokens": last.usage.completion_tokens,
        "tool": call.choices[0].message.tool_calls[0].function.name,
        "dimensions": [len(row.embedding) for row in vectors.data],
        "response": response.output_text,
        "wrong_key": error_of(lambda: wrong.chat.completions.create(model=MODEL, messages=HELLO)),
        "unknown_model": error_of(lambda: client.chat.completions.create(model="nope", messages=HELLO)),
    }
    chunks = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": LONG}], max_tokens=4000, stream=True
    )
    next(chunks)
    chunks.close()
    report(**facts)


main()
