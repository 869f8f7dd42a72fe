"""What servers answered, on disk: asked once, paid once, whichever actor or run asks again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

log = logging.getLogger("rayalign")
BUSY_S = 60.0  # that another actor may hold the file
USUAL = "~/.cache/rayalign/answers.sqlite"
LOOKED_THROUGH = 256 << 20  # bytes of a file that is looked through for damage when it is opened


def key_of(**asked: Any) -> str:
    """The digest of everything that an answer depends on."""
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """Answers by key, in one SQLite file that threads, actors and runs share.

    Each answer is on disk before `put` returns. What cannot be read or written costs no run: a damaged file is
    moved aside, and an answer that finds no room on the disk is known as long as this object lives.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        self._unwritten: dict[str, str] = {}
        self._file: sqlite3.Connection | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=BUSY_S):  # of two that find it damaged one moves it
                self._file = self._opened()
        except (OSError, TimeoutError, sqlite3.Error) as error:
            log.warning("%s cannot be opened, so that answers are kept in memory only: %s", self.path, error)

    def _opened(self) -> sqlite3.Connection:
        try:
            return _connected(self.path)
        except sqlite3.OperationalError:  # no room, no permission: not the file's fault
            raise
        except sqlite3.DatabaseError as error:
            aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
            log.warning("%s is damaged (%s): moved to %s, a new one is begun", self.path, error, aside.name)
            os.replace(self.path, aside)
            return _connected(self.path)

    def get(self, key: str) -> Any:
        """The answer, or None where there is none."""
        with self._lock:
            text = self._unwritten.get(key)
            if text is None and self._file is not None:
                try:
                    row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
                except sqlite3.Error as error:
                    log.warning("%s cannot be read: %s", self.path, error)
                    return None
                text = row and row[0]
        try:
            return None if text is None else json.loads(text)
        except ValueError:
            return None

    def put(self, key: str, answer: Any) -> None:
        text = json.dumps(answer)
        with self._lock:
            try:
                if self._file is None:
                    raise sqlite3.OperationalError("it is not open")
                with self._file:  # commits
                    self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, text, time.time()))
            except sqlite3.Error as error:
                if not self._unwritten:
                    log.warning("%s takes no more answers, which are kept in memory only: %s", self.path, error)
                self._unwritten[key] = text

    def __len__(self) -> int:
        with self._lock:
            count = self._file.execute("SELECT count(*) FROM answers").fetchone()[0] if self._file else 0
            return count + len(self._unwritten)

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def _connected(path: Path) -> sqlite3.Connection:
    """With a journal that also works on file systems of a network; raises sqlite3.DatabaseError where damaged."""
    file = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
    try:
        with file:
            file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT, made REAL)")
        small = path.stat().st_size <= LOOKED_THROUGH
        if small and file.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("its pages do not fit together")
    except BaseException:
        file.close()
        raise
    return file


def open_cache(path: str | None) -> AnswerCache | None:
    """None where the config has none."""
    return AnswerCache(path) if path else None
