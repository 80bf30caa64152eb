"""Region features of pictures: computed by a backbone and cached, or read from published files.

``computed`` defines what regions are; ``sources`` opens the ones that a run names, by ``specs``.
"""
