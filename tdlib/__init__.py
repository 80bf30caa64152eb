"""The library behind the notebooks of the CLIP-TD workbench. A map, lowest floor first:

core        whole files, paths, identities, records of targets
method      CLIP-TD itself: tokens to loss, tensor functions only. **Read ``method.clip_td`` first**,
            then ``training.targets`` and ``training.objective``, which call it
data        examples, the tasks' official files, metrics, shifts
miniworld   the generator of small data in those same files
teacher     CLIP: tokens, relevance, cache, class probabilities
regions     region features
students    UNITER, VL-BERT, VisualBERT, ViLT, CLIP as students
training    one training run: prepare, objective, trainer, checkpoints
runs        notebooks as runs, batches of them, engines
analysis    statistics, comparisons, measures of targeting
views       pages, figures, explorer
make        what made the mini models

``config`` holds every parameter of a run and ``arms`` the named settings of a comparison; ``cli`` is the
command. A package imports from those above it in this list and never from those below.
"""
