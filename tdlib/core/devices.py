"""Where this process computes: on its GPU, or on the processor."""

import os

import torch


def usual_device() -> str:
    """This process's GPU if there is one, else "cpu".

    Of several processes that train together, each has one of the visible GPUs.
    """
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
