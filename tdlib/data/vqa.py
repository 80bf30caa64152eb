"""Reads VQA from its official files: VQA v2 (Goyal et al. 2017), VQA-CP v2 (Agrawal et al. 2018).

A question's label is an index into an answer vocabulary; evaluation compares answer strings with
those of the annotators, even if these are not in the vocabulary.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdlib.data.examples import DataError, Example, Examples
from tdlib.data.json_files import Records
from tdlib.data.reading import (
    Reader,
    SideFile,
    index_records,
    missing_file,
    need,
    picture_boxes,
    relevant_part,
)
from tdlib.data.vqa_metric import Vocabulary, normalise

_ANSWER_TYPES = ("yes/no", "number", "other")


def files(folder: Path, split: str, changing_priors: bool = False) -> tuple[Path, Path]:
    """Returns the paths of a split's questions and annotations.

    Args:
        folder: the data set.
        split: for VQA v2 "train2014", "val2014", "test2015", "test-dev2015", or a shifted set beside
            them ("val2014_prior"); for VQA-CP "train" or "test".
        changing_priors: VQA-CP in place of VQA.
    """
    if changing_priors:
        stem = f"vqacp_v2_{split}"
        return folder / f"{stem}_questions.json", folder / f"{stem}_annotations.json"
    return (
        folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
        folder / f"v2_mscoco_{split}_annotations.json",
    )


def image_file(folder: Path, subtype: str, image_id: int) -> Path:
    """Returns a COCO picture's path: test-dev2015 uses those of test2015, a shifted set its source's."""
    subtype = subtype.partition("_")[0].replace("test-dev", "test")
    return folder / subtype / f"COCO_{subtype}_{image_id:012d}.jpg"


def _records(path: Path, key: str, changing_priors: bool) -> Records:
    return Records.entries(path, None if changing_priors else key, "VQA-CP" if changing_priors else "VQA")


def build_vocabulary(folder: Path, split: str, minimum: int = 9, changing_priors: bool = False) -> Vocabulary:
    """Collects what is, normalised, the ``multiple_choice_answer`` of enough questions of a split.

    As compute_softscore.py does, which removes commas afterwards; there are none left. Ordered by first
    occurrence (the original's order was that of a Python 2 dict), so the labels depend on the order of the
    questions, and on nothing else. With train and val together it would be the 3,129 of Teney et al. (2018).
    """
    annotations = _records(files(folder, split, changing_priors)[1], "annotations", changing_priors)
    counts: Counter[str] = Counter()
    for index, record in enumerate(annotations):
        where = annotations.where(index)
        counts[normalise(need(record, "multiple_choice_answer", str, where, annotations.what))] += 1
    kept = tuple(answer for answer, count in counts.items() if count >= minimum)
    if not kept:
        raise DataError(
            f"{annotations.path}: no answer occurs {minimum} times; lower the minimum or use more data"
        )
    return Vocabulary(kept)


class VqaReader(Reader):
    """Reads one split of VQA v2 or VQA-CP v2.

    Args:
        folder: holds the JSON files and the picture folders (train2014/, val2014/, test2015/).
        split: see ``files``.
        vocabulary: the answers from which models choose; without it no example has a label.
        changing_priors: VQA-CP, whose files are plain lists and name each picture's folder.

    Raises:
        DataError: the folder lacks the split's questions, or a labelled split its annotations.
    """

    what = "VQA"

    def __init__(
        self,
        folder: Path | str,
        split: str,
        vocabulary: Vocabulary | None = None,
        changing_priors: bool = False,
    ):
        self.folder, self.split, self.vocabulary = Path(folder), split, vocabulary
        self.changing_priors = changing_priors
        self.path, self.annotations = files(self.folder, split, changing_priors)
        self.what = "VQA-CP" if changing_priors else "VQA"
        if not self.path.is_file():
            expected = f"expected {self.what}'s questions and annotations as published"
            raise missing_file(self.path, "*.json", expected)
        if not self.annotations.is_file() and not split.startswith("test-") and split != "test2015":
            raise DataError(
                f"{self.annotations}: no such file; only test2015 and test-dev2015 come without annotations"
            )

    def open(self, report: Callable[[str], None] | None = None) -> Examples:
        questions = _records(self.path, "questions", self.changing_priors)
        labelled = self.annotations.is_file()
        answered: dict[int, tuple[int, str]] = {}
        if labelled:
            annotations = _records(self.annotations, "annotations", self.changing_priors)
            answered = index_records(
                annotations, "question_id", int,
                lambda record, _, where: sys.intern(need(record, "question_type", str, where, self.what)),
                report,
            )  # fmt: skip

        def stratum(record: dict[str, Any], identifier: int, where: str) -> str:
            if labelled and identifier not in answered:
                raise DataError(
                    f"{where}: question_id {identifier} has no annotation in {self.annotations}; "
                    "files of different releases?"
                )
            return answered[identifier][1] if labelled else "all"

        asked = index_records(questions, "question_id", int, stratum, report)
        if not asked:
            raise DataError(f"{self.path}: the file has no questions; copy it again")
        if extra := len(answered.keys() - asked.keys()):
            problem = (
                f"{self.annotations}: {extra} annotations of questions that are not in {self.path.name}; "
                "files of different releases?"
            )
            if report is None:
                raise DataError(problem)
            report(problem)
        positions = [position for position, _ in asked.values()]
        strata = [kind for _, kind in asked.values()]
        places = [answered[identifier][0] for identifier in asked] if labelled else []
        stem = self.annotations.stem.removesuffix("_annotations")
        relevance = SideFile(self.folder / f"{stem}.relevance.jsonl", "question_id", self.what)

        def make(index: int) -> Example:
            position = positions[index]
            question = questions[position]
            annotation = None
            if labelled:
                annotation = annotations[places[index]], annotations.where(places[index])
            marks = relevance.find(question["question_id"], position)
            return self._example(question, questions.where(position), annotation, marks, strata[index])

        return Examples([str(identifier) for identifier in asked], strata, make, labelled)

    def _doubt(self, example: Example) -> str:
        count = len(example.annotators)
        if not 0 < count < 4:
            return ""
        return (
            f"{self.annotations} ({example.id}): answers of {count} people, expected ten; with fewer than "
            "four no answer is wholly right, because each person's is compared with the others' and three "
            "count as 1"
        )

    def _example(
        self,
        question: dict[str, Any],
        where: str,
        annotation: tuple[dict[str, Any], str] | None,
        marks: tuple[dict[str, Any], str] | None,
        stratum: str,
    ) -> Example:
        where = f"{where} ({question['question_id']})"
        text = need(question, "question", str, where, self.what)
        if not text.strip():
            raise DataError(f"{where}: the question is empty")
        image_id = need(question, "image_id", int, where, self.what)
        subtype = self.split
        if self.changing_priors:
            subtype = need(question, "coco_split", str, where, self.what)
            if subtype not in ("train2014", "val2014"):
                raise DataError(f"{where}: coco_split={subtype!r}, expected train2014 or val2014")
        image = image_file(self.folder, subtype, image_id)
        if not os.path.isfile(image):
            raise DataError(f"{where}: {image}: no such picture; unpack COCO's {image.parent.name} there")
        answers: tuple[str, ...] = ()
        kind, soft = "", {}
        if annotation is not None:
            answers, kind = self._answers(*annotation, image_id)
            soft = self.vocabulary.soft_targets(answers) if self.vocabulary else {}
        best = max(soft.values(), default=0.0)
        right = [index for index, value in sorted(soft.items()) if value == best]
        return Example(
            id=str(question["question_id"]), image=image, boxes=(), names=(),
            prompt=relevant_part(text, marks), choices=(), label=right[0] if right else None,
            stratum=stratum, relevant_boxes=picture_boxes(marks, image), annotators=answers,
            answer_type=kind, soft_label=tuple(sorted(soft.items())),
        )  # fmt: skip

    def _answers(self, record: dict[str, Any], where: str, image_id: int) -> tuple[tuple[str, ...], str]:
        """Reads the annotators' answers and the answer type of one annotation."""
        if need(record, "image_id", int, where, self.what) != image_id:
            raise DataError(
                f"{where}: image_id={record['image_id']}, but its question is about {image_id}; "
                "files of different releases?"
            )
        answers = need(record, "answers", list, where, self.what)
        if not answers or not all(isinstance(a, dict) and isinstance(a.get("answer"), str) for a in answers):
            raise DataError(f"{where}: answers is {str(answers)[:80]}, expected ten objects with an 'answer'")
        kind = need(record, "answer_type", str, where, self.what)
        if kind not in _ANSWER_TYPES:
            raise DataError(f"{where}: answer_type={kind!r}, expected one of {', '.join(_ANSWER_TYPES)}")
        return tuple(answer["answer"] for answer in answers), kind
