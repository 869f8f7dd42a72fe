"""Where a server is, how patiently it is asked, and its key, which is told nobody but the server."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rayalign.errors import ConfigError
from rayalign.record import Record, Unfit, redacted


class Connection(Record):
    """Where a server is, and how patiently it is asked."""

    url: str = Field(description="address of the server, without a key in it", examples=["http://127.0.0.1:8000/v1"])
    key_env: str | None = Field(
        None,
        description="environment variable that holds the key, a bearer token; the key itself is written nowhere",
        examples=["OPENAI_API_KEY"],
    )
    revision: str | None = Field(
        None,
        description="name or version of what answers there: kept replies are of this one alone, wherever it runs",
        examples=["2026-11-01"],
    )
    timeout_s: float = Field(
        45.0, gt=0, description="longest wait for a reply to begin, for its next part, and, looked at then, for all"
    )
    retries: int = Field(4, ge=0, description="tries after the first: on half or no reply, 408, 409, 425 and 5xx")
    patience_s: float = Field(
        240.0,
        ge=0,
        description="how long a server that answered before and is gone is waited for, or one that says 429, 502 or "
        "503; keep it below the scorer's deadline_s",
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
        if redacted(self.url, "url") != self.url or urlsplit(self.url).query:
            raise Unfit(
                "this address has a password or a key in it, or what may be one",
                key="url",
                rule="an address that may be written to config.yaml and to logs, without user:password@ and ?…",
                remedy="take it out, put it into an environment variable, and name that as key_env",
            )
        if self.key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_env):
            raise Unfit(
                "this is no name of an environment variable",
                key="key_env",
                rule="capital letters, digits and underscores: the variable's name, not the key",
                remedy="export MY_KEY=… in the shell, and write key_env: MY_KEY",
            )
        return self


def _is_address(url: str) -> bool:
    import httpx

    try:
        parts = urlsplit(url)
        httpx.URL(url)
        there = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, httpx.InvalidURL):  # a port, or a host, that is none
        return False
    return there and not re.search(r"\s", url)


def key_of_server(connection: Connection, place: str) -> str:
    """The key, "" where there is none to send.

    Args:
        place: the key of the config, for messages.

    Raises:
        ConfigError: the environment variable is not set here, or holds what is no key.
    """
    if connection.key_env is None:
        return ""
    key = os.environ.get(connection.key_env, "").strip()
    if not key:
        raise ConfigError(
            "the key for the server is not there",
            where=f"key {place}.key_env",
            value=f"the environment variable {connection.key_env} is not set, or empty",
            rule="set where scorers run: on a cluster, on each node before `ray start`",
            remedy=f"export {connection.key_env}=… and start again, or take key_env out",
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(
            "the key for the server cannot be sent",
            where=f"key {place}.key_env",
            value=f"the environment variable {connection.key_env} holds white space, or what is not ASCII",
            rule="one key, on one line",
            remedy=f"export {connection.key_env}=… again, with the key alone",
        )
    return key
