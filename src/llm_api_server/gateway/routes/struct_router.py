"""msgspec structs as responses of FastAPI routes, so that each shape is declared once.

FastAPI describes and serializes pydantic models only; `model_of` makes one from the fields of a struct.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec
from fastapi import APIRouter
from fastapi.datastructures import DefaultPlaceholder
from pydantic import BaseModel, Field, create_model

from llm_api_server.types import INTERNAL


class StructRouter(APIRouter):
    """Router whose endpoints may return msgspec structs; the return annotation names the struct."""

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        returned = get_type_hints(endpoint).get("return")
        is_default = isinstance(options.get("response_model"), DefaultPlaceholder)
        if is_default and isinstance(returned, type) and issubclass(returned, msgspec.Struct):
            options["response_model"] = model_of(returned)
        super().add_api_route(path, endpoint, **options)


@functools.cache
def model_of(struct: type[msgspec.Struct]) -> type[BaseModel]:
    """Return a model with the fields of `struct`, described by their `Meta`, without those marked `INTERNAL`.

    Fields have their encoded names. A field is required unless it has a default and the struct has `omit_defaults`.
    """
    omits_defaults = struct.__struct_config__.omit_defaults
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(struct):
        marks = get_args(field.type)[1:] if get_origin(field.type) is Annotated else ()
        if INTERNAL in marks:
            continue
        metas = [mark for mark in marks if isinstance(mark, msgspec.Meta)]
        description = metas[0].description if metas else None
        default = ... if field.required or not omits_defaults else field.default
        info = Field(default, description=description, validation_alias=field.name)
        fields[field.encode_name] = (_as_model(field.type), info)
    own_doc = vars(struct).get("__doc__")  # not that of msgspec.Struct
    return create_model(struct.__name__, __doc__=own_doc and inspect.cleandoc(own_doc), **fields)


def _as_model(annotation: Any) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _as_model(args[0])
    if origin is list:
        return list[_as_model(args[0])]  # type: ignore[misc] # a type made at run time
    if origin in {Union, UnionType}:
        return functools.reduce(operator.or_, map(_as_model, args))
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return model_of(annotation)
    return annotation
