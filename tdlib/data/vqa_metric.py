"""The official accuracy of VQA v2, the answer vocabulary with its soft targets, and the submission file.

The accuracy is that of vqaEval.py of GT-Vision-Lab/VQA (a013f00, 2021; Agrawal et al. 2015) under Python 3,
with its quirks and rounding. The vocabulary is that of compute_softscore.py of
hengyuan-hu/bottom-up-attention-vqa, in UNITER's file format.
"""

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from pathlib import Path
from typing import Any, TypeVar

from tdlib.core.files import write_json
from tdlib.data.examples import DataError
from tdlib.data.json_files import parse_json

T = TypeVar("T")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # apostrophe, colon, $, % and & are not in it
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The original's look-behind is mistyped as "(?!<=\d)", which is true before any period, so it is left out.
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)
}
_ARTICLES = {"a", "an", "the"}
# The map of vqaEval.py, all 120 entries: those in capitals never apply, for the text is in lower
# case by then; "somebody'd" is mapped the wrong way round.
# fmt: off
_CONTRACTIONS = {
    "aint": "ain't", "arent": "aren't", "cant": "can't", "couldve": "could've", "couldnt": "couldn't",
    "couldn'tve": "couldn't've", "couldnt've": "couldn't've", "didnt": "didn't", "doesnt": "doesn't",
    "dont": "don't", "hadnt": "hadn't", "hadnt've": "hadn't've", "hadn'tve": "hadn't've", "hasnt": "hasn't",
    "havent": "haven't", "hed": "he'd", "hed've": "he'd've", "he'dve": "he'd've", "hes": "he's",
    "howd": "how'd", "howll": "how'll", "hows": "how's", "Id've": "I'd've", "I'dve": "I'd've", "Im": "I'm",
    "Ive": "I've", "isnt": "isn't", "itd": "it'd", "itd've": "it'd've", "it'dve": "it'd've",
    "itll": "it'll", "let's": "let's", "maam": "ma'am", "mightnt": "mightn't", "mightnt've": "mightn't've",
    "mightn'tve": "mightn't've", "mightve": "might've", "mustnt": "mustn't", "mustve": "must've",
    "neednt": "needn't", "notve": "not've", "oclock": "o'clock", "oughtnt": "oughtn't",
    "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "shant": "shan't",
    "shed've": "she'd've", "she'dve": "she'd've", "she's": "she's", "shouldve": "should've",
    "shouldnt": "shouldn't", "shouldnt've": "shouldn't've", "shouldn'tve": "shouldn't've",
    "somebody'd": "somebodyd", "somebodyd've": "somebody'd've", "somebody'dve": "somebody'd've",
    "somebodyll": "somebody'll", "somebodys": "somebody's", "someoned": "someone'd",
    "someoned've": "someone'd've", "someone'dve": "someone'd've", "someonell": "someone'll",
    "someones": "someone's", "somethingd": "something'd", "somethingd've": "something'd've",
    "something'dve": "something'd've", "somethingll": "something'll", "thats": "that's",
    "thered": "there'd", "thered've": "there'd've", "there'dve": "there'd've", "therere": "there're",
    "theres": "there's", "theyd": "they'd", "theyd've": "they'd've", "they'dve": "they'd've",
    "theyll": "they'll", "theyre": "they're", "theyve": "they've", "twas": "'twas", "wasnt": "wasn't",
    "wed've": "we'd've", "we'dve": "we'd've", "weve": "we've", "werent": "weren't", "whatll": "what'll",
    "whatre": "what're", "whats": "what's", "whatve": "what've", "whens": "when's", "whered": "where'd",
    "wheres": "where's", "whereve": "where've", "whod": "who'd", "whod've": "who'd've",
    "who'dve": "who'd've", "wholl": "who'll", "whos": "who's", "whove": "who've", "whyll": "why'll",
    "whyre": "why're", "whys": "why's", "wont": "won't", "wouldve": "would've", "wouldnt": "wouldn't",
    "wouldnt've": "wouldn't've", "wouldn'tve": "wouldn't've", "yall": "y'all", "yall'll": "y'all'll",
    "y'allll": "y'all'll", "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've",
    "youd": "you'd", "youd've": "you'd've", "you'dve": "you'd've", "youll": "you'll", "youre": "you're",
    "youve": "you've",}
