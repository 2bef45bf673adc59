"""Which models there are, by name and alias, and which of them a key may use. Pure; built from the configuration."""

from __future__ import annotations

from llm_api_server.auth.keys import Key
from llm_api_server.config import Config
from llm_api_server.errors import InvalidRequest, ModelNotFound, PermissionDenied


class Catalog:
    """The configured models. `names` are in the order of the configuration."""

    def __init__(self, config: Config) -> None:
        models = config.models
        self._default = models.default
        self._names = {alias: name for name, model in models.available.items() for alias in model.aliases}
        self._names.update({name: name for name in models.available})
        # Templates know the role `developer` only where the family brought it in.
        self._knows_developer = frozenset(name for name, model in models.available.items() if model.type == "gpt-oss")
        self.names = list(models.available)

    def find(self, wanted: str | None, key: Key) -> str:
        """The configured name for what a request asks for. Raises when there is none or the key may not use it."""
        if wanted is None and self._default is None:
            raise InvalidRequest("Missing required parameter: 'model'.", param="model")
        asked = wanted if wanted is not None else str(self._default)
        name = self._names.get(asked)
        if name is None:
            raise ModelNotFound(
                f"The model '{asked[:256]}' does not exist or you do not have access to it.", param="model"
            )
        if not (key.may_use(name) or key.may_use(asked)):
            raise PermissionDenied(f"Your key may not use the model '{asked}'.", param="model")
        return name

    def knows_developer_role(self, name: str) -> bool:
        return name in self._knows_developer
