"""Makes VCR's shifted validation sets of Ye and Kovashka (AAAI 2021) from raw VCR lines.

"A Case Study of the Shortcut Effects in Visual Commonsense Reasoning" rewords the choices so that shortcuts
that a model can learn without the picture stop working: by rule (no model needed), or by masking the tokens
on which a trained model relies. This follows github.com/yekeren/VCR-shortcut-effects-study at 4d0151d in
every quirk: pronouns have no cases ("near he waves"), verbs do not agree. It takes lines as ``json`` reads
them and changes only the choices. It neither reads pictures nor runs models.
"""

import json
import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tdlib.core.files import whole_file
from tdlib.data.examples import DataError
from tdlib.data.json_files import Records
from tdlib.data.reading import index_records, need

Line = dict[str, Any]  # of a VCR file, or of a file of shortcut scores
Token = str | list[int]  # a word, or a reference to objects of the picture
Score = Callable[[Sequence[Token], list[list[Token]]], Sequence[float]]

MASK = "[MASK]"
MASKED_TAG = 10_000  # a masked reference to object t is MASKED_TAG + t (their MASKING_OFFSET)

_PARTS = ("answer", "rationale")
_HE = ("he", "his", "him", "He", "His", "Him")
_SHE = ("she", "her", "hers", "She", "Her", "Hers")


def _check(record: Line, labels: bool = True) -> None:
    """Raises ``ValueError`` where a line is not as VCR publishes it."""
    objects = record.get("objects")
    if not (isinstance(objects, list) and all(isinstance(name, str) for name in objects)):
        raise ValueError(f"objects is {objects!r}, expected a list of class names; is this a VCR file?")
    lists = {"question": record.get("question")}
    for part in _PARTS:
        choices = record.get(f"{part}_choices")
        if not (isinstance(choices, list) and len(choices) == 4):
            raise ValueError(f"{part}_choices is {choices!r}, expected 4 token lists; is this a VCR file?")
        lists |= {f"{part}_choices[{index}]": choice for index, choice in enumerate(choices)}
        label = record.get(f"{part}_label")
        if labels and not (type(label) is int and 0 <= label < 4):
            raise ValueError(
                f"{part}_label is {label!r}, but the set needs answer_label and rationale_label, each "
                "0 to 3; take a split that has them (train or val)"
            )
    for name, tokens in lists.items():
        if not isinstance(tokens, list):
            raise ValueError(f"{name} is {tokens!r}, expected a list of tokens; is this a VCR file?")
        for token in tokens:
            if isinstance(token, str):
                continue
            if not (isinstance(token, list) and token and all(type(tag) is int for tag in token)):
                raise ValueError(f"{name}: {token!r} is neither a word nor a list of object indices")
            for tag in token:
                if not 0 <= tag < len(objects):
                    raise ValueError(
                        f"{name}: reference to object {tag}, but the picture has {len(objects)} objects; "
                        f"from {MASKED_TAG} on it is masked: take the file that has no masks"
                    )


def _with_choices(record: Line, change: Callable[[str, int, list[Token]], list[Token]]) -> Line:
    """Copies a line, with each choice replaced by ``change(part, index, choice)``."""
    changed = {}
    for part in _PARTS:
        choices = [change(part, index, choice) for index, choice in enumerate(record[f"{part}_choices"])]
        changed[f"{part}_choices"] = [[t if isinstance(t, str) else [*t] for t in c] for c in choices]
    return record | changed


# The rule-based sets


def _to_tag(
    choice: Sequence[Token], tag: list[int] | None, pronouns: Collection[str], new: list[int]
) -> list[Token]:
    return [new if token == tag or token in pronouns else token for token in choice]


def _to_pronoun(choice: Sequence[Token], tag: list[int] | None, pronoun: str) -> list[Token]:
    """Replaces a tag by a pronoun, capitalised if it comes first."""
    return [
        token if token != tag else pronoun if index else pronoun.capitalize()
        for index, token in enumerate(choice)
    ]


def _people(tokens: Sequence[Token], objects: Sequence[str]) -> list[int]:
    """Lists the persons to whom tokens refer, each once."""
    tags = {tag for token in tokens if isinstance(token, list) for tag in token}
    return sorted(tag for tag in tags if objects[tag] == "person")


def _pronoun(choice: Sequence[Token], question: Sequence[Token]) -> str:
    """Picks the choice's prevalent gender; on a tie the question is counted too, on another tie "he"."""
    balance = 0
    for tokens in (choice, question):
        balance += sum((token in _HE) - (token in _SHE) for token in tokens)
        if balance:
            break
    return "she" if balance < 0 else "he"


