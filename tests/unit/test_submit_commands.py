"""What `submit`, `status`, `logs` and `stop` say, with no cluster or one that does not answer as it should."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from rayalign.errors import RayalignError
from rayalign.runtime.job_client import connect
from rayalign.runtime.jobs import job_logs, job_status, leave, list_jobs, new_id, say_commands, start, stop_job
from rayalign.submit import submit

VERSION = b'{"version": "4", "ray_version": "2.0.0", "ray_commit": "x", "session_name": "s"}'


@contextmanager
def server(answer: Callable[[bytes], bytes]) -> Iterator[str]:
    """The address of a job server that gives these answers to requests, each on a connection of its own."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(answer(connection.recv(65536)))

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def http(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def broken(request: bytes) -> bytes:
    """A dashboard that is there while nothing behind it works."""
    return http("200 OK", VERSION) if b"/api/version" in request else http("500 Error", b"the agent is gone")


@pytest.fixture
def nobody(monkeypatch):
    """No token and no address in the environment."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def test_commands_stand_whole_on_lines_of_their_own_with_the_address_as_it_was_written(nobody, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with server(broken) as address:
        job = new_id("a run of a name that is rather long, too long for a line of a narrow terminal")
        for given in (address, f"http://{address}/?a=1&b=$HOME"):
            said: list[str] = []
            say_commands(connect(given), job, said.append)
            assert [shlex.split(line) for line in said] == [
                ["rayalign", verb, job, "--address", given] for verb in ("logs", "status", "stop")
            ]
        assert f"'{given}'" in said[0]
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert connect(None).command("status") == f"rayalign status --address {address}"


def test_an_id_is_one_word_that_no_command_takes_for_an_option():
    for name, begins in (("my run", "my-run-2"), ("-x", "x-2"), ("Ü", "run-2"), ("a;b", "a-b-2")):
        job = new_id(name)
        assert job.startswith(begins)
        assert shlex.quote(job) == job != new_id(name)


def test_every_request_that_fails_has_place_value_rule_and_remedy(nobody, tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    with server(broken) as address:
        begin = lambda: start(connect(address), tmp_path, ["train"], job_id="a", run_dir="/a")  # noqa: E731
        calls = [lambda: job_status(address, "a"), lambda: list_jobs(address), lambda: stop_job(address, "a"), begin]
        calls += [lambda follow=follow: job_logs(address, "a", follow=follow) for follow in (True, False)]
        for call in calls:
            with pytest.raises(RayalignError) as error:
                call()
            first, *others = str(error.value).splitlines()
            assert first.startswith(f"http://{address}: the cluster did not ")
            assert [line[:10] for line in others] == ["  found:  ", "  rule:   ", "  remedy: "]
            assert "500" in others[0]
    with pytest.raises(RayalignError) as error:
        connect(address)
    assert [line[:10] for line in str(error.value).splitlines()[1:]] == ["  found:  ", "  rule:   ", "  remedy: "]


def test_ctrl_c_before_the_job_goes_out_says_that_none_was_submitted(nobody, make):
    def interrupt(request: bytes) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.5)  # the request is still open
        return b""

    said: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with server(interrupt) as address:
            assert submit(make(), name="my", address=address, say=said.append) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert said == ["no job was submitted"]


def test_ctrl_c_afterwards_says_that_the_job_goes_on_and_how_to_end_it(nobody):
    with server(broken) as address:
        for known, words in ((True, "goes on"), (False, "may have been submitted")):
            said: list[str] = []
            assert leave(connect(address), "my-1", said.append, known=known) == 130
            assert words in said[0]
            assert said[-1] == f"  rayalign stop my-1 --address {address}"
