"""Tests against real services. Each names the tools it needs; a missing one is a skip on a
developer's machine and a failure in CI (`PILOTHOUSE_REQUIRE_TOOLS=1`)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psycopg
import pytest


def require_tool(name: str, package: str = "prometheus", folders: str | None = None) -> str:
    """Path of a program, else skip (or fail in CI)."""
    path = shutil.which(name) or shutil.which(name, path=folders or os.defpath)
    return path or missing(f"{name} is not installed (Debian package: {package})")


def missing(message: str) -> NoReturn:
    """Something that the tests need is not here."""
    if os.environ.get("PILOTHOUSE_REQUIRE_TOOLS"):
        pytest.fail(message)
    pytest.skip(message)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Postgres:
    """A PostgreSQL of one's own, which can go away and come back.

    Args:
        folder: of the service's user.
        programs: folder of `initdb` and `postgres`.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self.programs = programs
        self.port = free_port()
        self._databases = 0
        # It refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user)
        subprocess.run(
            [
                programs / "initdb", "--pgdata", folder / "data", "--username", "pilot",
                "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync",
            ],
            check=True, stdout=subprocess.DEVNULL, user=self._user, cwd=folder,
        )  # fmt: skip
        self.start()

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self.programs / "postgres", "-D", self.folder / "data", "-p", str(self.port),
                    "-k", self.folder, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off",
                ],
                stdout=log, stderr=log, user=self._user, cwd=self.folder,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                return self._ask("SELECT 1")
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, "PostgreSQL did not start in time"
                time.sleep(0.1)

    def stop(self) -> None:
        """At once, as if its host had lost power: connections break."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(timeout=60)

    def new_database(self) -> str:
        """URL of an empty database."""
        self._databases += 1
        name = f"records{self._databases}"
        self._ask(f"CREATE DATABASE {name}")
        return f"postgresql://pilot@127.0.0.1:{self.port}/{name}"

    def _ask(self, sql: str) -> None:
        address = f"postgresql://pilot@127.0.0.1:{self.port}/postgres"
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(sql.encode())


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    # Debian keeps the programs of each version in a folder of its own, outside PATH.
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: p.parent.name)
    initdb = require_tool("initdb", "postgresql", os.pathsep.join(map(str, folders[::-1])))
    programs = Path(initdb).resolve().parent
    # Not pytest's folder, which only this user can enter.
    with tempfile.TemporaryDirectory(prefix="pilothouse-postgres-") as folder:
        service = Postgres(Path(folder), programs)
        try:
            yield service
        finally:
            service.stop()
