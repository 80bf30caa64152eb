"""Reads visual entailment from its official files (SNLI-VE, Xie et al. 2019; e-SNLI-VE, Kayser et al. 2021).

The hypothesis (``sentence2``) is read about the Flickr30k picture; the premise caption
(``sentence1``) is no input, as in the task's definition.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tdlib.data.examples import DataError, Example, Examples, Span
from tdlib.data.json_files import Records
from tdlib.data.reading import (
    Located,
    Reader,
    Rows,
    SideFile,
    all_labelled,
    check_answers,
    csv_rows,
    index_records,
    missing_file,
    need,
    picture_boxes,
    relevant_part,
)

log = logging.getLogger(__name__)

# The order of UNITER's label map (its pretrained heads and ours agree on it); others differ:
# LAVIS (contradiction, neutral, entailment), MMF (entailment, neutral, contradiction).
LABELS = ("contradiction", "entailment", "neutral")
IMAGE_FOLDERS = ("flickr30k_images", "flickr30k-images", "images")
# Of the released files (misspelt), of those that the authors' generator writes, and of e-SNLI-VE.
IMAGE_KEYS = ("Flikr30kID", "Flickr30K_ID", "Flickr30kID")


def image_id(record: dict[str, Any], where: str) -> str:
    """Returns the Flickr30k id of a record's picture, under whichever key it has, else from its pairID."""
    for key in IMAGE_KEYS:
        if record.get(key) not in (None, ""):
            name = str(record[key]).strip().removesuffix(".jpg")
            break
    else:
        pair = need(record, "pairID", str, where, "SNLI-VE")
        if ".jpg" not in pair:
            raise DataError(
                f"{where}: no picture: none of {', '.join(IMAGE_KEYS)}, and pairID={pair!r} has no '.jpg'"
            )
        name = pair[: pair.rfind(".jpg")]
    return name


class SnliVeReader(Reader):
    """Reads one split: ``snli_ve_{split}.jsonl``, or ``esnlive_{split}.csv`` of e-SNLI-VE.

    Args:
        folder: holds the files and the pictures, in one of ``IMAGE_FOLDERS``.
        split: "train", "dev" or "test", or a shifted set beside them ("dev_shortcut").
        explained: read e-SNLI-VE's CSV (columns pairID, Flickr30kID, hypothesis, gold_label, ...)
            in place of the JSONL.

    Raises:
        DataError: the folder lacks the split or its pictures.
    """

    what = "SNLI-VE"

    def __init__(self, folder: Path | str, split: str, explained: bool = False):
        self.folder, self.split, self.explained = Path(folder), split, explained
        self.path = self.folder / (f"esnlive_{split}.csv" if explained else f"snli_ve_{split}.jsonl")
        if not self.path.is_file():
            pattern = "esnlive_*.csv" if explained else "snli_ve_*.jsonl"
            raise missing_file(self.path, pattern, f"expected {pattern} for train, dev and test")
        folders = [self.folder / name for name in IMAGE_FOLDERS if (self.folder / name).is_dir()]
        if not folders:
            raise DataError(
                f"{self.folder}: none of the folders {', '.join(IMAGE_FOLDERS)}; unpack Flickr30k's pictures "
                "into one of them (or link it)"
            )
        self.images = folders[0]

    def open(self, report: Callable[[str], None] | None = None) -> Examples:
        records: Located = (
            Rows(self.path, "e-SNLI-VE", ("pairID", "hypothesis"))
            if self.explained
            else Records.lines(self.path, self.what)
        )
        hypothesis_key = "hypothesis" if self.explained else "sentence2"

        def label_of(record: dict[str, Any], pair: str, where: str) -> str | None:
            label = record.get("gold_label") or None  # "" in the CSV files
            if label is not None and label not in LABELS:
                raise DataError(
                    f"{where} ({pair}): gold_label={label!r}, expected one of {', '.join(LABELS)} "
                    "(SNLI's pairs without a consensus, '-', are not part of SNLI-VE: leave them out)"
                )
            return None if label is None else sys.intern(label)

        pairs = index_records(records, "pairID", str, label_of, report)
        labelled = all_labelled(self.path, records, pairs, "gold_label")
        positions = [position for position, _ in pairs.values()]
        strata = [label or "all" for _, label in pairs.values()]
        relevance = SideFile(self.folder / f"snli_ve_{self.split}.relevance.jsonl", "pairID", self.what)

        def make(index: int) -> Example:
            position = positions[index]
            record, where = records[position], records.where(position)
            pair = record["pairID"]
            text = need(record, hypothesis_key, str, f"{where} ({pair})", self.what)
            if not text.strip():
                raise DataError(f"{where} ({pair}): {hypothesis_key} is empty")
            image = self.images / f"{image_id(record, where)}.jpg"
            if not os.path.isfile(image):
                raise DataError(f"{where} ({pair}): {image}: no such picture; unpack Flickr30k again")
            marks = relevance.find(pair, position)
            return Example(
                id=pair, image=image, boxes=(), names=(),
                prompt=relevant_part(text, marks),
                choices=(), label=LABELS.index(strata[index]) if labelled else None, stratum=strata[index],
                relevant_boxes=picture_boxes(marks, image),
            )  # fmt: skip

        return Examples(list(pairs), strata, make, labelled)

    def _doubt(self, example: Example) -> str:
        of_pair, is_picture, _ = example.id.partition(".jpg")
        if not is_picture or of_pair == example.image.stem:
            return ""
        return (
            f"{self.path} ({example.id}): the pair is about picture {of_pair}, but the line names "
            f"{example.image.stem}; are its fields those of another pair?"
        )


