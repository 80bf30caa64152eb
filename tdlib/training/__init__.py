"""Training one student: what it needs, what it minimises, the loop, what it leaves.

In the order of a run: ``prepare`` reads data and fills caches, ``pipeline`` gathers what an example's targets
are made of, ``data`` makes batches, ``targets`` makes the targets of a batch where the student is, and
``objective`` turns them into the loss (``repairing`` and ``judging``: with other pictures, beyond the paper;
``pools``: what is learned from beside the labelled examples).
``trainer`` does the updates, ``evaluation`` predicts, ``recording`` keeps what was targeted, and ``run``
joins them into a run folder.
"""
