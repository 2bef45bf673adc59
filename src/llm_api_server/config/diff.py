"""Differences between two configurations, without secrets, and what each needs to take effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_api_server.config.change import Change, Effect
from llm_api_server.config.models import Config, Section
from llm_api_server.config.redacted_view import HIDDEN

#: Options that are fixed when processes start; a name that ends with a dot is a whole section.
NEEDS_RESTART = (
    "server.host", "server.port", "server.workers", "server.run_dir", "server.cors_origins", "server.trusted_proxies",
    "server.drain_timeout", "auth.enabled", "logging.path", "logging.rotation", "logging.retention", "storage.url",
    "devices.",
)  # fmt: skip
#: Options of `inference` that engines are started with.
ENGINES_INFERENCE = frozenset({"max_total_tokens", "max_batch_size", "max_image_pixels", "optimize_first_token"})
#: Options of a model's entry that its engine never sees.
NOT_THE_ENGINES = frozenset({"aliases", "unload_timeout"})
_NEEDS_LOAD = ("engines.", "models.models_dir", *(f"inference.{name}" for name in ENGINES_INFERENCE))
_MODELS = "models.available."


def diff(before: Config, after: Config) -> list[Change]:
    """Return the changes in the order of the declaration."""
    return [
        Change(path, _shown(old, is_secret=is_secret), _shown(new, is_secret=is_secret), _effect(path))
        for path, old, new, is_secret in _differences(before, after, "")
    ]


def without_restart(before: Config, after: Config) -> Config:
    """Return `after` with the options that need a restart as they are in `before`."""
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
        yield from _value_differences(path, getattr(before, name), getattr(after, name), is_secret=is_secret)


def _value_differences(path: str, old: Any, new: Any, *, is_secret: bool) -> Iterator[tuple[str, Any, Any, bool]]:
    if isinstance(old, Section) and isinstance(new, Section):
        yield from _differences(old, new, f"{path}.")
    elif isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _value_differences(f"{path}.{key}", old.get(key), new.get(key), is_secret=is_secret)
    elif _named(old) is not None and _named(new) is not None:
        yield from _value_differences(path, _named(old), _named(new), is_secret=is_secret)
    elif old != new:
        yield path, old, new, is_secret


def _named(value: Any) -> dict[str, Any] | None:
    """Return a list of named entries, such as keys, by name; None for any other value."""
    if not isinstance(value, list) or not all(isinstance(one, Section) for one in value):
        return None
    names = [str(getattr(one, "name", None) or getattr(one, "issuer", "")) for one in value]
    return dict(zip(names, value, strict=True)) if len({*names}) == len(names) else None


def _shown(value: Any, *, is_secret: bool) -> str | None:
    if value is None:
        return None
    if is_secret:
        return HIDDEN
    if isinstance(value, Section):
        fields = type(value).model_fields.items()
        public = {name: getattr(value, name) for name, field in fields if field.repr}
        changed = {name: one for name, one in public.items() if one != type(value).model_fields[name].default}
        return ", ".join(f"{name}: {_shown(one, is_secret=False)}" for name, one in changed.items())
    return str(value)


def _effect(path: str) -> Effect:
    if _is_among(path, NEEDS_RESTART):
        return "restart"
    if _is_among(path, _NEEDS_LOAD):
        return "model"
    if path.startswith(_MODELS):
        return "now" if path.rpartition(".")[2] in NOT_THE_ENGINES else "model"
    return "now"


def _is_among(path: str, options: tuple[str, ...]) -> bool:
    return any(path == name or (name.endswith(".") and path.startswith(name)) for name in options)
