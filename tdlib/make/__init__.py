"""How the mini models under data/models are made, on one processor core each.

``python -m tdlib.make uniter|vilt|vl-bert|visual-bert|clip|detector [--minutes M | --steps N]``

- ``corpus`` prepares arrays on disk: pictures, token ids, region features; makers map them into memory.
- ``students`` is the one maker of the mini students (``kinds`` says what each is, ``pretraining`` what
  it learns); ``clip`` that of the teacher; ``detector`` that of the network behind region features. The
  first two share ``loop``: phases, learning rate, checkpoints.
- ``measure`` says what a written folder knows, through the readers that runs use (``analysis.knowledge``);
  ``page`` makes the tables of data/models/README.md from what is noted beside the weights.
- ``vocabulary`` makes the tokenizers.

The web corpus has all concepts and styles, the curated one some concepts and one style: CLIP learns from
the first, the students' pictures are of the second. Prepared arrays and checkpoints lie under
``--work`` (data/cache/make); the same command continues where an earlier one ended. Two makers of one
thread each are quicker than one of two. Nothing imports this package but tests.
"""
