"""Which models and adapters there are, by name and alias, and which of them a key may use. Pure; built from the
configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_api_server.auth.access import Key
from llm_api_server.config.models import Config
from llm_api_server.errors import InvalidRequest, ModelNotFound, PermissionDenied


@dataclass(frozen=True)
class Found:
    """What a request asks for: a configured model, and which of its adapters, if any."""

    model: str
    adapter: str | None = None

    @property
    def name(self) -> str:
        return self.adapter or self.model


class ModelCatalog:
    """The configured models and their adapters. `all` are in the order of the configuration."""

    def __init__(self, config: Config, created: int = 0) -> None:
        #: Counts the configurations.
        self.revision = 0
        self.configure(config, created)

    def configure(self, config: Config, created: int) -> None:
        """`created`, in Unix seconds, is that of all models."""
        self.revision += 1
        self.created = created
        models = config.models
        self._default = models.default
        self.all: list[Found] = []
        self._found: dict[str, Found] = {}
        for name, model in models.available.items():
            own = [Found(name), *(Found(name, adapter) for adapter in model.adapters)]
            self.all += own
            self._found.update({found.name: found for found in own})
            self._found.update(dict.fromkeys(model.aliases, own[0]))
        # Templates know the role `developer` only where the family brought it in.
        self._knows_developer = frozenset(name for name, model in models.available.items() if model.type == "gpt-oss")

    def find(self, wanted: str | None, key: Key) -> Found:
        """Raises when there is no such name or the key may not use it: an adapter is allowed by its own name only."""
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