def rule_singular(record: Line) -> Line | None:
    """Applies Rule-Singular; None unless the question refers to exactly one person (objects do not count).

    Changes choices with exactly one person or one of the pronouns he and she: in wrong ones it becomes
    the question's person, in the right one the person becomes a pronoun. A reference to a
    person together with an object is kept. tools/rephrase_choice_singular.py.
    """
    _check(record)
    objects, question = record["objects"], record["question"]
    asked = _people(question, objects)
    if len(asked) != 1:
        return None

    def reword(part: str, index: int, choice: list[Token]) -> list[Token]:
        people = _people(choice, objects)
        pronouns = {token.lower() for token in choice if isinstance(token, str)} & {"he", "she"}
        if len(people) + len(pronouns) != 1:
            return choice
        if index == record[f"{part}_label"]:
            return _to_pronoun(choice, people, _pronoun(choice, question))
        return _to_tag(choice, people, ("he", "she", "He", "She"), asked)

    return _with_choices(record, reword)


def _group(tokens: Sequence[Token], objects: Sequence[str]) -> list[int] | None:
    """Returns the only reference, sorted, if it is to several objects that are all persons; else None."""
    references = [token for token in tokens if isinstance(token, list)]
    if len(references) != 1 or len(references[0]) < 2:
        return None
    return sorted(references[0]) if all(objects[tag] == "person" for tag in references[0]) else None


def rule_plural(record: Line) -> Line | None:
    """Applies Rule-Plural; None unless the question's only reference is to several persons.

    Changes choices whose only reference is to several persons too, or that contain "they": in wrong ones
    both become the question's group, in the right one the group becomes "they". A group whose numbers are
    not in order is kept, because the original compares it with the sorted one.
    tools/rephrase_choice_plural.py.
    """
    _check(record)
    asked = _group(record["question"], record["objects"])
    if asked is None:
        return None

    def reword(part: str, index: int, choice: list[Token]) -> list[Token]:
        group = _group(choice, record["objects"])
        if index == record[f"{part}_label"]:
            return _to_pronoun(choice, group, "they")
        return _to_tag(choice, group, ("they", "They"), asked)

    return _with_choices(record, reword)


# The adversarially masked sets


def expand(tokens: Sequence[Token]) -> list[str | int]:
    """Expands tokens to words and single tags: a reference to several objects becomes one tag for each."""
    return [part for token in tokens for part in ([token] if isinstance(token, str) else token)]


def mask_tokens(tokens: Sequence[Token], masked: Collection[int]) -> list[Token]:
    """Masks positions of the expanded tokens: a word becomes ``MASK``, a tag t ``MASKED_TAG + t``.

    Keeps the references' structure: ``[0, 3]`` with its second tag masked is ``[0, 10003]``.
    """
    result: list[Token] = []
    position = 0
    for token in tokens:
        if isinstance(token, str):
            result.append(MASK if position in masked else token)
            position += 1
        else:
            hidden = [position + i in masked for i in range(len(token))]
            result.append([tag + MASKED_TAG * hide for tag, hide in zip(token, hidden, strict=True)])
            position += len(token)
    return result


def _mask_by(record: Line, scores: Line, chosen: Callable[[Sequence[float]], list[int]]) -> Line:
    _check(record, labels=False)
    for part in _PARTS:
        label = record.get(f"{part}_label")
        if label is not None and label != scores[f"{part}_label"]:
            raise ValueError(
                f"{part}_label is {label} here and {scores[f'{part}_label']} in the shortcut scores; "
                "they were made for another file, make them for this one"
            )

    def mask(part: str, index: int, choice: list[Token]) -> list[Token]:
        losses, tokens = scores[f"{part}_losses"][index], len(expand(choice))
        if len(losses) != tokens:
            raise ValueError(
                f"{part}_choices[{index}] has {tokens} tokens, but {len(losses)} shortcut scores; "
                "they were made for another file, make them for this one"
            )
        return mask_tokens(choice, set(chosen(losses)))

    return _with_choices(record, mask)


def rm_top(record: Line, scores: Line, count: int = 1) -> Line:
    """AdvTop: masks the ``count`` tokens of largest loss in every choice, the first ones on ties.

    ``scores`` is the example's line of a shortcut-scores file. tools/merge_adversarial_annotations.py.
    """
    return _mask_by(
        record, scores, lambda losses: sorted(range(len(losses)), key=lambda i: -losses[i])[:count]
    )


