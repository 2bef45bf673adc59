"""What changes between two configurations, shown without secrets, and what each change needs to take effect. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from llm_api_server.config.models import Config, Section
from llm_api_server.config.redacted_view import HIDDEN

#: `now`: for requests that come from now on. `model`: the models it concerns are loaded anew, once their requests are
#: done. `restart`: not before the server is started again.
Effect = Literal["now", "model", "restart"]

#: What is fixed when processes start; a name ends with a dot where it is a whole section.
NEEDS_RESTART = (
    "server.host", "server.port", "server.workers", "server.run_dir", "server.cors_origins", "server.trusted_proxies",
    "server.drain_timeout", "auth.enabled", "logging.path", "logging.rotation", "logging.retention", "storage.url",
    "devices.",
)  # fmt: skip
#: Of `inference`, what engines are started with.
ENGINES_INFERENCE = frozenset({"max_total_tokens", "max_batch_size", "max_image_pixels", "optimize_first_token"})
#: Of a model's entry, what its engine does not know of.
NOT_THE_ENGINES = frozenset({"aliases", "unload_timeout"})
_NEEDS_LOAD = ("engines.", "models.models_dir", *(f"inference.{name}" for name in ENGINES_INFERENCE))
_MODELS = "models.available."
_NOTES: dict[Effect, str] = {"now": "", "model": " (loads anew what it concerns)", "restart": " (after a restart)"}


class Change(msgspec.Struct, frozen=True):
    """One option, by its path such as `models.available.NAME.max_tokens`; None: it is not there."""

    path: str
    before: str | None
    after: str | None
    effect: Effect

    def __str__(self) -> str:
        note = _NOTES[self.effect]
        if self.before is None:
            return f"{self.path}: added: {self.after}{note}"
        if self.after is None:
            return f"{self.path}: removed: {self.before}{note}"
        return f"{self.path}: {self.before} -> {self.after}{note}"


def diff(before: Config, after: Config) -> list[Change]:
    """In the order of the declaration; what is gone comes where it was."""
    return [
        Change(path, _shown(old, is_secret), _shown(new, is_secret), _effect(path))
        for path, old, new, is_secret in _differences(before, after, "")
    ]


def without_restart(before: Config, after: Config) -> Config:
    """`after`, with what only a restart can change as it is in `before`."""
    for path in NEEDS_RESTART:
        section, _, name = path.partition(".")
        old, new = getattr(before, section), getattr(after, section)
        kept = old if not name else new.model_copy(update={name: getattr(old, name)})
        after = after.model_copy(update={section: kept})
    return after


def _differences(before: Section, after: Section, prefix: str) -> Iterator[tuple[str, Any, Any, bool]]:
    for name, field in type(after).model_fields.items():
        if field.exclude:
            continue
        path, is_secret = f"{prefix}{name}", field.repr is False
        yield from _between(path, getattr(before, name), getattr(after, name), is_secret=is_secret)


def _between(path: str, old: Any, new: Any, *, is_secret: bool) -> Iterator[tuple[str, Any, Any, bool]]:
    if isinstance(old, Section) and isinstance(new, Section):
        yield from _differences(old, new, f"{path}.")
    elif isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _between(f"{path}.{key}", old.get(key), new.get(key), is_secret=is_secret)
    elif _named(old) is not None and _named(new) is not None:
        yield from _between(path, _named(old), _named(new), is_secret=is_secret)
    elif old != new:
        yield path, old, new, is_secret


def _named(value: Any) -> dict[str, Any] | None:
    """A list of entries with names, such as keys, by these; None for any other list."""
    if not isinstance(value, list) or not all(isinstance(one, Section) for one in value):
        return None
    names = [str(getattr(one, "name", None) or getattr(one, "issuer", "")) for one in value]
    return dict(zip(names, value, strict=True)) if len({*names}) == len(names) else None


def _shown(value: Any, is_secret: bool) -> str | None:  # noqa: FBT001 - a column of a row
    if value is None:
        return None
    if is_secret:
        return HIDDEN
    if isinstance(value, Section):
        fields = type(value).model_fields.items()
        told = {n: getattr(value, n) for n, field in fields if field.repr and getattr(value, n) != field.default}
        return ", ".join(f"{name}: {_shown(one, is_secret=False)}" for name, one in told.items())
    return str(value)


def _effect(path: str) -> Effect:
    if any(path == name or (name.endswith(".") and path.startswith(name)) for name in NEEDS_RESTART):
        return "restart"
    if any(path == name or (name.endswith(".") and path.startswith(name)) for name in _NEEDS_LOAD):
        return "model"
    if path.startswith(_MODELS):
        return "now" if path.rpartition(".")[2] in NOT_THE_ENGINES else "model"
    return "now"
