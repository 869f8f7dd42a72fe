"""Asking a server over HTTP: many requests at once, deadlines, retries with back-off, and a key that is told nobody."""

from __future__ import annotations

import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlsplit

from rayalign.errors import ScoreError
from rayalign.record import redacted
from rayalign.scorers.connection import Connection, key_of_server

log = logging.getLogger("rayalign")
T = TypeVar("T")
R = TypeVar("R")
LONGEST_WAIT_S = 60.0  # between two tries, unless the server asks for more
LOCAL = ("localhost", "127.0.0.1", "::1")
NOBODY = {  # answers after which no request of ours would fare better, with what to do about them
    401: "set the environment variable that key_env names to a valid key",
    403: "use a key that may do this, and name its environment variable as key_env",
    404: "correct the url (an OpenAI-compatible one ends with /v1) or the model's name: GET URL/models lists them",
    405: "correct the url: what is there takes no POST",
}
IN_A_ROW = 4  # requests that were given up, and none answered in between: nobody is there
AGAIN = (408, 409, 425, 429)
BUSY = (429, 502, 503)  # a server that is there, and is not: it is waited for
JSON = {"Content-Type": "application/json"}
REMEDIES = {
    "absent": "start the server, or correct the url; what was answered before is kept",
    "busy": "lower concurrency or scorer.count, or raise patience_s",
    "slow": "raise timeout_s, or lower concurrency: the server is slow",
    "broken": "look at the server's log",
}


class Failed(Exception):
    """One request has no usable reply; others may have.

    Attributes:
        of_any: whether any other request would seem to fare no better.
        ends: what to raise where no other did.
    """

    def __init__(self, reason: str, *, of_any: bool = False, ends: ScoreError | None = None):
        super().__init__(reason)
        self.of_any, self.ends = of_any, ends


class _Again(Exception):
    """This try failed; the next one may not.

    Attributes:
        kind: whether nobody was there, or had no time for us, or did not end in time; or the reply was no good.
        wait_s: what the server asks for.
    """

    def __init__(self, reason: str, kind: Literal["absent", "busy", "slow", "broken"], wait_s: float = 0.0):
        super().__init__(f"{reason}, to be asked again in {wait_s:.0f} s" if wait_s else reason)
        self.kind, self.wait_s = kind, wait_s


@dataclass
class _Tries:
    """Of one request: how many, how many of them count against `retries`, and when the first failed."""

    began: float
    count: int = 0
    faults: int = 0
    failed_at: float = math.inf


