"""A generator of drawn scenes that writes the official files of every task, and captions.

It stands beside the readers, which cannot tell its files from real ones; of the rest it knows only
how files are written and named.
"""
