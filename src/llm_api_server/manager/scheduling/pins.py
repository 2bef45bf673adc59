"""Models that are pinned: what they keep from others, and what those are told. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from llm_api_server.engines.explain import OUT_OF_MEMORY
from llm_api_server.manager.scheduling.memory import MemoryBudget, describe
from llm_api_server.manager.scheduling.placement import PlacementPass
from llm_api_server.manager.scheduling.state import Allocation, Model


def why_blocked(
    model: Model, empty: MemoryBudget, bookings: Iterable[Allocation], models: dict[str, Model]
) -> str | None:
    """Why `model` cannot be loaded even if all that is not pinned went, else None. `empty` has nothing of ours."""
    staying = [one for one in bookings if models[one.model].is_pinned or one is model.booking]
    if PlacementPass(empty, staying, models).seats_later(model) is not None:
        return None
    in_the_way = [one for one in staying if one is not model.booking and models[one.model].takes_place]
    names = ", ".join(sorted(one.model for one in in_the_way))
    if not names:
        return None
    advice = "unpin or unload one of them" if len(in_the_way) > 1 else "unpin or unload it"
    if sum(not one.is_asleep for one in in_the_way) >= empty.places:
        return f"all places (models.max_loaded: {empty.places}) are held by pinned models ({names}): {advice}"
    needs = f"it needs {describe(model.need)}, and " if model.need is not None else ""
    return f"{OUT_OF_MEMORY}: {needs}pinned models ({names}) hold what would have to be free: {advice}"


def forget_refusals(models: Iterable[Model]) -> None:
    """What was refused for the sake of a pinned model may be loaded now."""
    for model in models:
        if model.failure is not None and model.failure.is_by_pins:
            model.failure = None
