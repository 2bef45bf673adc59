"""Chat template given in `engine_args`: a file, the template itself, or a name that the engine knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_api_server.engines.base import ModelProblem

_FILE_ENDINGS = (".jinja", ".jinja2", ".j2", ".txt")
#: Prefix of the templates that vLLM ships.
_BUILT_IN = "template_"


def given_template(folders: Iterable[Path], engine_args: Mapping[str, Any]) -> Path | str | None:
    """Return a file found in `folders`, a template or a name; None: the model's own. Raises `ModelProblem`."""
    value = engine_args.get("chat_template")
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise ModelProblem("engine_args: chat_template must be a file or a template")
    if is_literal(value):
        return value
    for folder in folders:
        file = folder / Path(value).expanduser()
        if file.is_file():
            return file
    if not value.startswith(_BUILT_IN) and ("/" in value or value.endswith(_FILE_ENDINGS)):
        raise ModelProblem(
            f"engine_args: chat_template: there is no file '{Path(value).name}' in models.models_dir or beside the "
            "configuration"
        )
    return value


def template_text(template: Path | str | None) -> str | None:
    """Return the text of a template; None: only the engine has it. Raises `ModelProblem`."""
    if isinstance(template, Path):
        try:
            return template.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ModelProblem(f"engine_args: chat_template cannot be read: {reason}") from None
    return template if template is not None and is_literal(template) else None


def is_literal(value: str) -> bool:
    """Return whether `value` is a template and no path or name, by vLLM's rule."""
    return any(character in value for character in "{}\n")
