"""The database is opened by several processes at once, upgraded once, and its errors have a reason."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from llm_api_server import store
from llm_api_server.errors import StoreError
from llm_api_server.store import schema
from llm_api_server.store.database import _UPGRADE_LOCK, Database
from llm_api_server.store.key_fields import Actor, KeyFields
from llm_api_server.store.keys import Keys
from tests import needs, postgres
from tests.postgres import Cluster

MIGRATIONS = Path(store.__file__).parent / "migrations"
SOURCE = Path(store.__file__).parents[2]


def run(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        env={"PYTHONPATH": str(SOURCE)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def revision(database: Database) -> int:
    with database.reading() as connection:
        return int(connection.execute(sa.select(schema.REVISION.c.value)).scalar_one())


def test_head_is_the_last_migration() -> None:
    assert ScriptDirectory(str(MIGRATIONS)).get_current_head() == schema.HEAD


def test_the_migrations_create_the_tables_of_the_schema(database: Database) -> None:
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.METADATA) == []
        assert context.get_current_revision() == schema.HEAD


def test_reading_the_version_changes_nothing(url: str) -> None:
    database = Database(url)
    assert (database.version(), database.version()) == (None, None)
    if (file := url.removeprefix("sqlite:///")) != url:
        assert not Path(file).exists()
    database.open()
    database.close()
    assert database.version() == schema.HEAD


def test_opening_twice_and_after_closing_changes_nothing(database: Database) -> None:
    database.open()
    database.open()
    database.close()
    database.close()
    assert revision(database) == 0


def test_a_current_database_is_opened_without_alembic(url: str) -> None:
    program = """
import sys
from llm_api_server.store.database import Database
database = Database(sys.argv[1])
database.open()
database.close()
print("alembic" in sys.modules)
"""
    outputs = []
    for _ in range(2):
        output, errors = run(program, url).communicate()
        assert not errors
        outputs.append(output.strip())
    assert outputs == ["True", "False"]


def test_processes_that_open_a_new_database_at_once_upgrade_it_once(url: str) -> None:
    program = """
import sys
import alembic.operations, alembic.runtime.migration, alembic.script
from llm_api_server.store.database import Database
database = Database(sys.argv[1], lock_timeout=60)
print("ready", flush=True)
sys.stdin.readline()
database.open()
database.close()
"""
    processes = [run(program, url) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    results = [(process.communicate()[1], process.returncode) for process in processes]
    assert results == [("", 0)] * 4
    database = Database(url)
    assert revision(database) == 0
    database.close()


def test_threads_open_the_database_once(url: str) -> None:
    database = Database(url)
    barrier = threading.Barrier(4)
    found: list[int] = []

    def use() -> None:
        barrier.wait()
        found.append(revision(database))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.close()
    assert found == [0] * 4


def test_a_failed_upgrade_changes_nothing(database: Database, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise sa.exc.DatabaseError("stamp", None, RuntimeError("broken on the way"))

    with monkeypatch.context() as patch:
        patch.setattr(MigrationContext, "stamp", fail)
        with pytest.raises(StoreError, match="broken on the way"):
            database.open()
    assert revision(database) == 0
    with database.reading() as connection:
        assert set(sa.inspect(connection).get_table_names()) == {*schema.METADATA.tables, "alembic_version"}


def test_a_database_of_a_newer_version_is_refused(database: Database, url: str) -> None:
    with database.writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(StoreError, match="newer version"):
        database.open()


def test_a_failed_block_is_rolled_back(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.writing() as connection:  # noqa: PT012 - the block is the test
        connection.execute(sa.update(schema.REVISION).values(value=7))
        raise ZeroDivisionError
    assert revision(database) == 0


def test_a_reader_does_not_wait_for_a_writer(database: Database) -> None:
    with database.writing() as connection:
        connection.execute(sa.update(schema.REVISION).values(value=7))
        assert revision(database) == 0
    assert revision(database) == 7


def test_a_write_waits_for_another_up_to_the_lock_timeout(url: str) -> None:
    holder, other = Database(url), Database(url, lock_timeout=0.1)
    other.open()
    lock = 7
    with holder.writing(lock), pytest.raises(StoreError, match="another process holds it"), other.writing(lock):
        pass
    with other.writing(lock) as connection:
        connection.execute(sa.update(schema.REVISION).values(value=1))
    assert revision(holder) == 1
    holder.close()
    other.close()


def test_a_locked_new_file_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "test.db"
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    database = Database(f"sqlite:///{file}", lock_timeout=0.1)
    with pytest.raises(StoreError, match="another process holds it"):
        database.open()
    holder.execute("ROLLBACK")
    holder.close()
    assert revision(database) == 0
    database.close()


def test_a_sqlite_file_is_private_and_outlives_its_processes(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "test.db"
    database = Database(f"sqlite:///{file}")
    with database.writing() as connection:
        connection.execute(sa.update(schema.REVISION).values(value=3))
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert settings == ["wal", 1, 1, 5000]
    assert {stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()} == {0o600}
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    database.close()


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "test.db", Path("/proc/nowhere/test.db"), tmp_path):
        with pytest.raises(StoreError, match=f"sqlite:///{place}"):
            Database(f"sqlite:///{place}").open()


def test_a_file_that_is_no_database_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "test.db"
    file.write_text("something else " * 1000)
    with pytest.raises(StoreError, match="not a database"):
        Database(f"sqlite:///{file}").open()


@pytest.mark.parametrize("read_only", ["folder", "file"])
def test_a_read_only_database_is_reported(read_only: str) -> None:
    """In a process that is not root's, whom no mode stops."""
    program = """
import os, sys
from llm_api_server.errors import StoreError
from llm_api_server.store.database import Database
database = Database(sys.argv[1])
import sqlite3, sqlalchemy.dialects.sqlite.pysqlite
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    with database.writing():
        pass
except StoreError as error:
    print(error)
"""
    with tempfile.TemporaryDirectory() as name:  # others may not enter tmp_path
        folder = Path(name)
        file = folder / "test.db"
        if read_only == "file":
            database = Database(f"sqlite:///{file}")
            database.open()
            database.close()
            file.chmod(0o444)
        folder.chmod(0o555)
        output, errors = run(program, f"sqlite:///{file}").communicate()
        folder.chmod(0o755)
    assert output.startswith(f"The database sqlite:///{file} cannot be used: "), errors


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://me:secret@host/name", "begins with mysql://"),
        ("secret", "cannot be read"),
        ("postgresql://me:secret@host:port/name", "cannot be read"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("postgresql://me:secret@/name?host=/nowhere&password=secret", "postgresql://me:***@/name cannot be used"),
    ],
)
def test_invalid_urls_are_reported_without_their_password(url: str, words: str) -> None:
    with pytest.raises(StoreError) as caught:
        Database(url).open()
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_old_form_of_postgres_urls_is_accepted(postgres_cluster: Cluster) -> None:
    database = Database(postgres_cluster.new_database().replace("postgresql:", "postgres:"))
    assert revision(database) == 0
    database.close()


