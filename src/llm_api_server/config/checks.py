"""Problems between options, which refuse a configuration, and warnings, which do not.

Each check reads the usable part of a configuration. A check whose options were dropped as unusable is skipped.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import urlsplit

from llm_api_server import log_file
from llm_api_server.config.document import ConfigDocument, KeyPath, suggest
from llm_api_server.config.models import (
    ApiKeyConfig,
    AuthConfig,
    Config,
    IssuerConfig,
    ModelConfig,
    ModelsConfig,
    ServerConfig,
)
from llm_api_server.config.secrets import EXAMPLE_KEYS, MIN_SECRET_BYTES, is_weak_secret

#: Path of the option, and a sentence.
Problem = tuple[KeyPath, str]
Check = Callable[[Config], Iterator[Problem]]
#: Checks, each with the options that must be usable for its result to mean something.
Checks = Mapping[Check, Iterable[KeyPath]]

#: Arguments of vLLM that serve adapters.
_LORA_ARGUMENTS = frozenset({"enable_lora", "lora_modules"})
#: sockaddr_un(7), less the final zero byte.
_MAX_SOCKET_PATH_BYTES = 107
#: Longest path that the manager appends to the run directory: `/engines/ID-embed.sock`.
_SOCKET_NAME_BYTES = 32


def add_problems(config: Config, document: ConfigDocument, extra_checks: Checks) -> None:
    """Run all checks on `config`, which was built from `document`, and add their problems to the document."""
    for check, options in {**_CHECKS, **extra_checks}.items():
        if not any(document.depends_on_dropped(path) for path in options):
            for path, sentence in check(config):
                if path not in document.dropped:
                    document.add_problem(path, sentence)


def config_warnings(config: Config) -> list[str]:
    """Return complete sentences about options that are valid but unwise."""
    return [
        *_auth_warnings(config.auth, config.server),
        *_origin_warnings(config.server),
        *_key_warnings(config.auth, config.server, config.models),
        *_model_warnings(config.models.available, config.models_dir),
    ]


def is_loopback(host: str) -> bool:
    """Return whether a server that listens on `host` is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _exposure(auth: AuthConfig, server: ServerConfig) -> Iterator[Problem]:
    if not auth.enabled and not is_loopback(server.host) and not server.allow_unauthenticated:
        sentence = (
            f"without keys, anyone who can reach {server.host} could use this server. Set auth.enabled: true, or "
            "server.host: 127.0.0.1, or, to allow it, server.allow_unauthenticated: true"
        )
        yield ("auth", "enabled"), sentence


def _issuers(issuers: list[IssuerConfig]) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for index, entry in enumerate(issuers):
        path: KeyPath = ("auth", "issuers", index)
        if entry.issuer in seen:
            yield (*path, "issuer"), f"is the issuer of auth.issuers[{seen[entry.issuer]}] already"
        seen.setdefault(entry.issuer, index)
        url = urlsplit(entry.jwks)
        if url.scheme == "http" and not is_loopback(url.hostname or ""):
            yield (*path, "jwks"), "keys fetched over http can be forged. Use https"
        elif "://" in entry.jwks and url.scheme not in {"http", "https"}:
            yield (*path, "jwks"), "give an https URL or a file"


def _keys_differ(keys: list[ApiKeyConfig]) -> Iterator[Problem]:
    names: dict[str, int] = {}
    secrets: dict[str, int] = {}
    for index, entry in enumerate(keys):
        path: KeyPath = ("auth", "api_keys", index)
        if entry.name in names:
            first = f"auth.api_keys[{names[entry.name]}]"
            yield (*path, "name"), f"'{entry.name}' is the name of {first} already; logs identify keys by name"
        if entry.key in secrets:
            yield (*path, "key"), f"is the key of auth.api_keys[{secrets[entry.key]}] already"
        names.setdefault(entry.name, index)
        secrets.setdefault(entry.key, index)


