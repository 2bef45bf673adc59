"""Authentication by configured key, stored key and token; the cache, and refusal of everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.auth import authenticator as module
from llm_api_server.auth.access import Key, digest
from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.auth.keys import KeyRing
from llm_api_server.auth.tokens import TokenSigner
from llm_api_server.config.models import AuthConfig
from llm_api_server.errors import InvalidKey, PermissionDenied, StoreUnavailable

pytestmark = pytest.mark.anyio

SECRET = "dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"
CONFIGURED = {"key": "sk-configured-0123", "name": "configured", "networks": ["10.0.0.0/8", "fd00::/8"]}
NOW = 1_800_000_000.0


class Store:
    """Keys by secret; counts the lookups."""

    def __init__(self) -> None:
        self.keys: dict[str, Key] = {}
        self.lookups = 0
        self.error: Exception | None = None
        self.during_lookup: Callable[[], None] = lambda: None

    def add(self, secret: str, **fields: Any) -> Key:
        key = Key(**{"name": secret, "key_id": f"id-{secret}", "permissions": frozenset({"all"}), **fields})
        self.keys[digest(secret)] = key
        return key

    async def find(self, *, digest: str | None = None, key_id: str | None = None) -> Key | None:
        self.lookups += 1
        if self.error is not None:
            raise self.error
        found = {**self.keys, **{key.key_id: key for key in self.keys.values()}}.get(digest or key_id or "")
        await asyncio.sleep(0)
        self.during_lookup()
        return found


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(clock: Clock) -> TokenSigner:
    return TokenSigner(SECRET, 3600, now=clock)


@pytest.fixture
def authenticator(store: Store, tokens: TokenSigner, clock: Clock) -> Authenticator:
    ring = KeyRing(AuthConfig.model_validate({"api_keys": [CONFIGURED]}))
    return Authenticator(ring, store, tokens=tokens, now=clock)


async def authenticate(authenticator: Authenticator, secret: str, address: str | None = "10.1.2.3") -> Key:
    return (await authenticator.authenticate(secret, address))[0]


async def test_a_key_is_looked_up_once_and_again_when_it_changed(authenticator: Authenticator, store: Store) -> None:
    key = store.add("one")
    store.add("two")
    for _ in range(3):
        assert await authenticate(authenticator, "one") == key
        await authenticate(authenticator, "two")
    assert store.lookups == 2
    disabled = store.add("one", enabled=False)
    assert await authenticate(authenticator, "one") == key
    authenticator.invalidate([disabled.key_id])
    with pytest.raises(InvalidKey, match="disabled"):
        await authenticate(authenticator, "one")
    await authenticate(authenticator, "two")
    assert store.lookups == 3
    authenticator.invalidate(None)
    await authenticate(authenticator, "two")
    assert store.lookups == 4


async def test_unknown_keys_are_looked_up_once_until_keys_change(authenticator: Authenticator, store: Store) -> None:
    for _ in range(3):
        with pytest.raises(InvalidKey):
            await authenticate(authenticator, "new")
    assert store.lookups == 1
    store.add("new")
    authenticator.invalidate(["id-of-another"])
    await authenticate(authenticator, "new")


async def test_a_change_during_a_lookup_is_not_missed(authenticator: Authenticator, store: Store) -> None:
    store.add("one")

    def revoke() -> None:
        store.during_lookup = lambda: None
        store.add("one", enabled=False)
        authenticator.invalidate(["id-one"])

    store.during_lookup = revoke
    with pytest.raises(InvalidKey, match="disabled"):
        await authenticate(authenticator, "one")


async def test_keys_that_always_change_are_found_and_not_cached(authenticator: Authenticator, store: Store) -> None:
    store.add("one")
    store.during_lookup = lambda: authenticator.invalidate(["id-one"])
    await authenticate(authenticator, "one")
    lookups = store.lookups
    await authenticate(authenticator, "one")
    assert store.lookups > lookups


async def test_floods_of_wrong_keys_evict_no_good_one(authenticator: Authenticator, store: Store) -> None:
    store.add("good")
    await authenticate(authenticator, "good")
    for number in range(3 * module.MAX_UNKNOWN):
        with pytest.raises(InvalidKey):
            await authenticate(authenticator, f"wrong {number}")
    lookups = store.lookups
    await authenticate(authenticator, "good")
    assert store.lookups == lookups
    assert len(authenticator._unknown._values) == module.MAX_UNKNOWN


async def test_the_cache_keeps_the_most_recently_used_keys(store: Store) -> None:
    authenticator = Authenticator(KeyRing(AuthConfig()), store, max_cached=3)
    for name in ("a", "b", "c", "a", "d"):
        if name not in store.keys:
            store.add(name)
        await authenticate(authenticator, name)
    assert store.lookups == 4
    await authenticate(authenticator, "a")
    assert store.lookups == 4
    await authenticate(authenticator, "b")
    assert store.lookups == 5


async def test_keys_expire(authenticator: Authenticator, store: Store, clock: Clock) -> None:
    store.add("one", expires_at=NOW + 10)
    await authenticate(authenticator, "one")
    clock.now = NOW + 10
    with pytest.raises(InvalidKey, match="expired"):
        await authenticate(authenticator, "one")


@pytest.mark.parametrize(
    ("address", "may"),
    [
        ("10.0.0.1", True),
        ("::ffff:10.0.0.1", True),
        ("fd00::1", True),
        ("fd00::1%eth0", True),
        ("11.0.0.1", False),
        ("::ffff:11.0.0.1", False),
        ("fe80::1", False),
        ("", False),
        ("unix", False),
        (None, False),
    ],
)
async def test_keys_are_limited_to_their_networks(authenticator: Authenticator, address: str | None, may: bool) -> None:
    if may:
        assert (await authenticate(authenticator, "sk-configured-0123", address)).name == "configured"
    else:
        with pytest.raises(PermissionDenied, match="network"):
            await authenticate(authenticator, "sk-configured-0123", address)


async def test_tokens_of_store_keys_are_valid_only_while_their_key_is(
    authenticator: Authenticator, store: Store, tokens: TokenSigner, clock: Clock
) -> None:
    key = store.add("one", models=("a", "b"), networks=("10.0.0.0/8",), expires_at=NOW + 1000)
    token, end = tokens.issue(key, ["chat"], ["a"], 600)
    seen = await authenticate(authenticator, token)
    assert (seen.key_id, seen.permissions, seen.models, seen.expires_at) == (
        key.key_id,
        frozenset({"chat"}),
        ("a",),
        float(end),
    )
    lookups = store.lookups
    await authenticate(authenticator, token)
    assert store.lookups == lookups
    with pytest.raises(PermissionDenied):
        await authenticate(authenticator, token, "11.0.0.1")
    store.add("one", models=("a", "b"), enabled=False)
    authenticator.invalidate([key.key_id])
    with pytest.raises(InvalidKey, match="disabled"):
        await authenticate(authenticator, token)
    store.keys.clear()
    authenticator.invalidate([key.key_id])
    with pytest.raises(InvalidKey, match="no longer exists"):
        await authenticate(authenticator, token)
    store.add("one")
    authenticator.invalidate(None)
    await authenticate(authenticator, token)
    clock.now = end
    with pytest.raises(InvalidKey, match="token has expired"):
        await authenticate(authenticator, token)


async def test_a_token_expires_no_later_than_its_key(
    authenticator: Authenticator, store: Store, tokens: TokenSigner, clock: Clock
) -> None:
    token, _ = tokens.issue(store.add("one", expires_at=NOW + 5), expires_in=600)
    await authenticate(authenticator, token)
    clock.now = NOW + 5
    with pytest.raises(InvalidKey, match="expired"):
        await authenticate(authenticator, token)


async def test_an_unreachable_store_is_no_refusal(authenticator: Authenticator, store: Store) -> None:
    store.add("one")
    store.error = StoreUnavailable("The keys cannot be looked up.")
    with pytest.raises(StoreUnavailable):
        await authenticate(authenticator, "one")
    assert (await authenticate(authenticator, "sk-configured-0123")).name == "configured"
    store.error = None
    await authenticate(authenticator, "one")


@given(st.text(max_size=80) | st.from_regex(r"[\w-]*\.[\w-]*\.[\w-]*", fullmatch=True) | st.binary().map(bytes.hex))
def test_any_other_secret_is_refused(secret: str) -> None:
    store = Store()
    store.add("good")
    ring = KeyRing(AuthConfig.model_validate({"api_keys": [CONFIGURED]}))
    authenticator = Authenticator(ring, store, tokens=TokenSigner(SECRET, 3600))
    with pytest.raises(InvalidKey):
        asyncio.run(authenticate(authenticator, secret + "~"))


@given(st.data())
def test_a_token_with_one_other_character_is_no_token(data: st.DataObject) -> None:
    store, tokens = Store(), TokenSigner(SECRET, 3600)
    token, _ = tokens.issue(store.add("one"))
    authenticator = Authenticator(KeyRing(AuthConfig()), store, tokens=tokens)
    # The last character of a base64 part has unused bits.
    ends = {len(token) - 1, *(index - 1 for index, char in enumerate(token) if char == ".")}
    index = data.draw(st.integers(0, len(token) - 1).filter(lambda index: index not in ends))
    other = data.draw(st.characters(codec="latin-1").filter(lambda char: char != token[index]))
    changed = token[:index] + other + token[index + 1 :]
    with pytest.raises(InvalidKey):
        asyncio.run(authenticate(authenticator, changed))
