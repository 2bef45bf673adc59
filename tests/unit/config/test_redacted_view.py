"""View of a configuration without secrets."""

from __future__ import annotations

from llm_api_server.config.models import Config
from llm_api_server.config.redacted_view import HIDDEN, redacted


def test_secrets_are_hidden_and_all_other_values_are_shown() -> None:
    config = Config.model_validate({
        "auth": {"secret_key": "s" * 40, "api_keys": [{"key": "sk-0123456789abcdef", "name": "team"}]},
        "models": {"available": {"m": {"path": "m.gguf", "env": {"TOKEN": "secret"}, "max_tokens": 512}}},
        "storage": {"url": "postgresql://u:password@h/db"},
    })  # fmt: skip
    options = redacted(config)
    text = str(options)
    assert not any(word in text for word in ("s" * 40, "0123456789", "secret'", "password"))
    assert options["auth"]["secret_key"] == HIDDEN
    assert options["auth"]["api_keys"][0]["name"] == "team"
    assert options["auth"]["api_keys"][0]["key"] == HIDDEN
    assert options["models"]["available"]["m"]["env"] == {"TOKEN": HIDDEN}
    assert options["models"]["available"]["m"]["max_tokens"] == 512
    assert options["server"]["port"] == 8050
    assert "source" not in options
