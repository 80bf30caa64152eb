"""Where this process computes: on its GPU, or on the processor."""

import os

import torch


def usual_device() -> str:
    """This process's GPU if there is one, else "cpu".

    Of several processes that train together, each has one of the visible GPUs.
    """
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
