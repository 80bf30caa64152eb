"""Makes the mini models under data/models, on one processor core each.

``python -m tdlib.make uniter|vilt|vl-bert|visual-bert|clip|detector [--minutes M | --steps N]``

- ``corpus`` prepares arrays on disk: pictures, token ids, region features; makers map them into memory.
- ``students`` is the one maker of the mini students (``kinds`` describes each, ``pretraining`` is what
  they learn); ``clip`` makes the teacher, ``detector`` the network behind region features. The first two
  share ``loop``: phases, learning rate, checkpoints.
- ``measure`` measures what a written folder knows, through the readers that runs use
  (``analysis.knowledge``); ``page`` makes the tables of data/models/README.md from each ``provenance.json``.
- ``vocabulary`` makes the tokenizers.

The web corpus has all concepts and styles, the curated one some concepts and one style: CLIP learns from
the first, the students see pictures of the second. Prepared arrays and checkpoints lie under
``--work`` (data/cache/make); the same command continues where an earlier one ended, unless makers' or
students' code has changed since (the detector, minutes of work, has no checkpoint). Two makers with one
thread each are faster than one with two. Only tests import this package.
"""
