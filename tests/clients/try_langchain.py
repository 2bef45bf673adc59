"""LangChain through both endpoints: ChatOpenAI, OpenAIEmbeddings and ChatAnthropic."""

from __future__ import annotations

from typing import Any, Literal

from findings import KEY, LONG, MODEL, URL, WRONG_KEY, error_of, report
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class GetWeather(BaseModel):
    """The weather now."""

    city: Literal["Paris", "Rome"]


def openai(model: str = MODEL, key: str = KEY, **options: Any) -> Any:
    return ChatOpenAI(model=model, base_url=f"{URL}/v1", api_key=key, max_retries=0, **options)


def anthropic(model: str = MODEL, key: str = KEY) -> Any:
    return ChatAnthropic(model=model, base_url=URL, api_key=key, max_retries=0, max_tokens=8)


def joined(chunks: Any) -> AIMessageChunk:
    whole: AIMessageChunk = next(chunks)
    for chunk in chunks:
        whole += chunk
    return whole


def main() -> None:
    # LangChain would count tokens with OpenAI's tokenizer and send those, which mean other words to another model.
    embeddings = OpenAIEmbeddings(
        model=MODEL, base_url=f"{URL}/v1", api_key=KEY, check_embedding_ctx_length=False, max_retries=0
    )
    streamed = joined(openai(max_tokens=8, stream_usage=True).stream("Say hello"))
    caller = openai(max_tokens=40).bind_tools([GetWeather], tool_choice="any")
    form = openai(max_tokens=40).with_structured_output(GetWeather).invoke("Weather in Paris?")
    messages = joined(anthropic().stream("Say hello"))
    facts = {
        "chat": openai(max_tokens=8).invoke("Say hello").content,
        "stream": streamed.content,
        "stream_tokens": (streamed.usage_metadata or {}).get("output_tokens"),
        "tool": [call["name"] for call in caller.invoke("Weather in Paris?").tool_calls],
        "streamed_tool": [call["name"] for call in joined(caller.stream("Weather in Paris?")).tool_calls],
        "form": form.city,
        "responses": openai(max_tokens=8, use_responses_api=True).invoke("Say hello").text,
        "dimensions": [len(row) for row in embeddings.embed_documents(["one", "two"])],
        "anthropic_chat": anthropic().invoke("Say hello").content,
        "anthropic_stream": messages.text,
        "anthropic_tools": anthropic().bind_tools([GetWeather]).invoke("Paris?").response_metadata["stop_reason"],
        "wrong_key": error_of(lambda: openai(key=WRONG_KEY).invoke("x")),
        "unknown_model": error_of(lambda: openai(model="nope").invoke("x")),
        "anthropic_wrong_key": error_of(lambda: anthropic(key=WRONG_KEY).invoke("x")),
        "anthropic_unknown_model": error_of(lambda: anthropic(model="nope").invoke("x")),
    }
    chunks = openai(max_tokens=4000).stream(LONG)
    next(chunks)
    chunks.close()
    report(**facts)


main()