class Caller:
    """Posts JSON to one server. A server that is gone, or has no time, is waited for as long as the config's patience
    lasts; other faults are tried again a few times. A request that is given up is `Failed`. Several in a row, or one
    that found nobody to connect to, mean that nobody answers: all that is left undone then ends with a ScoreError.

    Args:
        place: the key of the config, for messages.
    """

    def __init__(self, connection: Connection, *, place: str):
        import httpx

        for name in ("httpx", "httpcore"):  # a line for every request otherwise, headers included
            logging.getLogger(name).setLevel(logging.WARNING)
        self._set, self._place = connection, place
        self._key = key_of_server(connection, place)
        host = urlsplit(connection.url).hostname or ""
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(connection.timeout_s, connect=min(10.0, connection.timeout_s)),
            limits=httpx.Limits(max_connections=connection.concurrency),
            trust_env=host not in LOCAL,  # what proxies are for is beyond this machine
        )
        self._random = random.Random()  # waits differ between actors; nothing that is sampled depends on it
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._nobody: ScoreError | None = None
        self._answered_at, self._in_a_row = -math.inf, 0
        self._gone_at = math.inf  # since when nobody was there, or had time
        self._not_before = 0.0  # as the server asked

    def each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`work` of every item, which may `post`, as many at once as the config says; in the order of the items.
        Raises what the first of them raised, once all that were under way have ended."""
        self._nobody = None
        self._stop.clear()
        with ThreadPoolExecutor(self._set.concurrency, thread_name_prefix="asking") as threads:
            futures = [threads.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._stop.set()
                for future in futures:
                    future.cancel()
                raise

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], R]) -> R:
        """What `read` makes of the reply.

        Args:
            read: raises Failed when the reply is whole, and not what was asked for.

        Raises:
            Failed: of this request.
            ScoreError: nobody answers.
        """
        reply = self._tried(lambda: self._reply(path, body))
        self._answered()
        try:
            return read(reply)
        except Failed as failed:
            raise Failed(self._told(str(failed)), of_any=failed.of_any, ends=failed.ends) from None

    def look(self, address: str, body: Mapping[str, Any] | None = None) -> Any:
        """What the server says of itself: the JSON at another address of it, by GET unless there is a body; None
        where it has no such thing. Raises ScoreError when nobody answers."""

        def glance() -> Any:
            try:
                status, headers, raw = self._read("GET" if body is None else "POST", address, body)
            except _Again as trouble:
                if trouble.kind == "absent":
                    raise
                return None
            if status in BUSY:
                raise _Again(f"status {status}: {self._said(raw)}", "busy", _wait_of(headers.get("retry-after")))
            self._answered()
            try:
                return json.loads(raw) if status == 200 else None
            except ValueError:
                return None

        self._nobody = None
        self._stop.clear()
        try:
            return self._tried(glance)
        except Failed as failed:
            if failed.ends is not None:
                raise failed.ends from None
            return None

    def _tried(self, once: Callable[[], R]) -> R:
        """`once`, and again, until it is no `_Again` or there is no point in it."""
        tries, wait = _Tries(time.monotonic()), 0.0
        while True:
            with self._lock:
                asked_to = max(0.0, self._not_before - time.monotonic())
            if asked_to:
                wait = wait or self._set.backoff_s
            self._stop.wait(asked_to + wait * self._random.uniform(0.5, 1.0))  # not all at the same moment
            if self._nobody is not None:
                raise self._nobody
            if self._stop.is_set():
                raise Failed("it was stopped")
            tries.count += 1
            try:
                return once()
            except _Again as trouble:
                wait = min(2 * wait or self._set.backoff_s, LONGEST_WAIT_S)
                self._failed(trouble, tries, wait)

    def _failed(self, trouble: _Again, tries: _Tries, wait: float) -> None:
        """Notes it, and until when the server asks not to be asked.

        Raises:
            Failed: there is no point in another try, in `wait` seconds or when the server asks for it.
            ScoreError: nobody answers.
        """
        now, patience = time.monotonic(), self._set.patience_s
        tries.failed_at = min(tries.failed_at, now)
        with self._lock:
            # A server that never answered may be no server: an address that is wrong is not waited for.
            gone = trouble.kind == "busy" or (trouble.kind == "absent" and self._answered_at > -math.inf)
            if gone and now < self._gone_at:
                self._gone_at = now
                log.warning("%s: %s; waiting for it, up to %g s", self._where, trouble, patience)
            ends = min(self._gone_at, tries.failed_at) + patience if gone else math.inf
            too_late = now + max(trouble.wait_s, wait) > ends
            if trouble.wait_s and not too_late:
                self._not_before = max(self._not_before, now + trouble.wait_s)
        tries.faults += not gone
        if too_late or tries.faults > self._set.retries:
            raise self._unanswered(trouble, tries)

    def close(self) -> None:
        self._stop.set()
        self._client.close()

    def _reply(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON of one reply, whole and in time."""
        status, headers, raw = self._read("POST", self._set.url.rstrip("/") + path, body)
        if status in AGAIN or status >= 500:
            kind = "busy" if status in BUSY else "broken"
            raise _Again(f"status {status}: {self._said(raw)}", kind, _wait_of(headers.get("retry-after")))
        if status in NOBODY or 300 <= status < 400:
            to = f" to {redacted(headers['location'], 'url')}" if "location" in headers else ""
            self._refused(status, f"status {status}{to}: {self._said(raw)}")
        if status != 200:
            self._answered()  # it is there: something about this request is wrong
            raise Failed(f"status {status}: {self._said(raw)}", of_any=True)
        try:
            return json.loads(raw)
        except ValueError:
            raise _Again(f"a reply that is no JSON, or half of it: {self._said(raw)}", "broken") from None

    def _read(self, method: str, url: str, body: Mapping[str, Any] | None) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content of one reply. Raises _Again."""
        import httpx

        ends, raw = time.monotonic() + self._set.timeout_s, bytearray()
        content = None if body is None else json.dumps(body, default=str)
        try:
            with self._client.stream(method, url, content=content, headers=JSON) as response:
                for part in response.iter_bytes():  # the client's own limit is for one part of it
                    raw += part
                    if time.monotonic() > ends:
                        raise _Again(f"no whole reply within {self._set.timeout_s:g} s", "slow")
                return response.status_code, response.headers, bytes(raw)
        except httpx.RequestError as error:
            absent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            kind = "absent" if absent else "slow" if isinstance(error, httpx.TimeoutException) else "broken"
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise _Again(self._told(reason), kind) from None

    def _refused(self, status: int, reason: str) -> None:
        remedy = NOBODY.get(status, "write the address that it leads to")
        if status in (401, 403) and not self._key:
            remedy = "put the server's key into an environment variable, and name that as key_env"
        rule = "a server that takes our requests"
        raise self._end(
            ScoreError("the server refuses", where=self._where, value=self._told(reason), rule=rule, remedy=remedy)
        )

    def _answered(self) -> None:
        with self._lock:
            self._answered_at, self._in_a_row, self._gone_at = time.monotonic(), 0, math.inf

    def _unanswered(self, trouble: _Again, tries: _Tries) -> Exception:
        """What to raise when a request is given up."""
        with self._lock:
            self._in_a_row += 1
            absent = trouble.kind == "absent" and self._answered_at < tries.failed_at
            nobody = absent or self._in_a_row >= IN_A_ROW
        error = self._no_answer(trouble, tries)
        return self._end(error) if nobody else Failed(f"{trouble}, {_times(tries.count)}", of_any=True, ends=error)

    def _no_answer(self, trouble: _Again, tries: _Tries) -> ScoreError:
        seconds = time.monotonic() - tries.began
        return ScoreError(
            "the server does not answer",
            where=self._where,
            value=f"{trouble} (the last of {tries.count} {'tries' if tries.count > 1 else 'try'} in {seconds:.0f} s)",
            rule=f"a usable reply within {self._set.timeout_s:g} s, once in {self._set.retries + 1} at least",
            remedy=REMEDIES[trouble.kind],
        )

    def _end(self, error: ScoreError) -> ScoreError:
        """All that wait to try again, and all that have not begun, end with the same error."""
        with self._lock:
            self._nobody = self._nobody or error
        self._stop.set()
        return error

    @property
    def _where(self) -> str:
        return f"key {self._place}.url, {self._set.url}"

    def _told(self, text: str, limit: int = 200) -> str:
        """On one line, and without the key, should a server repeat it: taken out before anything is cut."""
        for form in {self._key, json.dumps(self._key)[1:-1], self._key.replace("/", "\\/"), quote(self._key, safe="")}:
            text = text.replace(form, "***") if form else text
        text = " ".join(text.split())
        return text if len(text) <= limit else text[: limit - 1] + "…"

    def _said(self, raw: bytes) -> str:
        """What a server says of an error."""
        text = raw.decode("utf-8", "replace")
        try:
            found = json.loads(text)
            inner = found.get("error", found) if isinstance(found, dict) else found
            text = inner.get("message", text) if isinstance(inner, dict) else str(inner)
        except ValueError:
            pass
        return self._told(str(text), 160) or "nothing"


def _times(count: int) -> str:
    return f"{count} times" if count > 1 else "once"


def _wait_of(header: str | None) -> float:
    """Retry-After: seconds, or a date; 0 where it is neither."""
    try:
        wait = float(header or 0.0)
    except ValueError:
        try:
            wait = (parsedate_to_datetime(header or "") - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return 0.0
    return max(0.0, wait) if math.isfinite(wait) else 0.0
