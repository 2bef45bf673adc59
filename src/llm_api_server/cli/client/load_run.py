"""Load run of `bench`: a warm-up request, then requests from threads that each have one in flight. Blocking."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from queue import Empty, SimpleQueue

import msgspec

from llm_api_server.cli.client.api_client import ApiClient, TokenUsage
from llm_api_server.errors import ServerError

#: Common words are one token in most vocabularies.
_WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "program", "question", "work", "night", "point", "home", "water", "room", "mother", "area", "money", "story",
)  # fmt: skip


class LoadRun(msgspec.Struct, frozen=True):
    """Parameters of a run. `prompt_tokens` and `max_tokens` are per request."""

    model: str
    requests: int
    concurrency: int
    prompt_tokens: int
    max_tokens: int


class Sample(msgspec.Struct):
    """Request that succeeded, in seconds. `first_text` is None without text; `gaps` are between text chunks."""

    seconds: float
    first_text: float | None
    gaps: list[float]
    usage: TokenUsage


class LoadResult(msgspec.Struct):
    """Outcome of a run. `errors` counts failed requests by message; `seconds` excludes the warm-up."""

    load: LoadRun
    warm_up_seconds: float
    seconds: float
    samples: list[Sample]
    errors: dict[str, int]


def run(client: ApiClient, load: LoadRun, on_progress: Callable[[int], None]) -> LoadResult:
    """Send all requests; `on_progress` receives the number of finished ones.

    Raises `ServerError` if the warm-up fails.
    """
    dice = random.Random()  # noqa: S311 - prompts that differ need no cryptography
    warm_up = _measure(client, load, _prompt(dice, load.prompt_tokens))
    # The chat template adds tokens and words may be several tokens: scale by what the warm-up request took.
    words = max(1, round(load.prompt_tokens * load.prompt_tokens / max(1, warm_up.usage.prompt_tokens)))
    prompts: SimpleQueue[str] = SimpleQueue()
    for _ in range(load.requests):
        prompts.put(_prompt(dice, words))
    outcomes: SimpleQueue[Sample | str] = SimpleQueue()
    started = time.perf_counter()
    for _ in range(load.concurrency):
        threading.Thread(target=_send_all, args=(client, load, prompts, outcomes), daemon=True).start()
    samples, errors = [], Counter[str]()
    for done in range(1, load.requests + 1):
        outcome = outcomes.get()
        if isinstance(outcome, Sample):
            samples.append(outcome)
        else:
            errors[outcome] += 1
        on_progress(done)
    return LoadResult(load, warm_up.seconds, time.perf_counter() - started, samples, dict(errors))


def _send_all(client: ApiClient, load: LoadRun, prompts: SimpleQueue[str], outcomes: SimpleQueue[Sample | str]) -> None:
    while True:
        try:
            prompt = prompts.get_nowait()
        except Empty:
            return
        try:
            outcomes.put(_measure(client, load, prompt))
        except ServerError as error:
            outcomes.put(str(error))
        except Exception as error:  # noqa: BLE001 - `run` waits for one outcome per request
            outcomes.put(repr(error))


def _measure(client: ApiClient, load: LoadRun, prompt: str) -> Sample:
    body = {
        "model": load.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": load.max_tokens,
    }
    usage, times = None, []
    started = time.perf_counter()
    for delta in client.stream(body):
        if delta.text or delta.reasoning:
            times.append(time.perf_counter())
        usage = delta.usage or usage
    seconds = time.perf_counter() - started
    gaps = [after - before for before, after in pairwise(times)]
    # If the server counts no tokens, a chunk counts as one.
    return Sample(seconds, times[0] - started if times else None, gaps, usage or TokenUsage(0, len(times)))


def _prompt(dice: random.Random, words: int) -> str:
    return f"{' '.join(dice.choices(_WORDS, k=words))}. Write a very long story with these words."
