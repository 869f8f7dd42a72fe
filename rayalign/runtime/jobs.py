"""Jobs on a running cluster, by Ray's Jobs API: start, follow, look, stop."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ray.job_submission import JobDetails, JobStatus, JobType

from rayalign.errors import ConfigError, RayalignError
from rayalign.runtime.actors import QUIET
from rayalign.runtime.job_client import LOST, Client, answered, connect

SILENCE_S = 20.0  # without a line of the log, after which the cluster is asked whether the job still runs
RECONNECT_S = 300.0
STOP_S = 300  # for the step that is going on and its checkpoint; after that Ray kills the job
ENVIRONMENT = {
    **QUIET,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
}
Say = Callable[[str], None]


def new_id(name: str) -> str:
    """A job's id, which no other job has, begins with the name, and is one plain word of a shell."""
    safe = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-") or "run"
    return f"{safe}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


def start(client: Client, folder: Path, arguments: Sequence[str], *, job_id: str, run_dir: str) -> None:
    """Upload a folder and run `rayalign …` in it, on the head node and without CPUs of its own.

    Raises:
        RayalignError: the cluster does not take it.
    """
    environment = dict(ENVIRONMENT)
    if sys.prefix != sys.base_prefix:  # where nodes share our folders, the same environment; else the node's own
        environment["PATH"] = f"{Path(sys.executable).parent}:${{PATH}}"
    with answered(client, "the cluster did not take the job"):
        client.submit_job(
            entrypoint=shlex.join(["python", "-m", "rayalign.cli", *arguments]),
            submission_id=job_id,
            runtime_env={"working_dir": str(folder), "env_vars": environment},
            metadata={"run_dir": run_dir},
            entrypoint_num_cpus=0,
        )


def follow_job(client: Client, job_id: str, say: Say) -> int:
    """Show the job's log on stdout until the job ends; a connection that breaks is made again.

    Returns:
        the job's exit code; 130 when it was stopped, and on Ctrl-C, which leaves it running.

    Raises:
        RayalignError: no such job, or no answer for five minutes.
    """
    try:
        with answered(client):
            _details(client, job_id)
        asyncio.run(_print_log(client, job_id, say))
        with answered(client):
            return _ended(_details(client, job_id), say)
    except KeyboardInterrupt:
        return leave(client, job_id, say)


def leave(client: Client, job_id: str, say: Say, *, known: bool = True) -> int:
    """Say on Ctrl-C what becomes of the job. `known`: whether the cluster has said that it has it. Returns 130."""
    say(
        "the job goes on; to follow it again or end it:"
        if known
        else "the job may have been submitted; to see, or end it:"
    )
    say_commands(client, job_id, say, ("logs" if known else "status", "stop"))
    return 130


def say_commands(client: Client, job_id: str, say: Say, verbs: Sequence[str] = ("logs", "status", "stop")) -> None:
    """Each on a line of its own, to be copied whole."""
    for verb in verbs:
        say(f"  {client.command(verb, job_id)}")


def job_logs(address: str | None, job_id: str, *, follow: bool = True, say: Say = print) -> int:
    """Show a job's log: so far, or until the job ends, and then its exit code is returned."""
    client = connect(address)
    if follow:
        return follow_job(client, job_id, say)
    with answered(client):
        _details(client, job_id)
        log = client.get_job_logs(job_id)
    print(log, end="")
    return 0


def job_status(address: str | None, job_id: str) -> str:
    """What is known of a job, in a few lines."""
    client = connect(address)
    with answered(client):
        job = _details(client, job_id)
    lines = [f"job     {job.submission_id}", f"status  {_status(job)}"]
    if run_dir := (job.metadata or {}).get("run_dir"):
        lines.append(f"run     {run_dir}")
    if job.status == JobStatus.FAILED and job.driver_exit_code is None:
        lines.append(f"cause   {_cause(job)}")
    return "\n".join(lines)


