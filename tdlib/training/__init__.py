"""Trains one student, from a configuration to a run folder.

In the order of a run: ``prepare`` reads the data and fills the teacher's cache, ``pipeline`` reads the
teacher's features of an example, ``data`` makes batches, ``targets`` computes the targets of a batch on the
student's device, and ``objective`` turns them into the loss. ``repairing`` and ``judging`` add terms with
other pictures (beyond the paper), ``pools`` the examples and pictures that are used without their labels.
``trainer`` does the updates, ``evaluation`` predicts, ``recording`` keeps which tokens were targeted, and
``run`` joins all of this; ``run_folders`` recognises finished runs, ``processes`` and ``distributed`` share
one run among several GPUs.
"""
