"""Measures the cost of a key check with few and with many keys: the authenticator alone, in one process.

Callers of each kind come in random order, with a warm cache as far as it reaches (10,000 store keys). The manager
looks up a
store key that no worker has cached; `lookup` measures that in a SQLite file.
The last line of the output is one JSON object; times are microseconds of the best of `--rounds`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time

from llm_api_server.auth.access import Key, digest
from llm_api_server.auth.authenticator import MAX_CACHED, Authenticator
from llm_api_server.auth.keys import KeyRing
from llm_api_server.auth.tokens import TokenSigner
from llm_api_server.config.models import ApiKeyConfig, AuthConfig
from llm_api_server.store.database import Database
from llm_api_server.store.key_fields import Actor, KeyFields
from llm_api_server.store.keys import Keys
from llm_api_server.store.schema import DIGESTS, KEYS

SIZES = (10, 1_000, 100_000)
CALLS = 5_000
LOOKUPS = 500
SECRET = "dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"  # noqa: S105 - of this measurement only


class Memory:
    """Key source with all keys of a store."""

    def __init__(self, keys: dict[str, Key]) -> None:
        self._by_digest = {digest(secret): key for secret, key in keys.items()}
        self._by_id = {key.key_id: key for key in keys.values()}

    async def find(self, *, digest: str | None = None, key_id: str | None = None) -> Key | None:
        return self._by_digest.get(digest or "") or self._by_id.get(key_id or "")


def doors(size: int) -> dict[str, tuple[Authenticator, list[str]]]:
    """Return, per kind of caller, its authenticator and up to `CALLS` credentials."""
    signer = TokenSigner(SECRET, 3600)
    keys = {f"sk-store-{number:030}": Key(f"k{number}", f"id{number}", frozenset({"all"})) for number in range(size)}
    configured = [ApiKeyConfig(key=f"sk-config-{number:030}", name=f"c{number}") for number in range(size)]
    store = Authenticator(KeyRing(AuthConfig()), Memory(keys), tokens=signer)
    ring = Authenticator(KeyRing(AuthConfig(api_keys=configured)), Memory({}))
    some = random.Random(1).sample(sorted(keys), min(size, CALLS))
    return {
        "store_key": (store, some),
        "token": (
            Authenticator(KeyRing(AuthConfig()), Memory(keys), tokens=signer),
            [signer.issue(keys[one])[0] for one in some],
        ),
        "config_key": (ring, [one.replace("store", "config") for one in some]),
    }


async def measure(door: Authenticator, sent: list[str], rounds: int) -> float:
    """Return the microseconds per call, with all of `sent` cached."""
    calls = (sent * (CALLS // len(sent) + 1))[:CALLS]
    for secret in sent:
        await door.authenticate(secret, "10.0.0.1")
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for secret in calls:
            await door.authenticate(secret, "10.0.0.1")
        best = min(best, time.perf_counter() - started)
    return best / CALLS * 1e6


def measure_lookup(size: int, rounds: int) -> float:
    """Return the microseconds per lookup of a key by its digest, among `size` keys in a file."""
    with tempfile.TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{folder}/keys.db")
        keys = Keys(database)
        keys.create(KeyFields(name="first"), Actor("bench"))
        with database.writing() as connection:
            first = dict(connection.execute(KEYS.select()).mappings().one())
            rows = [first | {"id": f"key_{number:016x}", "name": f"k{number}"} for number in range(size - 1)]
            digests = [{"digest": digest(row["id"]), "key_id": row["id"]} for row in rows]
            connection.execute(KEYS.insert(), rows)
            connection.execute(DIGESTS.insert(), digests)
        some = [one["digest"] for one in random.Random(1).choices(digests, k=LOOKUPS)]
        best = float("inf")
        for _ in range(rounds):
            started = time.perf_counter()
            for one in some:
                keys.find(digest=one)
            best = min(best, time.perf_counter() - started)
        database.close()
    return best / LOOKUPS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    figures: dict[str, dict[str, float]] = {}
    for size in SIZES:
        for kind, (door, sent) in doors(size).items():
            figures.setdefault(kind, {})[str(size)] = round(asyncio.run(measure(door, sent, rounds)), 3)
        figures.setdefault("lookup", {})[str(size)] = round(measure_lookup(size, rounds), 1)
    for kind, times in figures.items():
        print(f"{kind:12}", *(f"{size:>7} keys {cost:6.2f} us" for size, cost in times.items()), sep="  ")
        times["ratio"] = round(times[str(SIZES[-1])] / times[str(SIZES[0])], 2)
    print(json.dumps({"authenticate_us": figures, "remembered": MAX_CACHED, "rounds": rounds}))


if __name__ == "__main__":
    main()
