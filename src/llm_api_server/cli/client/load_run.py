"""A load run for `bench`: a warm-up, then requests from threads that each keep one under way. Blocking."""

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
    """What is asked. `prompt_tokens` and `max_tokens` are those of one request."""

    model: str
    requests: int
    concurrency: int
    prompt_tokens: int
    max_tokens: int


class Sample(msgspec.Struct):
    """One answered request. Seconds; `first_text` is None where it had no text, `gaps` are between chunks with text."""

    seconds: float
    first_text: float | None
    gaps: list[float]
    usage: TokenUsage


class Run(msgspec.Struct):
    """`errors` counts the requests that failed, by message. `seconds` is how long all took, without the warm-up."""

    load: LoadRun
    warm_up_seconds: float
    seconds: float
    samples: list[Sample]
    errors: dict[str, int]


def run(client: ApiClient, load: LoadRun, progress: Callable[[int], None]) -> Run:
    """Raises `ServerError` when the warm-up fails. `progress` is told how many requests are over."""
    dice = random.Random()  # noqa: S311 - prompts that differ need no cryptography
    warm_up = _measure(client, load, _prompt(dice, load.prompt_tokens))
    # The template and the words themselves take more tokens than words, or fewer: as many as the warm-up showed.
    words = max(1, round(load.prompt_tokens * load.prompt_tokens / max(1, warm_up.usage.prompt_tokens)))
    waiting: SimpleQueue[str] = SimpleQueue()
    for _ in range(load.requests):
        waiting.put(_prompt(dice, words))
    outcomes: SimpleQueue[Sample | str] = SimpleQueue()
    began = time.perf_counter()
    for _ in range(load.concurrency):
        threading.Thread(target=_work, args=(client, load, waiting, outcomes), daemon=True).start()
    samples, errors = [], Counter[str]()
    for done in range(1, load.requests + 1):
        outcome = outcomes.get()
        if isinstance(outcome, Sample):
            samples.append(outcome)
        else:
            errors[outcome] += 1
        progress(done)
    return Run(load, warm_up.seconds, time.perf_counter() - began, samples, dict(errors))


def _work(client: ApiClient, load: LoadRun, waiting: SimpleQueue[str], outcomes: SimpleQueue[Sample | str]) -> None:
    while True:
        try:
            prompt = waiting.get_nowait()
        except Empty:
            return
        try:
            outcomes.put(_measure(client, load, prompt))
        except ServerError as error:
            outcomes.put(str(error))
        except Exception as error:  # noqa: BLE001 - whoever waits for the outcome must get one
            outcomes.put(repr(error))


def _measure(client: ApiClient, load: LoadRun, prompt: str) -> Sample:
    body = {
        "model": load.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": load.max_tokens,
    }
    usage, times = None, []
    began = time.perf_counter()
    for part in client.stream(body):
        if part.text or part.reasoning:
            times.append(time.perf_counter())
        usage = part.usage or usage
    seconds = time.perf_counter() - began
    gaps = [after - before for before, after in pairwise(times)]
    # Without a count of the server's own, a chunk counts as a token.
    return Sample(seconds, times[0] - began if times else None, gaps, usage or TokenUsage(0, len(times)))


def _prompt(dice: random.Random, words: int) -> str:
    return f"{' '.join(dice.choices(_WORDS, k=words))}. Write a very long story with these words."