def keep_top(record: Line, scores: Line, count: int) -> Line:
    """KeepTop: masks all but the ``count`` tokens of largest loss in every choice, otherwise like ``rm_top``.

    On ties it keeps the last ones, as numpy's stable argsort does. The original uses the default argsort,
    whose order of ties depends on numpy's version and the processor.
    """
    return _mask_by(
        record, scores, lambda losses: sorted(range(len(losses)), key=losses.__getitem__)[:-count]
    )


def shortcut_scores(record: Line, score: Score) -> Line:
    """Makes one line of a shortcut-scores file: the loss of a scorer without each token of each choice.

    ``score(prompt, variants)`` returns a logit per variant, a choice with one token masked (as
    ``mask_tokens`` does); it is called once for the answers and once for the rationales, whose
    prompt is the question and the right answer. Token i's loss is ``log(1 + exp(-z_i))`` for the
    right choice and ``log(1 + exp(z_i))`` for a wrong one, z_i the logit without the token.
    ``*_tokens`` are for human readers (the study's files have a name for each person instead of
    "person_0"). modeling/shortcut_main.py.
    """
    question, objects = record["question"], record["objects"]
    prompts = (question, [*question, *record["answer_choices"][record["answer_label"]]])
    line: Line = {"annot_id": record["annot_id"]}
    for part, prompt in zip(_PARTS, prompts, strict=True):
        label, choices = record[f"{part}_label"], [expand(choice) for choice in record[f"{part}_choices"]]
        variants = [
            mask_tokens(choice, {position})
            for choice, tokens in zip(record[f"{part}_choices"], choices, strict=True)
            for position in range(len(tokens))
        ]
        logits = [float(logit) for logit in score(prompt, variants)]
        if len(logits) != len(variants) or not all(math.isfinite(logit) for logit in logits):
            raise ValueError(
                f"{record['annot_id']}: score gave {len(logits)} logits for {len(variants)} variants, "
                "expected one finite number each; correct the scorer"
            )
        line[f"{part}_label"] = label
        line[f"{part}_tokens"] = [
            [t if isinstance(t, str) else f"{objects[t]}_{t}" for t in tokens] for tokens in choices
        ]
        rest = iter(logits)
        line[f"{part}_losses"] = [
            [round(_sigmoid_cross_entropy(next(rest), index == label), 4) for _ in tokens]
            for index, tokens in enumerate(choices)
        ]
    return line


def _sigmoid_cross_entropy(logit: float, right: bool) -> float:
    return max(logit, 0.0) - logit * right + math.log1p(math.exp(-abs(logit)))


def read_scores(path: Path | str) -> dict[str, Line]:
    """Reads the lines of a shortcut-scores file by annot_id."""
    lines = Records.lines(Path(path), "shortcut-scores")
    index = index_records(lines, "annot_id", str, lambda line, _identifier, _where: line)
    return {identifier: line for identifier, (_, line) in index.items()}


# Files

RULES: dict[str, Callable[[Line], Line | None]] = {
    "rule_singular": rule_singular,
    "rule_plural": rule_plural,
}
MASKINGS: dict[str, Callable[[Line, Line], Line]] = {
    "rmtop1": rm_top,
    "keeptop1": partial(keep_top, count=1),
    "keeptop3": partial(keep_top, count=3),
    "keeptop5": partial(keep_top, count=5),
}
SHIFTS = (*RULES, *MASKINGS)


def write_shifted(source: Path, target: Path, name: str, scores: Path | None = None) -> int:
    """Writes a split's shifted set as a file of the same schema; returns how many examples it holds.

    Args:
        source: a VCR split with labels, read line by line.
        target: written as a whole; until then an older file stays. It is empty if the rule applies to no
            example.
        name: one of ``SHIFTS``.
        scores: a file of ``shortcut_scores`` lines, for the masked sets: those of a student, or the authors'
            data/adversarial_based/shortcut_scores.jsonl.

    Raises:
        DataError: a bad line, whose file and number it names, or one without scores.
    """
    scores_of = read_scores(scores) if scores else {}
    records = Records.lines(source, "VCR")
    count = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        for index in range(len(records)):
            record, where = records[index], records.where(index)
            identifier = need(record, "annot_id", str, where, "VCR")
            try:
                if name in RULES:
                    shifted = RULES[name](record)
                elif identifier in scores_of:
                    shifted = MASKINGS[name](record, scores_of[identifier])
                else:
                    raise ValueError(f"no line for it in {scores}; make scores for this file")
            except ValueError as error:
                raise DataError(f"{where} ({identifier}): {error}") from None
            except (KeyError, IndexError, TypeError) as error:
                raise DataError(f"{where} ({identifier}): {error!r}; is this a VCR file?") from None
            if shifted is not None:
                file.write(json.dumps(shifted, ensure_ascii=False) + "\n")
                count += 1
    return count
