"""Training one student: data preparation, the objective, the trainer, checkpoints, what is recorded.

``pipeline`` builds an example's targets and scores from the method's functions; ``objective`` turns
a batch of them into the loss.
"""
