"""Notebooks executed as runs: plans of batches, engines, workers, states, reports. It loads no torch.

The truth about a run is ``state.json`` in its folder.
"""
