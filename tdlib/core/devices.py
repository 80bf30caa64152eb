"""Where this process computes: on its GPU, or on the processor; and how many cores it may use."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")

MOST_WORKERS = 8


def usual_device() -> str:
    """This process's GPU if there is one, else "cpu".

    Of several processes that train together, each has one of the visible GPUs.
    """
    import torch  # not above: who counts cores needs none

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(make: Callable[[Given], Made], given: Sequence[Given]) -> list[Made]:
    """``make`` of each, in order, by a thread per core: for work that frees Python's lock, as decoding."""
    threads = min(MOST_WORKERS, usable_cores(), len(given))
    if threads < 2:
        return [make(one) for one in given]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(make, given))


def usual_workers(processes: int = 1) -> int:
    """How many processes should make batches for each of ``processes`` that train on this machine.

    None where there is no GPU (the training itself uses every core) or there are fewer than four cores.
    """
    import torch

    cores = usable_cores()
    if not torch.cuda.is_available() or cores < 4:
        return 0
    return min(MOST_WORKERS, max(1, cores // processes - 1))
