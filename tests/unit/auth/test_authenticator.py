"""Who is let in: by what was seen before, by asking, by token; and who is not, whatever they send."""

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
    """Keys by their secrets; counts the questions."""

    def __init__(self) -> None:
        self.keys: dict[str, Key] = {}
        self.asked = 0
        self.error: Exception | None = None
        self.while_asked: Callable[[], None] = lambda: None

    def add(self, secret: str, **fields: Any) -> Key:
        key = Key(**{"name": secret, "key_id": f"id-{secret}", "permissions": frozenset({"all"}), **fields})
        self.keys[digest(secret)] = key
        return key

    async def find(self, *, digest: str | None = None, key_id: str | None = None) -> Key | None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        found = {**self.keys, **{key.key_id: key for key in self.keys.values()}}.get(digest or key_id or "")
        await asyncio.sleep(0)
        self.while_asked()
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
def door(store: Store, tokens: TokenSigner, clock: Clock) -> Authenticator:
    ring = KeyRing(AuthConfig.model_validate({"api_keys": [CONFIGURED]}))
    return Authenticator(ring, store, tokens=tokens, now=clock)


async def enter(door: Authenticator, secret: str, address: str | None = "10.1.2.3") -> Key:
    return (await door.authenticate(secret, address))[0]


async def test_a_key_is_asked_for_once_and_again_when_it_changed(door: Authenticator, store: Store) -> None:
    key = store.add("one")
    store.add("two")
    for _ in range(3):
        assert await enter(door, "one") == key
        await enter(door, "two")
    assert store.asked == 2
    disabled = store.add("one", enabled=False)
    assert await enter(door, "one") == key
    door.forget([disabled.key_id])
    with pytest.raises(InvalidKey, match="disabled"):
        await enter(door, "one")
    await enter(door, "two")
    assert store.asked == 3
    door.forget(None)
    await enter(door, "two")
    assert store.asked == 4


async def test_unknown_keys_are_asked_for_once_until_keys_change(door: Authenticator, store: Store) -> None:
    for _ in range(3):
        with pytest.raises(InvalidKey):
            await enter(door, "new")
    assert store.asked == 1
    store.add("new")
    door.forget(["id-of-another"])
    await enter(door, "new")


async def test_a_change_while_a_key_is_looked_up_is_not_missed(door: Authenticator, store: Store) -> None:
    store.add("one")

    def revoke() -> None:
        store.while_asked = lambda: None
        store.add("one", enabled=False)
        door.forget(["id-one"])

    store.while_asked = revoke
    with pytest.raises(InvalidKey, match="disabled"):
        await enter(door, "one")


async def test_keys_that_always_change_are_answered_and_not_remembered(door: Authenticator, store: Store) -> None:
    store.add("one")
    store.while_asked = lambda: door.forget(["id-one"])
    await enter(door, "one")
    asked = store.asked
    await enter(door, "one")
    assert store.asked > asked


async def test_floods_of_wrong_keys_push_no_good_one_out(
    door: Authenticator, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add("good")
    await enter(door, "good")
    for number in range(3 * module.MAX_UNKNOWN):
        with pytest.raises(InvalidKey):
            await enter(door, f"wrong {number}")
    asked = store.asked
    await enter(door, "good")
    assert store.asked == asked
    assert len(door._unknown._values) == module.MAX_UNKNOWN


async def test_only_so_many_keys_are_remembered_the_last_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 3)
    door = Authenticator(KeyRing(AuthConfig()), store)
    for name in ("a", "b", "c", "a", "d"):
        if name not in store.keys:
            store.add(name)
        await enter(door, name)
    assert store.asked == 4
    await enter(door, "a")
    assert store.asked == 4
    await enter(door, "b")
    assert store.asked == 5


async def test_keys_end(door: Authenticator, store: Store, clock: Clock) -> None:
    store.add("one", expires_at=NOW + 10)
    await enter(door, "one")
    clock.now = NOW + 10
    with pytest.raises(InvalidKey, match="expired"):
        await enter(door, "one")


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
async def test_keys_are_held_to_their_networks(door: Authenticator, address: str | None, may: bool) -> None:
    if may:
        assert (await enter(door, "sk-configured-0123", address)).name == "configured"
    else:
        with pytest.raises(PermissionDenied, match="network"):
            await enter(door, "sk-configured-0123", address)


async def test_tokens_of_store_keys_live_and_die_with_them(
    door: Authenticator, store: Store, tokens: TokenSigner, clock: Clock
) -> None:
    key = store.add("one", models=("a", "b"), networks=("10.0.0.0/8",), expires_at=NOW + 1000)
    token, end = tokens.issue(key, ["chat"], ["a"], 600)
    seen = await enter(door, token)
    assert (seen.key_id, seen.permissions, seen.models, seen.expires_at) == (
        key.key_id,
        frozenset({"chat"}),
        ("a",),
        float(end),
    )
    asked = store.asked
    await enter(door, token)
    assert store.asked == asked
    with pytest.raises(PermissionDenied):
        await enter(door, token, "11.0.0.1")
    store.add("one", models=("a", "b"), enabled=False)
    door.forget([key.key_id])
    with pytest.raises(InvalidKey, match="disabled"):
        await enter(door, token)
    store.keys.clear()
    door.forget([key.key_id])
    with pytest.raises(InvalidKey, match="no longer exists"):
        await enter(door, token)
    store.add("one")
    door.forget(None)
    await enter(door, token)
    clock.now = end
    with pytest.raises(InvalidKey, match="token has expired"):
        await enter(door, token)


async def test_a_token_ends_no_later_than_its_key(
    door: Authenticator, store: Store, tokens: TokenSigner, clock: Clock
) -> None:
    token, _ = tokens.issue(store.add("one", expires_at=NOW + 5), expires_in=600)
    await enter(door, token)
    clock.now = NOW + 5
    with pytest.raises(InvalidKey, match="expired"):
        await enter(door, token)


async def test_who_cannot_be_looked_up_is_not_refused_as_unknown(door: Authenticator, store: Store) -> None:
    store.add("one")
    store.error = StoreUnavailable("The keys cannot be looked up just now.")
    with pytest.raises(StoreUnavailable):
        await enter(door, "one")
    assert (await enter(door, "sk-configured-0123")).name == "configured"
    store.error = None
    await enter(door, "one")


@given(st.text(max_size=80) | st.from_regex(r"[\w-]*\.[\w-]*\.[\w-]*", fullmatch=True) | st.binary().map(bytes.hex))
def test_nothing_else_comes_in(secret: str) -> None:
    store = Store()
    store.add("good")
    ring = KeyRing(AuthConfig.model_validate({"api_keys": [CONFIGURED]}))
    door = Authenticator(ring, store, tokens=TokenSigner(SECRET, 3600))
    with pytest.raises(InvalidKey):
        asyncio.run(enter(door, secret + "~"))


@given(st.data())
def test_a_token_with_one_other_character_is_no_token(data: st.DataObject) -> None:
    store, tokens = Store(), TokenSigner(SECRET, 3600)
    token, _ = tokens.issue(store.add("one"))
    door = Authenticator(KeyRing(AuthConfig()), store, tokens=tokens)
    place = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.characters(codec="latin-1").filter(lambda char: char != token[place]))
    changed = token[:place] + other + token[place + 1 :]
    # The last character of base64 has bits that say nothing.
    if place in (len(token) - 1, *(index - 1 for index, char in enumerate(token) if char == ".")):
        return
    with pytest.raises(InvalidKey):
        asyncio.run(enter(door, changed))
