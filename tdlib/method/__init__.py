"""CLIP-TD itself, as functions from tensors to tensors: read ``clip_td`` first.

``clip_td`` names the steps in their order and calls them. The package owns tokens, alignment, relevance,
priors, scores and selection, weights, losses, re-pairing, further terms, and the tables of the functions
that a user may exchange (``registry``). It knows torch and nothing else of the project.
"""
