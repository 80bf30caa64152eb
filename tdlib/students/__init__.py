"""Vision-language models that are finetuned and distilled: one output type, one encoder each.

It owns architectures, how examples become their inputs, and the conversion of published checkpoints.
A new architecture is a module and an entry in ``registry``.
"""
