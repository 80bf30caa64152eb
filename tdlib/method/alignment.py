"""Aligns student tokens with the teacher tokens that lie where they lie, and computes their targets.

Two tokens overlap by characters of the text or by area of the picture; the alignment spreads every student
token over the teacher tokens that it overlaps (rows sum to 1), and mixes their vectors into its target.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tdlib.method.tokens import Tokens

# A student token of which the teacher sees less than this share is not distilled: a region that
# merely touches the edge of the teacher's crop shares a sliver of rounding error with it.
MINIMUM_COVERAGE = 1e-3


def text_overlap(
    student_spans: Int[Tensor, "*batch student_tokens 2"],
    teacher_spans: Int[Tensor, "*batch teacher_tokens 2"],
) -> Float[Tensor, "*batch student_tokens teacher_tokens"]:
    """Count the characters that each student token shares with each teacher token.

    ``max(0, min(end_i, end_j) - max(start_i, start_j))`` (our reading of CLIP-TD). Spans are
    [start, end) offsets into the same raw string; the empty span (0, 0) shares nothing.
    """
    student, teacher = student_spans.unsqueeze(-2), teacher_spans.unsqueeze(-3)
    start = torch.maximum(student[..., 0], teacher[..., 0])
    end = torch.minimum(student[..., 1], teacher[..., 1])
    return (end - start).clamp_min(0).float()


def visual_overlap(
    student_boxes: Float[Tensor, "*batch student_tokens 4"],
    teacher_boxes: Float[Tensor, "*batch teacher_tokens 4"],
) -> Float[Tensor, "*batch student_tokens teacher_tokens"]:
    """Measure the area that each student box shares with each teacher box.

    ``width * height`` of the intersection (our reading of CLIP-TD), in [0, 1]: a share of the
    original picture, as the boxes are xyxy normalised to it. A box without area shares nothing.
    """
    student, teacher = student_boxes.unsqueeze(-2), teacher_boxes.unsqueeze(-3)
    # One axis of the picture after the other: faster, as the innermost loop then runs over teacher tokens
    # and not over two coordinates.
    left, top, right, bottom = zip(student.unbind(-1), teacher.unbind(-1), strict=True)
    width = (torch.minimum(*right) - torch.maximum(*left)).clamp_min(0)
    return width * (torch.minimum(*bottom) - torch.maximum(*top)).clamp_min(0)


def align(student: Tokens, teacher: Tokens) -> Float[Tensor, "*batch student_tokens teacher_tokens"]:
    """Spread each student token over the teacher tokens that lie where it lies.

    ``A[i, j] = overlap(i, j) / sum_j overlap(i, j)`` (our reading of CLIP-TD): characters between
    text tokens, area between visual tokens, never across. Entries are in [0, 1], a row sums to 1.
    A row of zeros means "not distilled": special tokens, padding, and tokens of which the teacher
    sees less than ``MINIMUM_COVERAGE``. A token that has both a span and a box counts as text.
    """
    characters = text_overlap(student.spans, teacher.spans)
    area = visual_overlap(student.boxes, teacher.boxes)
    area = area * ~teacher.is_text.unsqueeze(-2)
    overlap = torch.where(student.is_text.unsqueeze(-1), characters, area)
    covered = overlap.sum(dim=-1, keepdim=True)
    is_seen = covered > MINIMUM_COVERAGE * _extent(student).unsqueeze(-1)
    return torch.where(is_seen, overlap / covered, 0.0)


def aligned_targets(
    alignment: Float[Tensor, "*batch student_tokens teacher_tokens"],
    teacher_tokens: Float[Tensor, "*batch teacher_tokens teacher_dim"],
    centre: Float[Tensor, "*rows teacher_dim"] | None = None,
) -> Float[Tensor, "*batch student_tokens teacher_dim"]:
    """Make the target of each student token: the mean direction of the teacher tokens it covers.

    ``u = normalise(A t)`` (our reading of CLIP-TD). Unit vectors in CLIP's joint space, exactly
    zero where the row of ``alignment`` is zero. Carries no gradient.

    ``centre`` m, one vector for all rows or the mean teacher token of each row's modality, makes it
    ``normalise(A t - m)`` (beyond the paper): CLIP's vectors lie in a narrow cone, and what all share
    tells a student nothing.
    """
    mixed = alignment.detach() @ teacher_tokens.detach().to(alignment.dtype)
    if centre is not None:
        has_target = alignment.detach().sum(dim=-1, keepdim=True) > 0
        mixed = torch.where(has_target, mixed - centre.detach().to(mixed.dtype), 0.0)
    return F.normalize(mixed, dim=-1)


def image_conditioned_targets(
    vectors: Float[Tensor, "*batch tokens teacher_dim"], tokens: Tokens, temperature: float = 0.03
) -> Float[Tensor, "*batch tokens teacher_dim"]:
    """Give each word the patches that agree with it as its target, instead of its own vector.

    ``u'[i] = normalise(sum_j softmax_j(u[i] . u[j] / temperature) u[j])`` over the visual tokens j that have
    a target (beyond the paper): what the word's own vector lacks, the picture, is in it. Visual tokens keep
    theirs, and so does a word of a picture without any target; zero vectors stay zero.
    """
    shares = patch_shares(vectors, tokens, temperature)
    mixed = F.normalize(shares @ vectors, dim=-1)
    return torch.where(shares.sum(-1, keepdim=True) > 0, mixed, vectors)


def patch_shares(
    vectors: Float[Tensor, "*batch tokens teacher_dim"], tokens: Tokens, temperature: float = 0.03
) -> Float[Tensor, "*batch tokens tokens"]:
    """Compute the share of each patch in the target of each word that ``image_conditioned_targets`` mixes.

    ``softmax_j(u[i] . u[j] / temperature)`` over the visual tokens j that have a target. Rows of words that
    have a target sum to 1; all other rows are zero, and all are in a picture without any target.
    """
    has_target = vectors.abs().sum(-1) > 0
    seen = (has_target & ~tokens.is_text).unsqueeze(-2)
    agreement = (vectors @ vectors.transpose(-1, -2)).masked_fill(~seen, -1e4)
    is_word = has_target & tokens.is_text & seen.any(-1)
    return (agreement / temperature).softmax(dim=-1) * is_word.unsqueeze(-1)


def _extent(tokens: Tokens) -> Float[Tensor, "*batch tokens"]:
    """The size of each token in the unit of its overlaps: characters of text tokens, area of visual ones."""
    characters = tokens.spans[..., 1] - tokens.spans[..., 0]
    area = (tokens.boxes[..., 2:] - tokens.boxes[..., :2]).clamp_min(0).prod(dim=-1)
    return torch.where(tokens.is_text, characters.to(area.dtype), area)
