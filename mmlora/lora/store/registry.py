"""`AdapterRegistry`: SQLite file of the adapters added at run time, read at the next start."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Final

from mmlora.errors import AdapterError, ConfigError, RegistryError
from mmlora.lora.request import LoRARequest

APPLICATION_ID: Final = 0x6D6D6C6F  # "mmlo" in the file header
SCHEMA_VERSION: Final = 1
BUSY_TIMEOUT_S: Final = 5.0  # maximum wait for the lock of another writer, which needs milliseconds
TEMPORARY: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)

_CREATE = """
CREATE TABLE IF NOT EXISTS adapters (
    name TEXT PRIMARY KEY,
    lora_int_id INTEGER NOT NULL,
    path TEXT NOT NULL,
    base_model_name TEXT,
    digest TEXT NOT NULL,
    is_pinned INTEGER NOT NULL
)
"""


@dataclass(frozen=True)
class AdapterRecord:
    """One recorded adapter: its request, and the digest of its files."""

    name: str
    lora_int_id: int
    path: str
    base_model_name: str | None
    digest: str
    is_pinned: bool

    @property
    def request(self) -> LoRARequest:
        """The request that loads the adapter."""
        return LoRARequest(self.name, self.lora_int_id, self.path, self.base_model_name)


_COLUMNS: Final = ", ".join(field.name for field in fields(AdapterRecord))


class AdapterRegistry:
    """Records of adapters in a file that several threads and processes may share; each change is one transaction.

    Args:
        path: of the file, created if missing, but not again if it is deleted later.

    Raises:
        ConfigError: the file cannot be opened, is damaged, or belongs to another program or version.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).expanduser().absolute()  # the process may change its directory
        try:
            with self._transaction("opened", mode="rwc") as connection:
                self._check_or_create(connection)
            self.records()
        except AdapterError as error:
            raise ConfigError(f"lora_registry={str(path)!r} cannot be used: {error.__cause__ or error}") from None

    def records(self) -> list[AdapterRecord]:
        """Return all records, oldest first.

        Raises:
            RegistryError: the file cannot be read.
            AdapterError: a record has invalid values.
        """
        with self._transaction("read") as connection:
            rows = connection.execute(f"SELECT {_COLUMNS} FROM adapters ORDER BY rowid").fetchall()
        records = [
            AdapterRecord(name, lora_int_id, path, base_model_name, digest, bool(is_pinned))
            for name, lora_int_id, path, base_model_name, digest, is_pinned in rows
        ]
        for record in records:
            _ = record.request  # validates the values
        return records

    def save(self, record: AdapterRecord) -> None:
        """Insert or update the record of a name. An existing pin is kept, because another process may have set it.

        Raises:
            RegistryError: the file cannot be written.
        """
        with self._transaction("written") as connection:
            connection.execute(
                f"INSERT INTO adapters ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
                "lora_int_id = excluded.lora_int_id, path = excluded.path, digest = excluded.digest, "
                "base_model_name = excluded.base_model_name",
                astuple(record),
            )

    def mark_pinned(self, name: str, is_pinned: bool) -> None:
        """Update whether an adapter is pinned, if it has a record.

        Raises:
            RegistryError: the file cannot be written.
        """
        with self._transaction("written") as connection:
            connection.execute("UPDATE adapters SET is_pinned = ? WHERE name = ?", (is_pinned, name))

    def remove(self, name: str) -> None:
        """Delete the record of a name if there is one.

        Raises:
            RegistryError: the file cannot be written.
        """
        with self._transaction("written") as connection:
            connection.execute("DELETE FROM adapters WHERE name = ?", (name,))

    def _check_or_create(self, connection: sqlite3.Connection) -> None:
        found = tuple(connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        is_empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if found == (APPLICATION_ID, SCHEMA_VERSION):
            return
        if not is_empty:
            raise ConfigError(
                f"lora_registry={str(self._path)!r} is a SQLite file with application_id {found[0]} and user_version "
                f"{found[1]}; a registry of this version has {APPLICATION_ID} and {SCHEMA_VERSION}"
            )
        connection.execute(_CREATE)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self, done: str, mode: str = "rw") -> Iterator[sqlite3.Connection]:
        """Open a connection for one transaction, so that any thread may use it, and take the write lock at once.

        Args:
            done: participle for error messages, such as "read" in "cannot be read".
            mode: of SQLite: `rw`, or `rwc` to create a missing file.

        Raises:
            RegistryError: SQLite fails.
        """
        try:
            with closing(self._connect(mode)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")  # closing without a commit rolls back
        except (sqlite3.Error, ValueError) as error:  # ValueError: such as a name or path that is not UTF-8
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the upper bits, which are details
            problem = f"cannot be {done}: {error}"
            raise RegistryError(
                f"the adapter registry {self._path} {problem}",
                f"the adapter registry {problem}",
                is_temporary=code in TEMPORARY,
            ) from error

    def _connect(self, mode: str) -> sqlite3.Connection:
        if "\0" in str(self._path):
            raise ValueError("its path contains a null character")  # where SQLite would end it
        uri = f"{self._path.as_uri()}?mode={mode}"
        return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
