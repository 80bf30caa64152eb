"""A batch's targets, made together, are those of its examples by themselves."""

from dataclasses import replace
from inspect import cleandoc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tdlib.config import RunConfig
from tdlib.method import clip_td
from tdlib.method.alignment import image_conditioned_targets
from tdlib.method.clip_td import ScoredTokens, score_tokens
from tdlib.method.relevance import RELEVANCE, STUDENT_RELEVANCE, relevance_value
from tdlib.method.tokens import TeacherTokens, Tokens
from tdlib.students.base import pad_last
from tdlib.teacher.model import TeacherRecord
from tdlib.training.pipeline import teacher_tokens
from tdlib.training.targets import PACKED, TeacherFeatures, make_targets, pack

few = settings(deadline=None, max_examples=25)
CHOICES, DIM = 3, 5


def whole_sequences(alignment, student, teacher):
    """A user's own relevance, which reads whole sequences of one example."""
    assert alignment.dim() == 3 and alignment.shape[-1] == teacher.projected.shape[-2]
    assert student.spans.shape[:2] == alignment.shape[:2] and len(alignment) == CHOICES
    return relevance_value(alignment, student, teacher)


class Drawn:
    """Random examples of one batch, with texts and pictures that several of them share."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.texts = [self.record(self.spans(self.number(1, 7))) for _ in range(6)]
        self.pictures = [self.record(self.boxes(self.number(1, 9))) for _ in range(2)]
        self.centres = self.normal(DIM), self.normal(DIM)  # of a run

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def spans(self, tokens: int) -> torch.Tensor:
        start = torch.randint(0, 15, (tokens, 1), generator=self.generator)
        return torch.cat([start, start + torch.randint(1, 7, (tokens, 1), generator=self.generator)], dim=1)

    def boxes(self, tokens: int) -> torch.Tensor:
        corner = torch.randint(0, 6, (tokens, 2), generator=self.generator)
        size = torch.randint(1, 3, (tokens, 2), generator=self.generator)
        return torch.cat([corner, corner + size], dim=1) / 8

    def record(self, positions: torch.Tensor) -> TeacherRecord:
        tokens = len(positions)
        vectors = {name: self.normal(tokens, DIM).half() for name in ("projected", "value", "vv")}
        scalars = {name: self.normal(tokens).abs().half() for name in ("attention", "rollout")}
        return TeacherRecord(positions=positions, pooled=self.normal(DIM).half(), **vectors, **scalars)

    def example(self, relevance: str, refers: bool, centred: bool) -> tuple[TeacherFeatures, torch.Tensor]:
        """Features of an example, and the spans of the student's tokens, special ones among them."""
        numbers = [self.number(0, len(self.texts)) for _ in range(CHOICES)]
        of_picture = self.number(0, len(self.pictures))
        texts, picture = [self.texts[n] for n in numbers], self.pictures[of_picture]
        tokens, places = self.number(1, 6), self.number(1, 6)
        spans = torch.stack([self.spans(tokens) for _ in range(CHOICES)])
        spans[:, 0] = 0
        saliencies = None
        if relevance in ("attention", "rollout"):
            saliencies = [(getattr(text, relevance), getattr(picture, relevance)) for text in texts]
        elif relevance == "gradient":  # of the pair
            sizes = [(len(text.positions), len(picture.positions)) for text in texts]
            saliencies = [(self.normal(a).abs(), self.normal(b).abs()) for a, b in sizes]
        features = TeacherFeatures(
            tuple(texts), tuple(bytes([n]) for n in numbers), picture, bytes([of_picture]),
            self.boxes(places), self.normal(CHOICES, tokens).abs().clamp(max=1), self.normal(CHOICES),
            torch.tensor(1.0), self.normal(CHOICES, places).abs().clamp(max=1) if refers else None,
            saliencies, self.centres if centred else None,
        )  # fmt: skip
        return features, spans


def single(record: TeacherRecord) -> TeacherRecord:
    """A record in single precision."""
    parts = {name: value for name, value in vars(record).items() if torch.is_tensor(value)}
    return TeacherRecord(**{n: v.float() if v.is_floating_point() else v for n, v in parts.items()})


def alone(features: TeacherFeatures, spans: torch.Tensor, config: RunConfig) -> ScoredTokens:
    """One example's, from the method's functions and whole sequences."""
    texts, picture = [single(text) for text in features.texts], single(features.picture)
    teacher = teacher_tokens(texts, picture)
    if features.saliencies is not None:
        length = teacher.projected.shape[1] - len(picture.positions)
        rows = [torch.cat([pad_last([w[None]], length)[0, 0], p]).float() for w, p in features.saliencies]
        teacher = replace(teacher, saliency=torch.stack(rows))
    boxes = features.boxes.expand(CHOICES, -1, -1)
    visual = features.visual_prior if features.visual_prior is not None else torch.ones(boxes.shape[:2])
    student = Tokens.cat([Tokens.text(spans), Tokens.visual(boxes)])
    scored = score_tokens(
        student, teacher, torch.cat([features.text_prior, visual], dim=1), config.relevance,
        config.temperature, config.prior_weight, features.centres,
    )  # fmt: skip
    if config.conditioned_targets:
        vectors = image_conditioned_targets(scored.vectors, student, config.temperature)
        scored = replace(scored, vectors=vectors)
    return scored


