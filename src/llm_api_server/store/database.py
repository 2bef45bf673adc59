"""The database of all processes, SQLite or PostgreSQL: connections, transactions and upgrades of its tables.

Blocking; may be used from any thread.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError, SQLAlchemyError

from llm_api_server.errors import StoreError
from llm_api_server.redaction import MASK
from llm_api_server.store.schema import HEAD

_FORMS = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
#: Seconds that one process waits for another's transaction.
_LOCK_TIMEOUT = 5.0
_UPGRADE_LOCK = 5_021_100
#: Notices a lost server within seconds, not when TCP gives up. Options of the URL take precedence.
_POSTGRES_OPTIONS = {
    "application_name": "llm-api-server",
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}


class Database:
    """Lends connections inside a transaction. Turns all errors of the driver into `StoreError`."""

    def __init__(self, url: str, *, lock_timeout: float = _LOCK_TIMEOUT) -> None:
        self._url = url
        self._lock_timeout = lock_timeout
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._file: tuple[int, int] | None = None

    def open(self) -> None:
        """Connect and upgrade older tables. Raises `StoreError`; may be called again."""
        self._opened()

    def version(self) -> str | None:
        """Return the version of the tables, or None if there are none; change nothing. Raises `StoreError`."""
        url = _parse(self._url)
        if _is_sqlite(url) and _identity(url) is None:
            return None
        with self._explained(url):
            engine = _sqlite(url, self._lock_timeout) if _is_sqlite(url) else _postgres(url)
            try:
                with engine.connect() as connection:
                    return _version(connection)
            finally:
                engine.dispose()

    def __str__(self) -> str:
        """Return the URL without its secrets. Raises `StoreError` if it cannot be parsed."""
        return _shown(_parse(self._url))

    def close(self) -> None:
        """Close all connections; the next call opens new ones."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Lend a connection in a transaction that only reads."""
        engine = self._opened()
        with self._explained(engine.url), engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self, lock: int | None = None) -> Iterator[Connection]:
        """Lend a connection in a transaction that is committed unless the block raises.

        With SQLite it excludes all other writers from its beginning, with PostgreSQL those with the same `lock`.
        """
        engine = self._opened()
        with self._explained(engine.url), _writing(engine, self._lock_timeout, lock) as connection:
            yield connection

    def _opened(self) -> Engine:
        with self._lock:
            if self._engine is not None and self._file is not None and self._file != _identity(self._engine.url):
                # The file was deleted or replaced, for example by a backup: writes to the old one would be lost.
                self._engine.dispose()
                self._engine = None
            if self._engine is None:
                url = _parse(self._url)
                with self._explained(url):
                    self._engine = self._connect(url)
                self._file = _identity(url) if _is_sqlite(url) else None
            return self._engine

    def _connect(self, url: URL) -> Engine:
        engine = _sqlite(url, self._lock_timeout) if _is_sqlite(url) else _postgres(url)
        try:
            with engine.connect() as connection:
                current = _version(connection)
            if current != HEAD:
                with _writing(engine, self._lock_timeout, _UPGRADE_LOCK) as connection:
                    _upgrade(connection)
        except BaseException:
            engine.dispose()
            raise
        return engine

    @contextmanager
    def _explained(self, url: URL) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            reason = _reason(error)
            if url.password:
                reason = reason.replace(str(url.password), MASK)
            raise StoreError(f"The database {_shown(url)} cannot be used: {reason}") from error


@contextmanager
def _writing(engine: Engine, lock_timeout: float, lock: int | None) -> Iterator[Connection]:
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SET LOCAL lock_timeout = {int(lock_timeout * 1000)}"))
            if lock is not None:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})
        yield connection


def _parse(given: str) -> URL:
    try:
        url = make_url(given)
    except (SQLAlchemyError, ValueError):
        raise StoreError(f"storage.url cannot be read; give {_FORMS}.") from None
    if url.drivername in {"postgres", "postgresql", "postgresql+psycopg"}:
        return url.set(drivername="postgresql+psycopg")
    if not _is_sqlite(url):
        raise StoreError(f"storage.url begins with {url.drivername}://; give {_FORMS}.")
    if url.database in {None, "", ":memory:"}:
        raise StoreError("storage.url names no file, but several processes share the database; give sqlite:///FILE.")
    return url


def _is_sqlite(url: URL) -> bool:
    return url.drivername in {"sqlite", "sqlite+pysqlite"}


def _identity(url: URL) -> tuple[int, int] | None:
    """Return device and inode: they differ when a file was replaced."""
    try:
        status = Path(str(url.database)).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _sqlite(url: URL, lock_timeout: float) -> Engine:
    file = Path(str(url.database))
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # SQLite gives its other files the mode of this one. Not opened: closing it would drop this process's locks.
    with suppress(FileExistsError):
        os.mknod(file, 0o600)
    engine = create_engine(url, connect_args={"timeout": lock_timeout}, pool_timeout=lock_timeout)

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # `on_begin` begins transactions, not the driver
        _use_wal(connection, lock_timeout)
        for pragma in ("synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        # A transaction that reads first and writes later would fail after another's write in between.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(connection: Any, lock_timeout: float) -> None:
    """Switch to WAL. If several processes do so at once, all but one fail at once, whatever the busy timeout."""
    end = time.monotonic() + lock_timeout
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


def _postgres(url: URL) -> Engine:
    options = {name: value for name, value in _POSTGRES_OPTIONS.items() if name not in url.query}
    return create_engine(url, connect_args=options, pool_pre_ping=True, pool_timeout=_LOCK_TIMEOUT)


def _version(connection: Connection) -> str | None:
    try:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    except (OperationalError, ProgrammingError) as error:
        if not _is_missing_table(error):
            raise
        return None


def _is_missing_table(error: DBAPIError) -> bool:
    return "no such table" in str(error.orig) or getattr(error.orig, "sqlstate", None) == "42P01"


def _upgrade(connection: Connection) -> None:
    """Upgrade within the exclusive transaction of `connection`; another process may have done it already."""
    from alembic.operations import Operations  # noqa: PLC0415 - Alembic is needed for upgrades only
    from alembic.runtime.migration import MigrationContext  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415
    from alembic.script.revision import RevisionError  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    context = MigrationContext.configure(connection)
    script = ScriptDirectory(str(Path(__file__).parent / "migrations"))
    try:
        steps = list(script.iterate_revisions("head", context.get_current_revision() or "base"))
    except (CommandError, RevisionError) as error:
        raise StoreError(
            "The database was made by a newer version of this program; use that version, or another storage.url."
        ) from error
    with Operations.context(context):
        for step in reversed(steps):
            step.module.upgrade()
            context.stamp(script, step.revision)


def _shown(url: URL) -> str:
    """Return the URL without password and options, which may hold one as well."""
    return url.set(drivername=url.get_backend_name(), query={}).render_as_string(hide_password=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}."
    cause = error.orig if isinstance(error, DBAPIError) else error
    text_ = " ".join(str(cause).split()) or type(error).__name__
    if "database is locked" in text_ or getattr(cause, "sqlstate", None) == "55P03":
        return "another process holds it for too long; try again."
    return text_ if text_.endswith(".") else f"{text_}."
