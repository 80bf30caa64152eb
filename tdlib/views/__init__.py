"""What a person looks at: HTML and figures of targets, runs, attention; the explorer and its widgets.

It owns no numbers: they come from records and from ``analysis``.
"""
