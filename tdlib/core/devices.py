"""Chooses the device that this process computes on, and how many cores and workers it uses."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_WORKERS = 8  # of threads, and of loader processes, however many cores there are


def usual_device() -> str:
    """This process's GPU if there is one, else "cpu".

    Of several processes that train together, each has one of the visible GPUs.
    """
    import torch  # here, because counting cores must not load it

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def usable_cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(make: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Calls ``make`` on each item, a thread per core, for work that frees Python's lock such as decoding."""
    threads = min(MOST_WORKERS, usable_cores(), len(items))
    if threads < 2:
        return [make(one) for one in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(make, items))


def usual_workers(processes: int = 1) -> int:
    """Counts the loader processes for each of ``processes`` that train on this machine.

    0 where there is no GPU (the training itself uses every core) or there are fewer than four cores.
    """
    import torch

    cores = usable_cores()
    if not torch.cuda.is_available() or cores < 4:
        return 0
    return min(MOST_WORKERS, max(1, cores // processes - 1))