@pytest.mark.parametrize("used_meanwhile", [False, True])
def test_a_lost_connection_is_replaced(postgres_cluster: Cluster, used_meanwhile: bool) -> None:
    database = Database(postgres_cluster.new_database())
    database.open()
    postgres_cluster.stop()
    try:
        if used_meanwhile:
            with pytest.raises(StoreError, match="cannot be used"):
                revision(database)
    finally:
        postgres_cluster.start()
    assert revision(database) == 0
    database.close()


def test_an_upgrade_waits_for_another(postgres_cluster: Cluster) -> None:
    url = postgres_cluster.new_database()
    with psycopg.connect(url) as holder:
        holder.execute("SELECT pg_advisory_xact_lock(%s)", [_UPGRADE_LOCK])
        with pytest.raises(StoreError, match="another process holds it"):
            Database(url, lock_timeout=0.1).open()
    database = Database(url)
    assert revision(database) == 0
    database.close()


def test_a_connection_lost_in_a_block_is_an_error_and_the_next_call_works(postgres_cluster: Cluster) -> None:
    url = postgres_cluster.new_database()
    database, other = Database(url), Database(url)
    with pytest.raises(StoreError), database.writing() as connection:  # noqa: PT012 - the block is the test
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        with other.writing() as second:
            second.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        connection.execute(sa.update(schema.REVISION).values(value=7))
    other.close()
    assert revision(database) == 0
    database.close()


def test_no_file_is_created_before_the_first_use(tmp_path: Path) -> None:
    Database(f"sqlite:///{tmp_path / 'test.db'}").close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("needed", "outcome"), [("", pytest.skip.Exception), ("node,postgres", pytest.fail.Exception)])
def test_without_postgres_tests_are_skipped_unless_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, needed: str, outcome: type[Exception]
) -> None:
    monkeypatch.setattr(postgres, "find_programs", lambda: None)
    monkeypatch.setenv(needs.NEED_VARIABLE, needed)
    with pytest.raises(outcome, match="apt-get install postgresql"):
        postgres.skip_without_postgres()


def test_a_deleted_or_replaced_file_is_opened_again(tmp_path: Path) -> None:
    used, other = Database(f"sqlite:///{tmp_path / 'used.db'}"), Database(f"sqlite:///{tmp_path / 'other.db'}")
    actor = Actor("cli:ann")
    Keys(used).create(KeyFields(name="first"), actor)
    Keys(other).create(KeyFields(name="second"), actor)
    other.close()
    for path in tmp_path.glob("used.db*"):
        path.unlink()
    (tmp_path / "other.db").replace(tmp_path / "used.db")
    assert [record.key.name for record in Keys(used).list()] == ["second"]
    for path in tmp_path.glob("used.db*"):
        path.unlink()
    assert Keys(used).list() == []
    Keys(used).create(KeyFields(name="third"), actor)
    used.close()
    assert [record.key.name for record in Keys(used).list()] == ["third"]
    used.close()


def test_processes_that_switch_a_file_to_wal_at_once_wait_for_each_other(tmp_path: Path) -> None:
    """SQLite's busy timeout does not hold there."""
    for number in range(20):
        databases = [Database(f"sqlite:///{tmp_path / f'{number}.db'}", lock_timeout=60) for _ in range(6)]
        barrier = threading.Barrier(len(databases))

        def use(database: Database, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            database.open()
            database.close()

        threads = [threading.Thread(target=use, args=(database,)) for database in databases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