def _tokens(auth: AuthConfig) -> Iterator[Problem]:
    if auth.tokens and is_weak_secret(auth.secret_key):
        reason = "there is none" if not auth.secret_key else "this one is an example, too short or too regular"
        sentence = (
            f"auth.tokens is true and needs a secret of at least {MIN_SECRET_BYTES} random bytes; {reason}. "
            "`openssl rand -base64 48` prints one"
        )
        yield ("auth", "secret_key"), sentence


def _models_exist(models: ModelsConfig) -> Iterator[Problem]:
    names = list(models.available)
    all_names = _names_of(models)
    if models.default is not None and models.default not in all_names:
        yield ("models", "default"), _unknown_model(models.default, all_names)
    for index, name in enumerate(models.preload):
        if name not in models.available:
            yield ("models", "preload", index), _unknown_model(name, names)


def _names_of(models: ModelsConfig) -> list[str]:
    """Return every name that clients may use: models, aliases and adapters."""
    available = models.available
    return [*available, *(name for model in available.values() for name in (*model.aliases, *model.adapters))]


def _unknown_model(name: str, known: list[str]) -> str:
    hint = suggest(name, known) if known else "; models.available is empty"
    return f"there is no model '{name}'{hint}"


def _preload_fits(models: ModelsConfig) -> Iterator[Problem]:
    count = len(set(models.preload))
    if count > models.max_loaded:
        limit = models.max_loaded
        yield (
            ("models", "preload"),
            f"{count} models to preload, but models.max_loaded is {limit}. Raise max_loaded or preload fewer",
        )


def _names_differ(available: dict[str, ModelConfig]) -> Iterator[Problem]:
    owners: dict[str, str] = {}
    for name, model in available.items():
        own: list[tuple[str | int, str, str]] = [
            *((index, alias, "an alias") for index, alias in enumerate(model.aliases)),
            *((adapter, adapter, "an adapter") for adapter in model.adapters),
        ]
        for key, other, kind in own:
            section = "adapters" if isinstance(key, str) else "aliases"
            path: KeyPath = ("models", "available", name, section, key)
            if other in available:
                yield path, f"'{other}' is the name of a model already"
            elif other in owners:
                yield path, f"'{other}' is {owners[other]} already"
            owners.setdefault(other, f"{kind} of '{name}'")


def _sleepers_have_no_adapters(available: dict[str, ModelConfig]) -> Iterator[Problem]:
    """Reports to vLLM say that adapters silently stop applying once a sleeping model has woken."""
    for name, model in available.items():
        arguments = {key.lstrip("-").replace("-", "_") for key, value in model.engine_args.items() if value}
        if model.sleep and (model.adapters or not _LORA_ARGUMENTS.isdisjoint(arguments)):
            sentence = (
                "a model with adapters cannot sleep: adapters may stop applying once it wakes. Remove one of them"
            )
            yield ("models", "available", name, "sleep"), sentence


def _run_dir(path: Path) -> Iterator[Problem]:
    limit = _MAX_SOCKET_PATH_BYTES - _SOCKET_NAME_BYTES
    length = len(str(path).encode())
    if length > limit:
        sentence = f"{path} has {length} bytes; paths of unix sockets allow {limit}. Choose a shorter path"
        yield ("server", "run_dir"), sentence


def _log_option(option: str, reason: str | None, hint: str = "") -> Iterator[Problem]:
    if reason:
        yield ("logging", option), f"loguru cannot use it: {reason}{hint}"