# Words that people marked (e-SNLI, Camburu et al. 2018), as relevant spans of the hypothesis.

HIGHLIGHTS = "highlights"
_MARKED = [f"Sentence2_marked_{annotator}" for annotator in (1, 2, 3)]  # train has one, dev and test three


def with_highlights(examples: Sequence[Example], folder: Path) -> list[Example]:
    """Replaces relevant spans and boxes by the words that e-SNLI's annotators highlighted; sets ``truth``.

    The words are looked up by pairID in every ``esnli_*.csv`` in the folder, because SNLI-VE divides SNLI's
    pairs into other splits. Words between stars in ``Sentence2_marked_*`` are highlighted; the files'
    ``Sentence2_Highlighted_*`` are ignored, as their authors advise. A word
    counts if at least half of the annotators of the pair marked it, without the punctuation that was
    highlighted along with it (our reading). A pair that no file has, whose hypothesis has no such
    word, or whose text differs has no relevant span; the number of pairs that differ is logged.
    """
    paths = sorted(folder.glob("esnli_*.csv"))
    if not paths:
        raise DataError(
            f"{folder}: no esnli_*.csv; the highlights are in e-SNLI's esnli_train_1.csv, esnli_train_2.csv, "
            "esnli_dev.csv and esnli_test.csv: put them beside SNLI-VE's files"
        )
    pairs = {example.id for example in examples}
    marked: dict[str, list[str]] = {}
    for path in paths:
        for _, row in csv_rows(path, "e-SNLI", ("pairID", _MARKED[0])):
            if row["pairID"] in pairs:
                marked[row["pairID"]] = [row[name] for name in _MARKED if row.get(name, "").strip()]
    with_truth, different = [], []
    for example in examples:
        spans = highlighted(example.prompt.text, marked.get(example.id, []))
        if spans is None:
            different.append(example.id)
        prompt = replace(example.prompt, relevant=spans or ())
        with_truth.append(replace(example, prompt=prompt, relevant_boxes=(), truth=HIGHLIGHTS))
    if different:
        log.warning(
            "%s: %d of %d pairs have another text than their highlights, which are not used (first: %s)",
            folder, len(different), len(examples), different[0],
        )  # fmt: skip
    return with_truth


def highlighted(text: str, marked: Sequence[str]) -> tuple[Span, ...] | None:
    """Finds the words that at least half of the annotators put between stars; None if a text differs."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    votes = [0] * len(words)
    for annotated in marked:
        theirs = annotated.split()
        plain = [word[1:-1] if _starred(word) else word for word in theirs]
        if plain != [text[start:end] for start, end in words]:
            return None
        for i, word in enumerate(theirs):
            votes[i] += _starred(word)
    chosen = [span for span, count in zip(words, votes, strict=True) if count and 2 * count >= len(marked)]
    return tuple(_without_punctuation(text, span) for span in chosen)


def _starred(word: str) -> bool:
    return len(word) > 2 and word[0] == word[-1] == "*"


def _without_punctuation(text: str, span: Span) -> Span:
    letters = [i for i in range(*span) if text[i].isalnum()]
    return (letters[0], letters[-1] + 1) if letters else span


def check_submission(path: Path, pairs: Sequence[str]) -> list[str]:
    """Lists all faults of a file of predictions for these pairs: a line {"pairID", "label"} for each."""

    def fault(line: dict[str, Any]) -> str:
        label = line.get("label")
        return "" if label in LABELS else f"label={label!r}, expected one of {', '.join(LABELS)}"

    return check_answers(path, Records.lines(path, "SNLI-VE submission"), "pairID", pairs, fault)
