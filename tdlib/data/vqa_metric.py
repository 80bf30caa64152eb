"""The official accuracy of VQA v2, the answer vocabulary with its soft targets, and the submission file.

The accuracy is that of vqaEval.py of GT-Vision-Lab/VQA (a013f00, 2021; Agrawal et al. 2015) under Python 3,
with its quirks and rounding. The vocabulary is that of compute_softscore.py of
hengyuan-hu/bottom-up-attention-vqa, in UNITER's file format.
"""

import operator
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from pathlib import Path
from typing import Any

from tdlib.data.examples import DataError
from tdlib.data.json_files import Records, read_json
from tdlib.data.reading import check_answers

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
    to "The cat".
    """
    prediction, given = _trim(prediction), [_trim(answer) for answer in answers]
    if len(set(given)) > 1:
        prediction, given = normalise(prediction), [normalise(answer) for answer in given]
    hits = [answer == prediction for answer in given]
    matches = sum(hits)
    return _mean([min(1.0, (matches - hit) / 3) for hit in hits])


@dataclass(frozen=True)
class Vocabulary:
    """The answers from which a classifier chooses; the label of an answer is its position."""

    answers: tuple[str, ...]

    def soft_targets(self, answers: Sequence[str]) -> dict[int, float]:
        """Score labels by their number of annotators: .3, .6, .9 for one to three, 1 from four on.

        A label that is not there has target 0. Counts the strings as the annotators wrote them, as
        hengyuan-hu and ViLT do ("Yes" is not "yes"); UNITER counts their normalised forms.
        """
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
        labels = read_json(path, remedy=remedy)
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


def check_submission(path: Path, question_ids: Collection[int]) -> list[str]:
    """Lists all faults of a file for the server: an entry {"question_id", "answer"} for each question."""

    def fault(entry: dict[str, Any]) -> str:
        answer = entry.get("answer")
        return "" if isinstance(answer, str) else f"answer={answer!r}, expected a string"

    entries = Records.entries(path, None, "VQA submission")
    return check_answers(path, entries, "question_id", question_ids, fault)


def _trim(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _mean(values: Sequence[float]) -> float:
    # Added from left to right as in the original's Python; since 3.12 sum() corrects its rounding.
    return reduce(operator.add, values, 0.0) / len(values)
