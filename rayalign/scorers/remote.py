"""Asking a server over HTTP: many requests at once, deadlines, retries with back-off, and a key that is told nobody."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rayalign.errors import ScoreError
from rayalign.record import Record, Unfit, redacted

log = logging.getLogger("rayalign")
T = TypeVar("T")
R = TypeVar("R")
LONGEST_WAIT_S = 60.0  # between two tries, whatever the server asks for
LOCAL = ("localhost", "127.0.0.1", "::1")
NOBODY = {  # answers after which no request of ours would fare better, with what to do about them
    401: "set the environment variable that key_env names to a valid key",
    403: "use a key that may do this, and name its environment variable as key_env",
    404: "correct the url (an OpenAI-compatible one ends with /v1) or the model's name: GET URL/models lists them",
    405: "correct the url: what is there takes no POST",
}
IN_A_ROW = 4  # requests whose tries are used up, and none answered in between: nobody is there
AGAIN = (408, 409, 425, 429)
JSON = {"Content-Type": "application/json"}


class Connection(Record):
    """Where a server is, and how patiently it is asked."""

    url: str = Field(description="address of the server, without a key in it", examples=["http://127.0.0.1:8000/v1"])
    key_env: str | None = Field(
        None,
        description="environment variable that holds the key, a bearer token; the key itself is written nowhere",
        examples=["OPENAI_API_KEY"],
    )
    timeout_s: float = Field(45.0, gt=0, description="longest wait for one whole reply")
    retries: int = Field(
        4, ge=0, description="tries after the first: on no or half a reply, 408, 409, 425, 429 and 5xx"
    )
    backoff_s: float = Field(
        1.0, ge=0, description="wait before the first retry, twice as long before each further one; up to a minute"
    )
    concurrency: int = Field(16, ge=1, description="requests that are open at once, of each scorer actor")

    @model_validator(mode="after")
    def _nothing_secret(self) -> Connection:
        if not _is_address(self.url):
            raise Unfit(
                "this is no address of a server",
                key="url",
                rule="http:// or https://, a host, and the path up to what the server offers",
                remedy="write url: http://127.0.0.1:8000/v1, say",
            )
        if redacted(self.url) != self.url:
            raise Unfit(
                "this address has a password or a key in it",
                key="url",
                rule="an address that may be written to config.yaml and to logs",
                remedy="take it out, put it into an environment variable, and name that as key_env",
            )
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            raise Unfit(
                "this is no name of an environment variable",
                key="key_env",
                rule="letters, digits and underscores: the variable's name, not the key",
                remedy="export MY_KEY=… in the shell, and write key_env: MY_KEY",
            )
        return self


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        return False


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
    """This try failed; the next one may not. `wait_s` is what the server asks for."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


