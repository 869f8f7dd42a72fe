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

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from rayalign.errors import ConfigError, RayalignError
from rayalign.runtime.actors import QUIET
from rayalign.runtime.job_client import LOST, connect

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


def start(client: JobSubmissionClient, folder: Path, arguments: Sequence[str], *, name: str, run_dir: str) -> str:
    """Upload a folder and run `rayalign …` in it, on the head node and without CPUs of its own.

    Returns:
        the job's id.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    environment = dict(ENVIRONMENT)
    if sys.prefix != sys.base_prefix:  # where nodes share our folders, the same environment; else the node's own
        environment["PATH"] = f"{Path(sys.executable).parent}:${{PATH}}"
    try:
        return client.submit_job(
            entrypoint=shlex.join(["python", "-m", "rayalign.cli", *arguments]),
            submission_id=f"{safe}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}",
            runtime_env={"working_dir": str(folder), "env_vars": environment},
            metadata={"job_name": safe, "run_dir": run_dir},
            entrypoint_num_cpus=0,
        )
    except LOST as error:
        raise RayalignError(
            "the cluster did not take the job",
            where=client.get_address(),
            value=str(error),
            remedy="the log of the cluster's dashboard, in the session's folder on the head node, has more",
        ) from error


def follow_job(client: JobSubmissionClient, job_id: str, say: Say) -> int:
    """Show the job's log on stdout until the job ends; a connection that breaks is made again.

    Returns:
        the job's exit code; 130 when it was stopped, and on Ctrl-C, which leaves it running.

    Raises:
        RayalignError: no such job, or no answer for five minutes.
    """
    try:
        _details(client, job_id)
        asyncio.run(_print_log(client, job_id, say))
        return _ended(_details(client, job_id), say)
    except KeyboardInterrupt:
        hint = f"{job_id} --address {client.get_address()}"
        say(f"the job goes on; rayalign logs {hint} follows it again, rayalign stop {hint} ends it")
        return 130


def job_logs(address: str | None, job_id: str, *, follow: bool = True, say: Say = print) -> int:
    """Show a job's log: so far, or until the job ends, and then its exit code is returned."""
    client = connect(address)
    if follow:
        return follow_job(client, job_id, say)
    _details(client, job_id)
    print(client.get_job_logs(job_id), end="")
    return 0


def job_status(address: str | None, job_id: str) -> str:
    """What is known of a job, in a few lines."""
    job = _details(connect(address), job_id)
    lines = [f"job     {job.submission_id}", f"status  {_status(job)}"]
    if run_dir := (job.metadata or {}).get("run_dir"):
        lines.append(f"run     {run_dir}")
    if job.status == JobStatus.FAILED and job.driver_exit_code is None:
        lines.append(f"cause   {_cause(job)}")
    return "\n".join(lines)


def list_jobs(address: str | None) -> str:
    """The cluster's jobs, newest first, a line each."""
    client = connect(address)
    jobs = [job for job in client.list_jobs() if job.type == JobType.SUBMISSION]
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
                remedy=f"look at its log (rayalign logs {job_id}); end the cluster's Ray when nothing else helps",
            )
        time.sleep(0.5)
        with suppress(*LOST):  # said at the limit, if it lasts
            asked = asked or client.stop_job(job_id)  # False: it has not begun yet
            job = _details(client, job_id)
    _ended(job, say)
    return 0


async def _print_log(client: JobSubmissionClient, job_id: str, say: Say) -> None:
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
                value=f"for {_span(RECONNECT_S)}",
                remedy=f"whether the job goes on is not known; rayalign logs {job_id} follows it again",
            )
        await asyncio.sleep(1.0)


async def _lines(client: JobSubmissionClient, job_id: str) -> AsyncIterator[str]:
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


def _details(client: JobSubmissionClient, job_id: str) -> JobDetails:
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
            remedy="`rayalign status` lists its jobs; those of an earlier start of the cluster are gone",
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
