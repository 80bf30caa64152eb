"""Training one student: what it needs, what it minimises, the loop, what it leaves.

In the order of a run: ``prepare`` reads data and fills caches, ``data`` makes batches, ``pipeline`` builds an
example's targets and ``objective`` turns a batch of them into the loss (``repairing`` and ``judging``: with
other pictures, beyond the paper), ``trainer`` does the updates, ``evaluation`` predicts, ``recording`` keeps
what was targeted, and ``run`` joins them into a run folder.
"""
