"""Several small runs side by side, one thread each: two cores train two students in the time of one.

Processes are forked, so that they have the prepared data, and the functions that a notebook has registered,
without preparing or importing anything again.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl
_jobs: Sequence[Callable[[], Any]] = ()  # read by the forked processes; closures cannot be pickled


def side_by_side(jobs: Sequence[Callable[[], Any]], workers: int) -> Iterator[tuple[int, Any]]:
    """Does the jobs in as many processes as ``workers`` and the cores allow; yields (number, result).

    Results come as they are ready, and are pickled on their way. What a job changes in memory is lost. The
    first error of a job is raised here, when the jobs that had begun are done.

    Where processes cannot be forked safely (other systems than Linux, a GPU in use) or only one is of use,
    the jobs are done here, in their order.
    """
    global _jobs
    workers = min(workers, len(jobs), len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1)
    if workers < 2 or torch.cuda.is_available():
        for number, job in enumerate(jobs):
            yield number, job()
        return
    _jobs = jobs
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_begin)
    try:
        waiting = {pool.submit(_do, number): number for number in range(len(jobs))}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        _jobs = ()


def _begin() -> None:
    torch.set_num_threads(1)  # a fork loses torch's pool of threads, and each process has one core anyway
    ctypes.CDLL(None).prctl(
        _END_WITH_PARENT, signal.SIGKILL
    )  # else a kernel that is killed leaves it waiting


def _do(number: int) -> Any:
    return _jobs[number]()
