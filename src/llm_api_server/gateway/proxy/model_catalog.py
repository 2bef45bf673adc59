"""Configured models and adapters, by name and alias, and the keys that may use them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from llm_api_server.auth.access import Key
from llm_api_server.config.models import ModelsConfig
from llm_api_server.errors import InvalidRequest, ModelNotFound, PermissionDenied


@dataclass(frozen=True)
class Found:
    """A configured model, or one of its adapters."""

    model: str
    adapter: str | None = None

    @property
    def name(self) -> str:
        return self.adapter or self.model


class ModelCatalog:
    """Configured models. `all` lists them, with their adapters, in the order of the configuration.

    `revision` counts the configurations; `created` is when the current one was written, in Unix seconds.
    """

    def __init__(self, models: ModelsConfig, created: int = 0) -> None:
        self.revision = 0
        self.configure(models, created)

    def configure(self, models: ModelsConfig, created: int) -> None:
        """Replace all models."""
        self.revision += 1
        self.created = created
        self._default = models.default
        self.all: list[Found] = []
        self._found: dict[str, Found] = {}
        for name, model in models.available.items():
            own = [Found(name), *(Found(name, adapter) for adapter in model.adapters)]
            self.all += own
            self._found.update({found.name: found for found in own})
            self._found.update(dict.fromkeys(model.aliases, own[0]))
        # Only the templates of families that introduced the role `developer` support it.
        self._knows_developer = frozenset(name for name, model in models.available.items() if model.type == "gpt-oss")

    def find(self, wanted: str | None, key: Key) -> Found:
        """Return the model of this name or alias, or the default. Raises `ApiError` if the key may not use it.

        An adapter is permitted by its own name only.
        """
        if wanted is None and self._default is None:
            raise InvalidRequest("Missing required parameter: 'model'.", param="model")
        asked = wanted if wanted is not None else str(self._default)
        found = self._found.get(asked)
        if found is None:
            raise ModelNotFound(
                f"The model '{asked[:256]}' does not exist or you do not have access to it.", param="model"
            )
        if not (key.may_use(found.name) or key.may_use(asked)):
            raise PermissionDenied(f"Your key may not use the model '{asked}'.", param="model")
        return found

    def knows_developer_role(self, name: str) -> bool:
        return name in self._knows_developer
