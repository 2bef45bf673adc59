"""Structured output on each engine with the official client: JSON, a schema, a forced tool call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

from llm_api_server.gateway.engine_calls.template_probe import TemplateProbe
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc.lease_messages import InstanceInfo
from tests.running import KEY, Server, running
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(600)

MODEL = "SmolLM2"
AWARE = "SmolLM2 with a template for tools"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content %}{{ message.content }}"
    "{% endif %}{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
UNITS = {"enum": ["celsius", "kelvin"]}
WEATHER: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "unit": {"$ref": "#/$defs/Unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"Unit": UNITS},
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather now", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "ring_bell"}},
]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["Paris", "Rome"]
    is_capital: bool


@pytest.fixture(scope="module", params=["llama_cpp", pytest.param("vllm", marks=pytest.mark.vllm)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp(request.param)
    config: dict[str, Any] = {"server": {"timeout": 400}, "inference": {"max_batch_size": 4}}
    if request.param == "vllm":
        config["engines"] = {"vllm": {"python": str(request.getfixturevalue("vllm_python"))}}
        model = {"path": str(request.getfixturevalue("smollm2_folder")), "type": "llama", "max_tokens": 1024}
    else:
        model = {"path": str(request.getfixturevalue("smollm2_gguf")), "max_tokens": 1024}
    template = folder / "tools.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    models = {MODEL: model, AWARE: {**model, "engine_args": {"chat_template": str(template)}}}
    config["models"] = {"default": MODEL, "preload": [MODEL, AWARE], "max_loaded": 2, "available": models}
    with running(folder, config) as server:
        # A stream that waits for a load has its status already: errors of the engine would be events.
        wait_until(lambda: all(model["state"] == "ready" for model in server.models().values()), timeout=300)
        yield server


@pytest.fixture(params=[MODEL, AWARE])
def model(request: pytest.FixtureRequest) -> str:
    """A model without and one with a chat template that supports tools."""
    return str(request.param)


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(api_key=KEY, base_url=f"{server.url}/v1", max_retries=0, timeout=500) as client:
        yield client


def check_weather(name: str | None, arguments: str | None) -> None:
    assert name == "get_weather"
    values = json.loads(arguments or "")
    assert set(values) == {"city", "unit"}
    assert values["city"] in {"Paris", "Rome"}
    assert values["unit"] in UNITS["enum"]


def check_call(name: str | None, arguments: str | None) -> None:
    if name == "ring_bell":
        assert json.loads(arguments or "") == {}
    else:
        check_weather(name, arguments)


class TestForcedTools:
    @pytest.mark.story
    def test_named(self, client: OpenAI, model: str) -> None:
        response = client.chat.completions.create(
            model=model, messages=MESSAGES, tools=TOOLS, tool_choice=NAMED, max_tokens=120
        )
        (choice,) = response.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert call.id.startswith("call_")
        check_weather(call.function.name, call.function.arguments)
        assert response.usage is not None
        assert response.usage.completion_tokens > 0

    def test_required(self, client: OpenAI, model: str) -> None:
        response = client.chat.completions.create(
            model=model, messages=MESSAGES, tools=TOOLS, tool_choice="required", max_tokens=120
        )
        (choice,) = response.choices
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        check_call(call.function.name, call.function.arguments)

    @pytest.mark.story
    def test_streamed(self, client: OpenAI, model: str) -> None:
        stream = client.chat.completions.create(
            model=model, messages=MESSAGES, tools=TOOLS, tool_choice=NAMED, max_tokens=120, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        assert chunks[-1].usage is not None
        assert chunks[-1].choices == []
        deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
        assert deltas[0].role == "assistant"
        assert not any(delta.content for delta in deltas)
        calls = [call for delta in deltas for call in delta.tool_calls or []]
        assert {call.index for call in calls} == {0}
        assert (calls[0].type, str(calls[0].id)[:5]) == ("function", "call_")
        assert [call.id for call in calls[1:]] == [None] * (len(calls) - 1)
        parts = [call.function for call in calls if call.function is not None]
        check_weather(parts[0].name, "".join(part.arguments or "" for part in parts))
        assert chunks[-2].choices[0].finish_reason == "tool_calls"

    def test_openai_client_accumulates_the_call(self, client: OpenAI) -> None:
        with client.chat.completions.stream(
            model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice=NAMED, max_tokens=120
        ) as stream:
            (choice,) = stream.get_final_completion().choices
        (call,) = choice.message.tool_calls or []
        check_weather(call.function.name, call.function.arguments)

    def test_parallel_tool_calls(self, client: OpenAI) -> None:
        response = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="required", parallel_tool_calls=True,
            max_tokens=60,
        )  # fmt: skip
        (choice,) = response.choices
        calls = choice.message.tool_calls or []
        assert calls
        assert len({call.id for call in calls}) == len(calls)
        assert choice.finish_reason in {"tool_calls", "length"}
        for call in calls[:-1]:
            assert call.type == "function"
            check_call(call.function.name, call.function.arguments)

    @pytest.mark.parametrize("stream", [False, True])
    def test_cut_by_max_tokens(self, client: OpenAI, stream: bool) -> None:
        asked: Any = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "tool_choice": NAMED, "max_tokens": 3}
        if stream:
            reasons = [c.choices[0].finish_reason for c in client.chat.completions.create(**asked, stream=True)]
            assert reasons[-1] == "length"
        else:
            assert client.chat.completions.create(**asked).choices[0].finish_reason == "length"

    def test_system_message_and_several_choices(self, client: OpenAI) -> None:
        messages: Any = [{"role": "system", "content": "Be brief."}, *MESSAGES]
        response = client.chat.completions.create(
            model=MODEL, messages=messages, tools=TOOLS, tool_choice=NAMED, max_tokens=120, n=2
        )
        for choice in response.choices:
            (call,) = choice.message.tool_calls or []
            assert call.type == "function"
            check_weather(call.function.name, call.function.arguments)

    @pytest.mark.story
    def test_bad_schema_of_a_tool_is_the_clients_fault(self, client: OpenAI) -> None:
        tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}]
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, tools=tools, tool_choice="required", stream=stream
                )
            assert "objekt" in caught.value.message

    def test_template_probe_finds_which_templates_support_tools(self, server: Server, client: OpenAI) -> None:
        expected = {name: name == AWARE for name in server.models()}
        for name in expected:
            client.completions.create(model=name, prompt="x", max_tokens=1)
        assert {name: asyncio.run(knows_tools(server, name)) for name in expected} == expected


async def knows_tools(server: Server, name: str) -> bool:
    status = server.models()[name]
    address = f"unix:{server.run_dir / 'engines'}/{status['instance']}.sock"
    upstream = HttpClient()
    try:
        return await TemplateProbe(upstream).knows_tools(InstanceInfo("i", name, status["engine"], address))
    finally:
        upstream.close()


class TestResponseFormat:
    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.story
    def test_json_schema(self, client: OpenAI, strict: bool) -> None:
        wanted: Any = {"name": "city", "strict": strict, "schema": City.model_json_schema()}
        response = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=120, seed=7,
            response_format={"type": "json_schema", "json_schema": wanted},
        )  # fmt: skip
        City.model_validate_json(response.choices[0].message.content or "")

    def test_parsed_by_the_client(self, client: OpenAI) -> None:
        response = client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, max_tokens=120, seed=7, response_format=City
        )
        assert isinstance(response.choices[0].message.parsed, City)

    def test_json_schema_streamed(self, client: OpenAI) -> None:
        with client.chat.completions.stream(
            model=MODEL, messages=MESSAGES, max_tokens=120, seed=7, response_format=City
        ) as stream:
            response = stream.get_final_completion()
        assert isinstance(response.choices[0].message.parsed, City)

    @pytest.mark.parametrize("stream", [False, True])
    def test_json_object_without_a_schema(self, client: OpenAI, stream: bool) -> None:
        asked: Any = {
            "model": MODEL, "messages": [{"role": "user", "content": 'Answer {"ok": true} as JSON.'}],
            "max_tokens": 60, "temperature": 0, "response_format": {"type": "json_object"},
        }  # fmt: skip
        if stream:
            chunks = list(client.chat.completions.create(**asked, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = client.chat.completions.create(**asked).choices[0]
            text, reason = choice.message.content or "", choice.finish_reason
        assert text.lstrip().startswith("{")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "objekt"},
            {"type": "object", "properties": []},
            {"$ref": "#/nowhere"},
            {"type": "string", "pattern": "^([a$"},
            {"type": "array", "minItems": 5, "maxItems": 2},
        ],
    )
    def test_bad_schema_is_the_clients_fault(self, client: OpenAI, schema: Any, stream: bool) -> None:
        wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=5, response_format=wanted, stream=stream
            )
        assert "parser" not in caught.value.message
        assert client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1).choices
