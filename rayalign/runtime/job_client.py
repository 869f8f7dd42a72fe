"""Connecting to a cluster's job server: its address, this user's token, and what is said when it does not answer."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from rayalign.errors import ConfigError, RayalignError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TIMEOUTS_S = (5.0, 60.0)  # to connect, and to answer one request
LOST = (OSError, RuntimeError, aiohttp.ClientError)  # what a connection that breaks raises, in Ray's client too

for _name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # they tell of every request


class Client(JobSubmissionClient):
    """Ray's client, every request of which has a deadline.

    Attributes:
        given: the address as the user wrote it; "" for this machine's.
        sent: whether the request that submits a job has gone out.
    """

    given = ""
    sent = False

    def command(self, verb: str, *arguments: str) -> str:
        """The command line that does this on the same cluster, as a shell takes it."""
        return shlex.join(["rayalign", verb, *arguments, *(["--address", self.given] if self.given else [])])

    def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
        self.sent = self.sent or (method, endpoint) == ("POST", "/api/jobs/")
        return super()._do_request(method, endpoint, **{"timeout": TIMEOUTS_S, **arguments})


def connect(address: str | None) -> Client:
    """A client of the job server at this address, or RAY_ADDRESS, or on this machine.

    Raises:
        ConfigError: nothing answers there, or it does not take our token.
    """
    given = address or os.environ.get("RAY_ADDRESS") or ""
    url = _url(given or DEFAULT_ADDRESS)
    token, place = _token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    outside = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # else RAY_ADDRESS would win over the address that is given
    try:
        client = Client(url, headers=headers)
    except AuthenticationError:
        raise ConfigError(
            "the cluster does not take this token" if token else "the cluster wants a token, and there is none here",
            where="--address",
            value=f"{url}; token: {place}",
            rule="the same token as on the cluster's head node, by default in ~/.ray/auth_token there",
            remedy="mkdir -p ~/.ray && scp HEAD:.ray/auth_token ~/.ray/auth_token (or name a copy in "
            "RAY_AUTH_TOKEN_PATH)",
        ) from None
    except (*LOST, ValueError, KeyError) as error:
        raise ConfigError(
            "no Ray job server answers there",
            where="--address",
            value=url,
            rule="the dashboard of a running cluster: http://HEAD:8265 (6379 is another port, for placement.address)",
            remedy="start one: bash launch/ray_cluster.sh head, or ray start --head (with --dashboard-host=0.0.0.0 "
            f"when other machines submit); {type(error).__name__}",
        ) from error
    finally:
        if outside is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = outside
    client.given = given
    return client


@contextmanager
def answered(client: Client, what: str = "the cluster did not answer") -> Iterator[None]:
    """Inside, a request that fails raises RayalignError."""
    try:
        yield
    except (*LOST, AuthenticationError) as error:
        raise RayalignError(
            what,
            where=client.get_address(),
            value=f"{type(error).__name__}: {error}",
            rule=f"a job server that takes each request within {TIMEOUTS_S[1]:g} s",
            remedy="try it again; logs/dashboard.log in the folder of the cluster's session on the head node has more",
        ) from error


def _url(address: str) -> str:
    if address == "auto":
        return DEFAULT_ADDRESS
    if "://" not in address:
        address = f"http://{address}" if ":" in address else f"http://{address}:8265"
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            "jobs are submitted to a cluster's dashboard",
            where="--address",
            value=address,
            rule="http://HEAD:8265",
            remedy="ray://… and HEAD:6379 are for placement.address with `rayalign train`",
        )
    return address.rstrip("/")


def _token() -> tuple[str, str]:
    """This user's token of Ray clusters ("": none, or switched off), and where it is from."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return "", f"switched off by RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip(), "of RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    try:
        return Path(path).expanduser().read_text().strip(), f"of {path}"
    except (OSError, UnicodeDecodeError):
        return "", f"none in {path}"
