"""CLIP as the teacher: its tokens and relevance for pictures and texts, their verified cache, class probabilities.

It owns everything that knows open_clip's models from inside.
"""
