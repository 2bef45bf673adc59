"""What can be wrong between options, and what is only unwise: `load_config` asks for the first, commands for the rest.

Each check gets the usable part of a configuration and passes over what rests on an unusable value.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llm_api_server import log_file
from llm_api_server.config.document import ConfigDocument, KeyPath, suggest

if TYPE_CHECKING:  # the declaration uses these checks
    from llm_api_server.config.models import Config

#: Where the problem is, and what is wrong.
Problem = tuple[KeyPath, str]
Check = Callable[["Config"], Iterator[Problem]]
#: Checks, and the options that must be usable for each one's answer to mean something.
Checks = Mapping[Check, Iterable[KeyPath]]

#: sockaddr_un(7), less the final zero byte.
_MAX_SOCKET_PATH_BYTES = 107
#: What the manager appends to the run directory at most: `/engines/ID-embed.sock`.
_SOCKET_NAME_BYTES = 32
_MIN_SECRET_BYTES = 32
_EXAMPLE_SECRETS = frozenset({"your-secret-key", "your_secret_key", "change-me", "changeme", "secret", "secret-key"})
_EXAMPLE_KEYS = frozenset({"sk-myapikey123456789", "sk-restricted987654321"})


def check(config: Config, document: ConfigDocument, more: Checks) -> None:
    """Add the problems of `config` to `document`, from which it was built. `more` are checks like those here."""
    for rule, needs in {**_CHECKS, **more}.items():
        if not any(document.depends_on_dropped(path) for path in needs):
            for path, sentence in rule(config):
                if path not in document.dropped:
                    document.note(path, sentence)


def config_warnings(config: Config) -> list[str]:
    """What the server does not refuse and the operator should know; complete sentences."""
    return [*_auth_warnings(config), *_server_warnings(config), *_key_warnings(config), *_model_warnings(config)]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_weak_secret(secret: str | None) -> bool:
    """Whether tokens signed with `secret` could be forged by guessing it."""
    if secret is None or secret.lower() in _EXAMPLE_SECRETS:
        return True
    return len(secret.encode()) < _MIN_SECRET_BYTES or len(set(secret)) < 8  # noqa: PLR2004 - "aaaa…", "12121212…"


# ── problems ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _exposure(config: Config) -> Iterator[Problem]:
    server = config.server
    if not config.auth.enabled and not is_loopback(server.host) and not server.allow_unauthenticated:
        sentence = (
            f"without keys everybody who reaches {server.host} could use this server. Set auth.enabled: true, or "
            "server.host: 127.0.0.1, or, if that is what you want, server.allow_unauthenticated: true"
        )
        yield ("auth", "enabled"), sentence


def _issuers(config: Config) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for index, entry in enumerate(config.auth.issuers):
        path: KeyPath = ("auth", "issuers", index)
        if entry.issuer in seen:
            yield (*path, "issuer"), f"is the issuer of auth.issuers[{seen[entry.issuer]}] already"
        seen.setdefault(entry.issuer, index)
        url = urlsplit(entry.jwks)
        if url.scheme == "http" and not is_loopback(url.hostname or ""):
            yield (*path, "jwks"), "keys that come over http could be anybody's. Use https"
        elif "://" in entry.jwks and url.scheme not in {"http", "https"}:
            yield (*path, "jwks"), "give an https URL or a file"


def _keys_differ(config: Config) -> Iterator[Problem]:
    names: dict[str, int] = {}
    secrets: dict[str, int] = {}
    for index, entry in enumerate(config.auth.api_keys):
        path: KeyPath = ("auth", "api_keys", index)
        if entry.name in names:
            first = f"auth.api_keys[{names[entry.name]}]"
            yield (*path, "name"), f"'{entry.name}' is the name of {first} already; names tell keys apart in logs"
        if entry.key in secrets:
            yield (*path, "key"), f"is the key of auth.api_keys[{secrets[entry.key]}] already"
        names.setdefault(entry.name, index)
        secrets.setdefault(entry.key, index)


def _tokens(config: Config) -> Iterator[Problem]:
    secret = config.auth.secret_key
    if config.auth.tokens and is_weak_secret(secret):
        what = "there is none" if not secret else "this one is an example, too short or too regular"
        sentence = (
            f"auth.tokens is true and needs a secret of at least {_MIN_SECRET_BYTES} random bytes; {what}. "
            "`openssl rand -base64 48` prints one"
        )
        yield ("auth", "secret_key"), sentence


def _models_exist(config: Config) -> Iterator[Problem]:
    models = config.models
    names = list(models.available)
    every = _model_names(config)
    if models.default is not None and models.default not in every:
        yield ("models", "default"), _unknown_model(models.default, every)
    for index, name in enumerate(models.preload):
        if name not in models.available:
            yield ("models", "preload", index), _unknown_model(name, names)


def _model_names(config: Config) -> list[str]:
    """All that clients may use."""
    models = config.models.available
    others = [name for model in models.values() for name in (*model.aliases, *model.adapters)]
    return [*models, *others]


def _unknown_model(name: str, known: list[str]) -> str:
    hint = suggest(name, known) if known else "; models.available is empty"
    return f"there is no model '{name}'{hint}"


def _preload_fits(config: Config) -> Iterator[Problem]:
    count = len(set(config.models.preload))
    if count > config.models.max_loaded:
        sentence = (
            f"{count} models to preload, but models.max_loaded is {config.models.max_loaded}. "
            "Raise max_loaded or preload fewer"
        )
        yield ("models", "preload"), sentence


def _names_differ(config: Config) -> Iterator[Problem]:
    owners: dict[str, str] = {}
    for name, model in config.models.available.items():
        own: list[tuple[str | int, str, str]] = [
            *((index, alias, "an alias") for index, alias in enumerate(model.aliases)),
            *((adapter, adapter, "an adapter") for adapter in model.adapters),
        ]
        for key, other, kind in own:
            section = "adapters" if isinstance(key, str) else "aliases"
            path: KeyPath = ("models", "available", name, section, key)
            if other in config.models.available:
                yield path, f"'{other}' is the name of a model already"
            elif other in owners:
                yield path, f"'{other}' is {owners[other]} already"
            owners.setdefault(other, f"{kind} of '{name}'")


def _run_dir(config: Config) -> Iterator[Problem]:
    limit = _MAX_SOCKET_PATH_BYTES - _SOCKET_NAME_BYTES
    length = len(str(config.run_dir).encode())
    if length > limit:
        sentence = (
            f"{config.run_dir} has {length} bytes; the names of unix sockets allow {limit}. Choose a shorter path"
        )
        yield ("server", "run_dir"), sentence


def _log_format(config: Config) -> Iterator[Problem]:
    if reason := log_file.format_problem(config.logging.format):
        yield ("logging", "format"), f"loguru cannot use it: {reason}"


def _log_rotation(config: Config) -> Iterator[Problem]:
    if reason := log_file.rotation_problem(config.logging.rotation):
        yield ("logging", "rotation"), f"loguru cannot use it: {reason}. Use for example '1 day' or '100 MB'"


def _log_retention(config: Config) -> Iterator[Problem]:
    if reason := log_file.retention_problem(config.logging.retention):
        yield ("logging", "retention"), f"loguru cannot use it: {reason}. Use for example '7 days' or 10 (files)"


_CHECKS: Checks = {
    _exposure: [("auth", "enabled"), ("server", "host"), ("server", "allow_unauthenticated")],
    _run_dir: [("server", "run_dir")],
    _issuers: [("auth", "issuers")],
    _keys_differ: [("auth", "api_keys")],
    _tokens: [("auth", "tokens"), ("auth", "secret_key")],
    _log_format: [("logging", "format")],
    _log_rotation: [("logging", "rotation")],
    _log_retention: [("logging", "retention")],
    _models_exist: [("models", "available"), ("models", "default"), ("models", "preload")],
    _preload_fits: [("models", "preload"), ("models", "max_loaded")],
    _names_differ: [("models", "available")],
}


# ── warnings ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _auth_warnings(config: Config) -> Iterator[str]:
    auth, server = config.auth, config.server
    if auth.enabled and not auth.api_keys and not auth.issuers:
        yield (
            "auth.api_keys is empty: only keys of the store are let in. `llm-api-server keys create --name NAME` makes "
            "one."
        )
    if not auth.enabled and not is_loopback(server.host):
        yield f"auth.enabled is false: everybody who reaches {server.host}:{server.port} may use this server."
    if auth.enabled and auth.tokens is None and auth.secret_key and is_weak_secret(auth.secret_key):
        yield (
            "auth.secret_key is an example, too short or too regular: /auth/token is off. Set a secret of at least "
            f"{_MIN_SECRET_BYTES} random bytes, or remove it."
        )


def _server_warnings(config: Config) -> Iterator[str]:
    for origin in config.server.cors_origins:
        if origin != "*" and origin.count("/") != 2:  # noqa: PLR2004 - scheme://host
            yield f"server.cors_origins: no browser sends '{origin}'; an origin looks like https://host or http://host:port."


def _key_warnings(config: Config) -> Iterator[str]:
    if not config.auth.enabled:
        return
    models = _model_names(config)
    for entry in config.auth.api_keys:
        if entry.key in _EXAMPLE_KEYS and not is_loopback(config.server.host):
            yield (
                f"The key '{entry.name}' is one that everybody can read in the documentation. Replace it: "
                "`llm-api-server keys new` prints a random one."
            )
        for pattern in entry.models:
            if models and not any(fnmatchcase(name, pattern) for name in models):
                yield f"The key '{entry.name}' may use '{pattern}', which matches no model."


def _model_warnings(config: Config) -> Iterator[str]:
    if not config.models.available:
        yield "models.available is empty: there is nothing to serve yet."
    for name, model in config.models.available.items():
        for path in (model.path, *([model.mmproj] if model.mmproj else [])):
            if not _may_exist(config, path, is_gguf=path.lower().endswith(".gguf") or model.engine == "llama_cpp"):
                yield f"The model '{name}' cannot be loaded: {config.resolve_model_path(path)} does not exist."
        for adapter, path in model.adapters.items():
            if not config.resolve_model_path(path).exists():
                yield (
                    f"The model '{name}' cannot be loaded: its adapter '{adapter}' is not there: "
                    f"{config.resolve_model_path(path)} does not exist."
                )


def _may_exist(config: Config, path: str, *, is_gguf: bool) -> bool:
    """A URL or what may be a hub id (`org/name`) cannot be looked up here."""
    is_url = path.lower().startswith(("http://", "https://"))
    may_be_hub_id = path.count("/") == 1 and not path.startswith((".", "~", "/")) and not is_gguf
    return is_url or may_be_hub_id or config.resolve_model_path(path).exists()