# fmt: on
_SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)  # by the number of annotators, the last for four and more


@lru_cache(maxsize=2**18)
def normalise(text: str) -> str:
    """Bring an answer to the form that is compared: punctuation first, then numbers, articles, contractions.

    A mark of punctuation vanishes if it stands beside a space anywhere in the text, or if the text
    has a comma between digits; else it becomes a space. Lower case; may be empty ("a" is).
    """
    vanish, marked = _COMMA_IN_NUMBER.search(text) is not None, text
    for mark in _PUNCTUATION:
        if mark in text:
            beside_space = f"{mark} " in text or f" {mark}" in text
            marked = marked.replace(mark, "" if vanish or beside_space else " ")
    # The original passes re.UNICODE as the count by mistake, so at most 32 periods are removed.
    plain = _PERIOD.sub("", marked, count=int(re.UNICODE))
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def question_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of one prediction, in [0, 1]: ``mean_i min(matches among the answers but i / 3, 1)``.

    Ten answers give 0, .3, .6, .9, 1 for 0, 1, 2, 3, 4 matches; a single one always gives 0. Where
    all answers are the same, nothing is normalised but the white space: ten times "cat" gives 0
    to "The cat". Raises ValueError without answers.
    """
    _refuse_string("answers", answers)
    if not answers:
        raise ValueError("answers is empty; expected the annotators' answers, at least one")
    prediction, given = _trim(prediction), [_trim(answer) for answer in answers]
    if len(set(given)) > 1:
        prediction, given = normalise(prediction), [normalise(answer) for answer in given]
    hits = [answer == prediction for answer in given]
    matches = sum(hits)
    return _mean([min(1.0, (matches - hit) / 3) for hit in hits])


@dataclass(frozen=True)
class Vocabulary:
    """The answers from which a classifier chooses; the label of an answer is its position.

    Raises ValueError if there are none or if one is there twice.
    """

    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.answers:
            raise ValueError("the vocabulary is empty; expected at least one answer")
        if doubled := _doubled(self.answers):
            raise ValueError(f"the vocabulary has {len(doubled)} answers twice (first: {doubled[0]!r})")

    @classmethod
    def build(cls, multiple_choice_answers: Iterable[str], minimum: int = 9) -> "Vocabulary":
        """Keep the answers that, normalised, are that of at least ``minimum`` questions.

        The original (compute_softscore.py) removes commas afterwards; there are none left.

        One answer per question (``multiple_choice_answer``) of the splits trained on; 3,129 for
        train and val of VQA v2. Ordered by first occurrence (the original's order was that of a
        Python 2 dict), so the labels depend on the order of the questions, and on nothing else.
        Raises ValueError if none is left.
        """
        _refuse_string("multiple_choice_answers", multiple_choice_answers)
        counts = Counter(normalise(answer) for answer in multiple_choice_answers)
        kept = tuple(answer for answer, count in counts.items() if count >= minimum)
        if not kept:
            most = max(counts.values(), default=0)
            raise ValueError(
                f"none of {len(counts)} answers occurs {minimum} times (the most common: {most}); "
                "expected more questions or a lower minimum"
            )
        return cls(kept)

    def soft_targets(self, answers: Sequence[str]) -> dict[int, float]:
        """Score labels by their number of annotators: .3, .6, .9 for one to three, 1 from four on.

        A label that is not there has target 0. Counts the strings as the annotators wrote them, as
        hengyuan-hu and ViLT do ("Yes" is not "yes"); UNITER counts their normalised forms.
        """
        _refuse_string("answers", answers)
        counts = Counter(answers)
        last = len(_SOFT_SCORES) - 1
        return {
            self._labels[answer]: _SOFT_SCORES[min(count, last)]
            for answer, count in counts.items()
            if answer in self._labels
        }

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Read UNITER's ``ans2label.json``. Raises DataError unless the labels are 0 to n-1, each once."""
        remedy = "write the file again, or copy UNITER's ans2label.json"
        try:
            labels = parse_json(path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; expected an answer vocabulary; {remedy}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON in UTF-8 ({error}); {remedy}") from None
        if not isinstance(labels, dict) or not labels:
            found = "no answers" if labels == {} else type(labels).__name__
            raise DataError(f"{path}: expected a JSON object {{answer: label}}, found {found}; {remedy}")
        free = set(range(len(labels)))
        for answer, label in labels.items():
            if type(label) is not int or label not in free:
                raise DataError(
                    f"{path}: the label of {answer!r} is {label!r}; "
                    f"expected 0 to {len(labels) - 1} for the {len(labels)} answers, each once; {remedy}"
                )
            free.remove(label)
        return cls(tuple(sorted(labels, key=labels.__getitem__)))

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {answer: label for label, answer in enumerate(self.answers)}


def write_submission(path: Path, answers: Mapping[int, str], question_ids: Sequence[int]) -> None:
    """Write ``[{"question_id": int, "answer": str}, ...]`` in the order of ``question_ids``.

    ``question_ids``: all of the split, for the server takes no less. Raises DataError, and writes
    nothing, if ids are missing, extra or doubled, or if an answer is not a string.
    """
    problems = _summary("question ids doubled", _doubled(question_ids))
    problems += _differences(answers, question_ids, "the answers")
    problems += _summary(
        "answers that are not strings", [i for i, a in answers.items() if not isinstance(a, str)]
    )
    if problems:
        raise DataError(
            f"{path}: not written: {'; '.join(problems)}; expected one answer for each question of the split"
        )
    write_json(path, [{"question_id": int(i), "answer": answers[i]} for i in question_ids])


def check_submission(path: Path, question_ids: Sequence[int]) -> list[str]:
    """List all that is wrong with a submission file for these questions, one line per kind; empty if good.

    A line tells how many there are and where the first ones stand (entries count from 0).
    """
    try:
        entries = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return [f"not readable as JSON in UTF-8: {error}"]
    if not isinstance(entries, list):
        return [f"expected a list of entries, found {type(entries).__name__}"]
    wrong: dict[str, list[int]] = {}
    found: list[int] = []
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            wrong.setdefault("entries that are not objects", []).append(position)
            continue
        for key, kind in (("question_id", int), ("answer", str)):
            if key not in entry:
                wrong.setdefault(f"entries without {key!r}", []).append(position)
            elif type(entry[key]) is not kind:
                wrong.setdefault(f"entries whose {key!r} is not {kind.__name__}", []).append(position)
            elif key == "question_id":
                found.append(entry[key])
    problems = [line for what, positions in wrong.items() for line in _summary(what, positions)]
    problems += _summary("question ids doubled", _doubled(found))
    return problems + _differences(found, question_ids, "the file")


def _trim(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _mean(values: Sequence[float]) -> float:
    # Added from left to right as in the original's Python; since 3.12 sum() corrects its rounding.
    return reduce(operator.add, values, 0.0) / len(values)


def _refuse_string(name: str, value: Any) -> None:
    if isinstance(value, str):
        raise ValueError(f"{name} is one string ({value[:40]!r}); expected several strings")


def _doubled(values: Iterable[T]) -> list[T]:
    return [value for value, count in Counter(values).items() if count > 1]


def _differences(found: Iterable[int], expected: Iterable[int], where: str) -> list[str]:
    """Question ids missing and extra, each once and in their order."""
    found, expected = dict.fromkeys(found), dict.fromkeys(expected)
    missing = _summary(f"question ids missing in {where}", [i for i in expected if i not in found])
    return missing + _summary(f"extra question ids in {where}", [i for i in found if i not in expected])


def _summary(what: str, places: Sequence[int]) -> list[str]:
    if not places:
        return []
    more = ", ..." if len(places) > 5 else ""
    return [f"{len(places)} {what}: {', '.join(map(str, places[:5]))}{more}"]