_CHECKS: Checks = {
    lambda config: _exposure(config.auth, config.server): [
        ("auth", "enabled"),
        ("server", "host"),
        ("server", "allow_unauthenticated"),
    ],
    lambda config: _run_dir(config.run_dir): [("server", "run_dir")],
    lambda config: _issuers(config.auth.issuers): [("auth", "issuers")],
    lambda config: _keys_differ(config.auth.api_keys): [("auth", "api_keys")],
    lambda config: _tokens(config.auth): [("auth", "tokens"), ("auth", "secret_key")],
    lambda config: _log_option("format", log_file.format_problem(config.logging.format)): [("logging", "format")],
    lambda config: _log_option(
        "rotation",
        log_file.rotation_problem(config.logging.rotation),
        ". Use for example '1 day' or '100 MB'",
    ): [("logging", "rotation")],
    lambda config: _log_option(
        "retention",
        log_file.retention_problem(config.logging.retention),
        ". Use for example '7 days' or 10 (files)",
    ): [("logging", "retention")],
    lambda config: _models_exist(config.models): [
        ("models", "available"),
        ("models", "default"),
        ("models", "preload"),
    ],
    lambda config: _preload_fits(config.models): [("models", "preload"), ("models", "max_loaded")],
    lambda config: _names_differ(config.models.available): [("models", "available")],
    lambda config: _sleepers_have_no_adapters(config.models.available): [("models", "available")],
}


def _auth_warnings(auth: AuthConfig, server: ServerConfig) -> Iterator[str]:
    if auth.enabled and not auth.api_keys and not auth.issuers:
        yield (
            "auth.api_keys is empty: only keys of the store are accepted. `llm-api-server keys create --name NAME` "
            "makes one."
        )
    if not auth.enabled and not is_loopback(server.host):
        yield f"auth.enabled is false: anyone who can reach {server.host}:{server.port} may use this server."
    if auth.enabled and auth.tokens is None and auth.secret_key and is_weak_secret(auth.secret_key):
        yield (
            "auth.secret_key is an example, too short or too regular: /auth/token is off. Set a secret of at least "
            f"{MIN_SECRET_BYTES} random bytes, or remove it."
        )


def _origin_warnings(server: ServerConfig) -> Iterator[str]:
    for origin in server.cors_origins:
        if origin != "*" and origin.count("/") != 2:  # noqa: PLR2004 - scheme://host
            yield f"server.cors_origins: no browser sends '{origin}'; an origin looks like https://host or http://host:port."


def _key_warnings(auth: AuthConfig, server: ServerConfig, models: ModelsConfig) -> Iterator[str]:
    if not auth.enabled:
        return
    names = _names_of(models)
    for entry in auth.api_keys:
        if entry.key in EXAMPLE_KEYS and not is_loopback(server.host):
            yield (
                f"The key '{entry.name}' is published in the documentation. Replace it: `llm-api-server keys new` "
                "prints a random one."
            )
        for pattern in entry.models:
            if names and not any(fnmatchcase(name, pattern) for name in names):
                yield f"The key '{entry.name}' may use '{pattern}', which matches no model."


def _model_warnings(available: dict[str, ModelConfig], models_dir: Path) -> Iterator[str]:
    if not available:
        yield "models.available is empty: there is nothing to serve yet."
    for name, model in available.items():
        for path in (model.path, *([model.mmproj] if model.mmproj else [])):
            is_gguf = path.lower().endswith(".gguf") or model.engine == "llama_cpp"
            resolved = models_dir / Path(path).expanduser()
            if not _is_remote(path, is_gguf=is_gguf) and not resolved.exists():
                yield f"The model '{name}' cannot be loaded: {resolved} does not exist."
        for adapter, path in model.adapters.items():
            resolved = models_dir / Path(path).expanduser()
            if not resolved.exists():
                yield f"The model '{name}' cannot be loaded: {resolved}, its adapter '{adapter}', does not exist."


def _is_remote(path: str, *, is_gguf: bool) -> bool:
    """Return whether `path` is a URL or may be a hub id (`org/name`), neither of which is checked here."""
    is_url = path.lower().startswith(("http://", "https://"))
    return is_url or (path.count("/") == 1 and not path.startswith((".", "~", "/")) and not is_gguf)
