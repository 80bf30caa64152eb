"""Executes notebooks as runs, one or a batch of them. It loads no torch: kernels do.

``template`` reads what a notebook declares, ``checks`` checks values for it, ``notebook`` executes one and
``page`` makes its page. ``plan`` makes runs from a batch file and ``batch`` is the batch; ``runner`` hands
its runs to an engine (``engines``), which starts a ``worker`` process for each. ``states`` reads and writes
the state of a run, ``report`` makes tables and pages. Only ``state.json`` in a run's folder says how it
ended; the notebook does not.
"""