class Caller:
    """Posts JSON to one server. One request whose tries are used up is `Failed`. Several in a row, or one that found
    nobody to connect to, mean that nobody answers: all that is left undone then ends with a ScoreError.

    Args:
        place: the key of the config, for messages.
    """

    def __init__(self, connection: Connection, *, place: str):
        import httpx

        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request otherwise
        self._set, self._place = connection, place
        self._key = _key_of(connection, place)
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
        self._answered_at, self._in_a_row = float("-inf"), 0

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
        import httpx

        began, trouble, wait = time.monotonic(), _Again("not tried"), self._set.backoff_s
        for tried in range(self._set.retries + 1):
            if tried:
                longest = min(LONGEST_WAIT_S, wait if trouble.wait_s is None else max(trouble.wait_s, 0.0))
                self._stop.wait(longest if trouble.wait_s is not None else longest * self._random.uniform(0.5, 1.0))
                wait *= 2
            if self._nobody is not None:
                raise self._nobody
            if self._stop.is_set():
                raise Failed("it was stopped")
            try:
                reply = self._reply(path, body)
            except _Again as again:
                trouble = again
                continue
            except httpx.RequestError as error:
                trouble = _Again(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
                continue
            self._answered()
            return read(reply)
        raise self._unanswered(self._clean(str(trouble)), began)

    def close(self) -> None:
        self._stop.set()
        self._client.close()

    def _reply(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON of one reply, whole and in time."""
        ends, content = time.monotonic() + self._set.timeout_s, json.dumps(body, default=str)
        with self._client.stream("POST", self._set.url.rstrip("/") + path, content=content, headers=JSON) as response:
            raw = bytearray()
            for part in response.iter_bytes():  # the client's own limit is for one part of it
                raw += part
                if time.monotonic() > ends:
                    raise _Again(f"no whole reply within {self._set.timeout_s:g} s")
        status = response.status_code
        if status in AGAIN or status >= 500:
            raise _Again(f"status {status}: {_said(raw)}", _wait_of(response.headers.get("retry-after")))
        if status in NOBODY or 300 <= status < 400:
            to = f" to {redacted(response.headers['location'])}" if "location" in response.headers else ""
            self._refused(status, f"status {status}{to}: {_said(raw)}")
        if status != 200:
            self._answered()  # it is there: something about this request is wrong
            raise Failed(self._clean(f"status {status}: {_said(raw)}"), of_any=True)
        try:
            return json.loads(raw)
        except ValueError:
            raise _Again(f"a reply that is no JSON, or half of it: {_said(raw)}") from None

    def _refused(self, status: int, reason: str) -> None:
        remedy = NOBODY.get(status, "write the address that it leads to")
        if status in (401, 403) and not self._key:
            remedy = "put the server's key into an environment variable, and name that as key_env"
        rule = "a server that takes our requests"
        raise self._end(
            ScoreError("the server refuses", where=self._where, value=self._clean(reason), rule=rule, remedy=remedy)
        )

    def _answered(self) -> None:
        with self._lock:
            self._answered_at, self._in_a_row = time.monotonic(), 0

    def _unanswered(self, reason: str, began: float) -> Exception:
        """What to raise when all tries of a request, the first at `began`, are used up."""
        with self._lock:
            self._in_a_row += 1
            absent = "Connect" in reason and self._answered_at < began
            nobody = absent or self._in_a_row >= IN_A_ROW
        error = self._no_answer(reason)
        if nobody:
            return self._end(error)
        return Failed(f"{reason}, {self._set.retries + 1} times", of_any=True, ends=error)

    def _no_answer(self, reason: str) -> ScoreError:
        tries = self._set.retries + 1
        if "status 429" in reason:
            remedy = "lower concurrency or scorer.count, or raise retries and backoff_s"
        elif "Connect" in reason:
            remedy = "start the server, or correct the url; what was answered before is kept"
        elif "Timeout" in reason or "no whole reply" in reason:
            remedy = "raise timeout_s, or lower concurrency: the server is slow"
        else:
            remedy = "look at the server's log"
        return ScoreError(
            "the server does not answer",
            where=self._where,
            value=f"{reason} (the last of {tries} {'tries' if tries > 1 else 'try'})",
            rule=f"a usable reply within {self._set.timeout_s:g} s, once in {tries} at least",
            remedy=remedy,
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

    def _clean(self, text: str) -> str:
        """Without the key, should a server repeat it."""
        return text.replace(self._key, "***") if self._key else text


def _key_of(connection: Connection, place: str) -> str:
    if connection.key_env is None:
        return ""
    key = os.environ.get(connection.key_env, "").strip()
    if not key:
        raise ScoreError(
            "the key for the server is not there",
            where=f"key {place}.key_env",
            value=f"the environment variable {connection.key_env} is not set, or empty",
            rule="set where scorers run: on a cluster, on each node before `ray start`",
            remedy=f"export {connection.key_env}=… and start again, or take key_env out",
        )
    return key


def _wait_of(header: str | None) -> float | None:
    """Retry-After: seconds, or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _said(raw: bytes | bytearray) -> str:
    """What a server says of an error, on one line."""
    text = bytes(raw[:4000]).decode("utf-8", "replace")
    try:
        found = json.loads(text)
        inner = found.get("error", found) if isinstance(found, dict) else found
        text = inner.get("message", text) if isinstance(inner, dict) else str(inner)
    except ValueError:
        pass
    text = " ".join(str(text).split())
    return (text if len(text) <= 160 else text[:159] + "…") or "nothing"
