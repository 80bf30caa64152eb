"""CLIP as the teacher: tokens and relevance of pictures and texts, their cache, class probabilities.

It owns everything that knows open_clip's models from inside.
"""
