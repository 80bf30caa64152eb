"""A generator of drawn scenes that writes the official files of every task, and captions.

The readers in ``data`` read its files as they read real ones. It draws on ``data`` only for the names and
formats of files, and knows no model.
"""
