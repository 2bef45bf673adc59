"""A PostgreSQL cluster for tests, on a unix socket, run with the programs of the system's package."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg

from tests.needs import missing

PACKAGES = Path("/usr/lib/postgresql")
_START_TIMEOUT = 60


def find_programs() -> Path | None:
    """Return the folder of the newest `initdb` and `postgres`."""
    folders = [folder for folder in PACKAGES.glob("*/bin") if (folder / "initdb").exists()]
    return max(folders, key=lambda folder: float(folder.parent.name), default=None)


def skip_without_postgres() -> Path:
    """Return the folder of the programs; skip the test if there is none."""
    return find_programs() or missing("postgres", "PostgreSQL is not installed (apt-get install postgresql)")


class Cluster:
    """A cluster that ends with the tests. If they run as root it runs as the user `postgres`, as PostgreSQL demands."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        self._run_as: list[str] = []
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self._run_as = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]

    def start(self) -> None:
        if not (self.folder / "data").exists():
            options = ["--auth=trust", "--username=tests", "--encoding=UTF8", "--locale=C", "--no-sync"]
            subprocess.run(
                [*self._as_user(), self._programs / "initdb", "-D", self.folder / "data", *options],
                check=True, capture_output=True, cwd="/",
            )  # fmt: skip
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "fsync": "off",
            "max_connections": "60",
            "shared_buffers": "32MB",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._as_user(), self._programs / "postgres", "-D", self.folder / "data", *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
            )  # fmt: skip
        self._wait()

    def stop(self) -> None:
        """Stop at once, as after a crash; `start` continues with the same data."""
        if self._process is not None:
            self._process.send_signal(3)
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def new_database(self) -> str:
        """Create a database and return its URL."""
        name = f"tests_{next(self._numbers)}"
        with self._connect() as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return f"postgresql://tests@/{name}?host={self.folder}"

    def _connect(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(host=str(self.folder), user="tests", dbname="postgres", autocommit=True)

    def _wait(self) -> None:
        for _ in range(_START_TIMEOUT * 20):
            try:
                self._connect().close()
            except psycopg.OperationalError:
                time.sleep(0.05)
            else:
                return
        raise AssertionError((self.folder / "log").read_text())

    def _as_user(self) -> list[str]:
        """Return the command prefix that sets the user and ends the process with the tests."""
        if sys.platform != "linux" or shutil.which("setpriv") is None:
            return []
        return ["setpriv", *self._run_as, "--pdeathsig=QUIT"]
