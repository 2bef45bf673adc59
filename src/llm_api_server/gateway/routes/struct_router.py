"""msgspec structs as responses of FastAPI routes, so that each shape is declared once.

FastAPI describes and serializes pydantic models only; `model_of` makes one from the fields of a struct.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
from fastapi import APIRouter
from fastapi.datastructures import DefaultPlaceholder
from pydantic import BaseModel, Field, create_model


class StructRouter(APIRouter):
    """Router whose endpoints may return msgspec structs; the return annotation names the struct."""

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        returned = get_type_hints(endpoint).get("return")
        is_default = isinstance(options.get("response_model"), DefaultPlaceholder)
        if is_default and isinstance(returned, type) and issubclass(returned, msgspec.Struct):
            options["response_model"] = model_of(returned)
        super().add_api_route(path, endpoint, **options)


@cache
def model_of(struct: type[msgspec.Struct]) -> type[BaseModel]:
    """Return a model with the fields of `struct`: all required, described by their `Meta`, without internal ones.

    A field is internal if its `Meta` has `extra={"internal": True}`: processes exchange it, clients never see it.
    """
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(struct):
        meta = next((one for one in get_args(field.type)[1:] if isinstance(one, msgspec.Meta)), msgspec.Meta())
        if not (meta.extra or {}).get("internal"):
            fields[field.name] = (_as_model(field.type), Field(description=meta.description))
    own_doc = vars(struct).get("__doc__")  # not that of msgspec.Struct
    return create_model(struct.__name__, __doc__=own_doc and inspect.cleandoc(own_doc), **fields)


def _as_model(annotation: Any) -> Any:
    if get_origin(annotation) is list:
        return list[_as_model(get_args(annotation)[0])]  # type: ignore[misc] # a type made at run time
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return model_of(annotation)
    return annotation
