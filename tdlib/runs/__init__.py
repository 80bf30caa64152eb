"""Notebooks executed as runs, one or a batch of them. It loads no torch: kernels do.

``template`` reads what a notebook declares and ``checks`` what is wrong with values for it; ``notebook``
executes one and ``page`` makes its page. ``plan`` makes runs of a batch file, ``batch`` is the batch,
``runner`` hands its runs to an engine (``engines``), which starts a ``worker`` process for each; ``states``
knows how a run stands and ``report`` makes tables and pages. The truth about a run is ``state.json`` in its
folder, not the notebook.
"""
