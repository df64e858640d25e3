"""Waiting for all of submitit's jobs, whatever becomes of one. Needs the extra `launchers`."""

from collections.abc import Iterator
from contextlib import contextmanager

from submitit import Job, SlurmJob
from submitit.core.utils import UncompletedJobError
from submitit.slurm.slurm import SlurmInfoWatcher


class SqueueWatcher(SlurmInfoWatcher):
    """Asks squeue, not sacct, which knows nothing on a cluster without accounting: a job that has left the queue is
    over, with a result or without."""

    def _make_command(self) -> list[str] | None:
        waited_for = self._registered - self._finished
        return ["squeue", "--me", "--array", "--noheader", "--format=%i"] if waited_for else None

    def read_info(self, string: str | bytes) -> dict[str, dict[str, str]]:
        listed = (string if isinstance(string, str) else string.decode()).split()
        return {job: {"State": "RUNNING" if job in listed else "COMPLETED"} for job in self._registered}


@contextmanager
def wait_for_every_job() -> Iterator[None]:
    """Make submitit wait for every job: a job that died yields None as its result instead of ending the wait."""
    results, watcher = Job.results, SlurmJob.watcher

    def get_results(job: Job) -> list:
        try:
            return results(job)
        except UncompletedJobError:
            return [None]

    Job.results, SlurmJob.watcher = get_results, SqueueWatcher(delay_s=60)
    try:
        yield
    finally:
        Job.results, SlurmJob.watcher = results, watcher
