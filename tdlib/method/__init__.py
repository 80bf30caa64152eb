"""CLIP-TD itself, as functions from tensors to tensors: read this package first.

It owns tokens, alignment, relevance, priors, scores and selection, weights, losses, and the table of
the functions that a user may exchange (``registry``). It knows torch and nothing else of the project.
"""