def list_jobs(address: str | None) -> str:
    """The cluster's jobs, newest first, a line each."""
    client = connect(address)
    with answered(client):
        listed = client.list_jobs()
    jobs = [job for job in listed if job.type == JobType.SUBMISSION]
    rows = [
        (str(job.submission_id), _status(job), (job.metadata or {}).get("run_dir", ""))
        for job in sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else []
    lines = [f"{job:{widths[0]}}  {status:{widths[1]}}  {run_dir}".rstrip() for job, status, run_dir in rows]
    return "\n".join(lines) or f"no job was submitted to {client.get_address()} yet"


def stop_job(address: str | None, job_id: str, *, say: Say = print) -> int:
    """Stop a job and wait until it has ended: its step is finished and a checkpoint written first.

    Returns:
        0, also when it had ended before.

    Raises:
        RayalignError: no such job, or it did not end.
    """
    client = connect(address)
    with answered(client):
        job = _details(client, job_id)
    if job.status.is_terminal():
        say(f"job {job_id} had ended before: {_status(job)}")
        return 0
    say(f"stopping job {job_id} after this step and a checkpoint, in {_span(STOP_S)} at most")
    asked, limit = False, time.monotonic() + STOP_S + 60
    while not job.status.is_terminal():
        if time.monotonic() > limit:
            raise RayalignError(
                "the job has not ended",
                where=job_id,
                value=_status(job),
                rule=f"at most {_span(STOP_S)} after it was asked to",
                remedy=f"look at its log: {client.command('logs', job_id)}; end the cluster's Ray if nothing helps",
            )
        time.sleep(0.5)
        with suppress(*LOST):  # said at the limit, if it lasts
            asked = asked or client.stop_job(job_id)  # False: it has not begun yet
            job = _details(client, job_id)
    _ended(job, say)
    return 0


async def _print_log(client: Client, job_id: str, say: Say) -> None:
    """Print what is new in the log until the job has ended."""
    printed, answered, lost = 0, time.monotonic(), False
    while True:
        received = 0
        try:
            async for text in _lines(client, job_id):
                answered = time.monotonic()
                if lost:
                    say("the cluster answers again")
                lost = False
                sys.stdout.write(text[max(0, printed - received) :])  # a new connection starts at the beginning
                sys.stdout.flush()
                received += len(text)
                printed = max(printed, received)
            if (await asyncio.to_thread(_details, client, job_id)).status.is_terminal():
                return
        except LOST as error:
            if not lost:
                say(f"the cluster does not answer ({type(error).__name__}); the job goes on, trying again")
            lost = True
        if time.monotonic() - answered > RECONNECT_S:
            raise RayalignError(
                "the cluster does not answer",
                where=client.get_address(),
                value=f"no answer for {_span(RECONNECT_S)}; whether the job goes on is not known",
                rule="the log of a job comes from a cluster that can be reached",
                remedy=f"follow it again when it can be: {client.command('logs', job_id)}",
            )
        await asyncio.sleep(1.0)


async def _lines(client: Client, job_id: str) -> AsyncIterator[str]:
    """Pieces of the log as they come, "" for every while in which none came and the cluster answered.

    Ray's own iterator would wait for ever on a connection whose other side is gone.
    """
    pieces = client.tail_job_logs(job_id)
    ended = False
    piece = asyncio.ensure_future(anext(pieces))
    try:
        while True:
            while not (await asyncio.wait({piece}, timeout=SILENCE_S))[0]:
                if ended:
                    return
                ended = (await asyncio.to_thread(_details, client, job_id)).status.is_terminal()
                yield ""
            try:
                yield piece.result()
            except StopAsyncIteration:
                return
            piece = asyncio.ensure_future(anext(pieces))
    finally:
        piece.cancel()


def _details(client: Client, job_id: str) -> JobDetails:
    """Raises ConfigError when the cluster knows no such job."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
        raise ConfigError(
            "there is no such job",
            where="JOB",
            value=job_id,
            rule=f"a job of the cluster at {client.get_address()}",
            remedy=f"{client.command('status')} lists its jobs; those of an earlier start of the cluster are gone",
        ) from None


def _ended(job: JobDetails, say: Say) -> int:
    """Says how a job ended, and gives its exit code."""
    say(f"job {job.submission_id} {_status(job)}")
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return 130
    if job.driver_exit_code is None:
        say(_cause(job))
    return _code(job)


def _code(job: JobDetails) -> int:
    """Of a failed job, as a shell would give it: 128 and its number for a signal, 1 when Ray knows none."""
    code = job.driver_exit_code or 1
    return code if code > 0 else 128 - code


def _status(job: JobDetails) -> str:
    """For instance "failed with exit code 2 after 3 min 12 s"."""
    words = job.status.value.lower()
    if job.status == JobStatus.FAILED and job.driver_exit_code is not None:
        words += f" with exit code {_code(job)}"
    end = (job.end_time or time.time() * 1000) / 1000
    took = _span(max(0.0, end - (job.start_time or 0) / 1000))
    return f"{words} {'after' if job.status.is_terminal() else 'for'} {took}"


def _cause(job: JobDetails) -> str:
    """The end of Ray's message, where the cause stands, in a line."""
    lines = [line.strip() for line in (job.message or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "the cluster gave no cause"


def _span(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes and seconds else f"{minutes} min" if minutes else f"{seconds} s"