@pytest.mark.parametrize("relevance", [*RELEVANCE, *STUDENT_RELEVANCE, "own"])
@few
@given(seed=st.integers(0, 2**31 - 1), refers=st.booleans(), centred=st.booleans(), conditioned=st.booleans())
def test_each_example_of_a_batch_has_its_own_targets(relevance, seed, refers, centred, conditioned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RELEVANCE, "own", whole_sequences)
        config = RunConfig(
            relevance=relevance, temperature=0.3, prior_weight=0.7, conditioned_targets=conditioned
        )
        drawn = Drawn(seed)
        found = [drawn.example(relevance, refers, centred) for _ in range(3)]
        features, spans = [one for one, _ in found], [of for _, of in found]
        length = max(of.shape[1] for of in spans)
        padded = [torch.nn.functional.pad(of, (0, 0, 0, length - of.shape[1])) for of in spans]
        batch = make_targets(pack(features, length) | {"spans": torch.stack(padded)}, config)
        for row, (one, of) in enumerate(found):
            expected = alone(one, of, config)
            own = [*range(of.shape[1]), *range(length, length + len(one.boxes))]
            for name, value in vars(expected).items():
                assert_close(batch[name][row][:, own], value, rtol=1e-4, atol=1e-5, msg=name)
            others = [token for token in range(batch["valid"].shape[2]) if token not in own]
            assert not batch["valid"][row][:, others].any() and batch["scores"][row][:, others].eq(0).all()


@few
@given(seed=st.integers(0, 2**31 - 1))
def test_each_distinct_text_and_picture_travels_once_in_half_precision(seed):
    drawn = Drawn(seed)
    features = [drawn.example("value", False, False)[0] for _ in range(8)]
    batch = pack(features, 6)
    texts = {key: text for one in features for key, text in zip(one.text_keys, one.texts, strict=True)}
    pictures = {one.picture_key: one.picture for one in features}
    for kind, records in (("text", texts), ("picture", pictures)):
        tokens = sum(len(record.positions) for record in records.values())
        for name in ("projected", "value"):
            entry = batch[f"{PACKED}{kind}.{name}"]
            assert entry.shape == (tokens + 1, DIM) and entry.dtype == torch.float16
    again = make_targets(batch | {"spans": torch.zeros(8, CHOICES, 6, 2, dtype=torch.long)}, RunConfig())
    assert not any(name.startswith(PACKED) for name in again)
    assert make_targets(again, RunConfig()) is again


def test_the_documented_steps_run_and_their_loss_is_the_formula():
    """The example in the docstring of ``clip_td``, for one example of a batch of one."""
    drawn = Drawn(3)
    features, spans = drawn.example("value", False, False)
    one = teacher_tokens([single(text) for text in features.texts], single(features.picture))
    of_teacher = Tokens(one.tokens.spans[None], one.tokens.boxes[None])
    vectors = one.projected, one.value, one.image_global, one.text_global
    teacher = TeacherTokens(of_teacher, *(value[None] for value in vectors))
    boxes = features.boxes.expand(CHOICES, -1, -1)
    student = Tokens.cat([Tokens.text(spans), Tokens.visual(boxes)])
    student = Tokens(student.spans[None], student.boxes[None])
    phi = {name: torch.nn.Linear(4, DIM) for name in ("text", "visual")}
    names = vars(clip_td) | {
        "student": student, "phi": phi, "prior": torch.ones(student.spans.shape[:-1]), "teacher": teacher,
        "hidden": drawn.normal(*student.spans.shape[:-1], 4), "labels": torch.tensor([1]),
        "teacher_logits": drawn.normal(1, CHOICES), "student_logits": drawn.normal(1, CHOICES),
    }  # fmt: skip
    example = clip_td.__doc__.split("::\n\n")[1].split("\n\n")[0]
    exec(cleandoc(example), names)
    mapped = torch.where(
        student.is_text[..., None], phi["text"](names["hidden"]), phi["visual"](names["hidden"])
    )
    distance = 1 - torch.cosine_similarity(mapped, names["scored"].vectors, dim=-1)
    weight = names["instance"][:, None, None] * names["weights"]
    assert_close(names["loss"], (weight * distance).sum(-1).mean())
    assert names["loss"] > 0 and names["weights"].sum(-1).allclose(torch.ones(1, CHOICES))
