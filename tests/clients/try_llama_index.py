"""LlamaIndex: OpenAILike for chat, tools and plain completions, OpenAILikeEmbedding."""

from __future__ import annotations

from typing import Any

from findings import KEY, LONG, MODEL, URL, WRONG_KEY, error_of, report
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike


def model(name: str = MODEL, key: str = KEY, **options: Any) -> Any:
    options = {"is_chat_model": True, "is_function_calling_model": True, "max_tokens": 8, **options}
    return OpenAILike(model=name, api_base=f"{URL}/v1", api_key=key, context_window=8192, max_retries=0, **options)


def get_weather(city: str) -> str:
    """The weather in a city now."""
    return f"Rain in {city}"


def main() -> None:
    hello = [ChatMessage(role="user", content="Say hello")]
    tool = FunctionTool.from_defaults(fn=get_weather)
    llm = model(max_tokens=40)
    call = llm.chat_with_tools([tool], user_msg="Weather in Paris?", tool_required=True)
    embedding = OpenAILikeEmbedding(model_name=MODEL, api_base=f"{URL}/v1", api_key=KEY, max_retries=0)
    facts = {
        "chat": model().chat(hello).message.content,
        "stream": "".join(chunk.delta or "" for chunk in model().stream_chat(hello)),
        "completion": model(is_chat_model=False).complete("Hello, I am").text,
        "tool": [found.tool_name for found in llm.get_tool_calls_from_response(call)],
        "dimensions": [len(row) for row in embedding.get_text_embedding_batch(["one", "two"])],
        "wrong_key": error_of(lambda: model(key=WRONG_KEY).chat(hello)),
        "unknown_model": error_of(lambda: model(name="nope").chat(hello)),
    }
    endless = {"extra_body": {"ignore_eos": True}}  # the connection closes only when the process ends
    chunks = model(max_tokens=4000, additional_kwargs=endless).stream_chat([ChatMessage(role="user", content=LONG)])
    next(chunks)
    chunks.close()
    report(**facts)


main()
