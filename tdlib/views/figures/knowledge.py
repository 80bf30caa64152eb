"""Draws what students know before they are finetuned: concept by concept, and words at their places."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from tdlib.views.figures.style import BLUE, GREY, HALO, WEIGHTS, Figure, need, plain, small, styled
from tdlib.views.figures.targets import rectangle
from tdlib.views.scale import OBJECT
from tdlib.views.sheet import areas

CHANCE = 0.25  # of a right answer: a question has four


@styled
def plot_concepts(table: pd.DataFrame) -> Figure:
    """Draw a table of shares of right answers: a row per concept, a column per student.

    Concepts that the students' corpus has stand left, the others right, each ordered by the mean over
    students. ``table`` has a row per student and concept: ``student``, ``concept``, ``known``, ``hit``
    (share in [0, 1]) and ``n`` (examples), as ``knowledge.by_concept`` gives them. Shares that are
    not above ``CHANCE`` are written in grey. Raises ValueError for a missing column or an empty table.
    """
    need(table, ["student", "concept", "known", "hit", "n"], "plot_concepts")
    students = list(dict.fromkeys(table["student"]))
    blocks = [table[table["known"] == known] for known in (True, False)]
    most = max(block["concept"].nunique() for block in blocks)
    figure = Figure(figsize=(1.6 + 2 * (1.2 + 0.5 * len(students)), 1.3 + 0.17 * most))
    grid = figure.subplots(1, 2)
    names = "in the students' corpus", "not in it"
    for axes, block, name in zip(grid, blocks, names, strict=True):
        _draw_block(axes, block, students)
        axes.set_title(f"concepts {name}")
        axes.set_ylim(most - 0.5, -0.5)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 100), WEIGHTS), ax=list(grid), fraction=0.03, aspect=40)
    bar.ax.axhline(100 * CHANCE, color="black", linewidth=1)
    bar.ax.set_ylabel(f"right answers (%); the line is chance, {100 * CHANCE:.0f} %")
    return figure


def _draw_block(axes: Axes, block: pd.DataFrame, students: list[str]) -> None:
    order = block.groupby("concept")["hit"].mean().sort_values(ascending=False, kind="stable").index
    numbers = block.drop_duplicates("concept").set_index("concept")["n"]
    shares = block.pivot(index="concept", columns="student", values="hit").reindex(order, columns=students)
    for row, concept in enumerate(order):
        for column, student in enumerate(students):
            share = float(shares.loc[concept, student])
            if np.isnan(share):
                continue
            tint = WEIGHTS(share)
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=tint, edgecolor="white"))
            axes.text(
                column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=small(),
                color="black" if share > CHANCE else GREY, path_effects=HALO if share > 0.6 else None,
            )  # fmt: skip
    axes.set_yticks(range(len(order)), [plain(f"{name} ({numbers[name]})") for name in order])
    axes.set_xticks(range(len(students)), [plain(name) for name in students], rotation=30, ha="left")
    axes.set_xlim(-0.5, len(students) - 0.5)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)


@styled
def plot_votes(
    pictures: Sequence[tuple[str, Any]],
    votes: Mapping[str, Sequence[tuple[np.ndarray, Sequence[str], np.ndarray]]],
) -> Figure:
    """Draw pictures (heading and image) with the words of their places: a row each, a column per student.

    Every word that some place thinks likelier than not stands at the place that is surest of it, which
    is outlined: blue for patches and cells of a grid, orange for objects and the whole picture. ``votes`` are
    by student and picture boxes (places, 4) normalised xyxy, words, and their probabilities (places, words).
    """
    figure = Figure(figsize=(2.7 * len(votes), 0.4 + 2.8 * len(pictures)))
    grid = figure.subplots(len(pictures), len(votes), squeeze=False)
    for column, (student, of_pictures) in enumerate(votes.items()):
        for row, ((heading, image), (boxes, words, shares)) in enumerate(
            zip(pictures, of_pictures, strict=True)
        ):
            axes = grid[row, column]
            axes.imshow(image, extent=(0, 1, 1, 0), alpha=0.45)
            _draw_words(axes, boxes, words, shares)
            axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
            axes.set_title(plain(student if column else f"{student}: {heading}"))
    return figure


def _draw_words(axes: Axes, boxes: np.ndarray, words: Sequence[str], shares: np.ndarray) -> None:
    sizes = areas(boxes)
    cell = float(np.median(sizes[sizes > 0])) if (sizes > 0).any() else 0.0
    shares = np.where(sizes[:, None] > 0, shares, 0.0)
    spoken: dict[int, list[str]] = {}
    for word in np.argsort(-shares.max(0), kind="stable"):
        if shares[:, word].max() >= 0.5:
            spoken.setdefault(int(shares[:, word].argmax()), []).append(words[word])
    for place, said in spoken.items():
        left, top = boxes[place, :2]
        one_of_many = abs(sizes[place] - cell) <= 0.06 * cell  # cells at the edge may lack a pixel
        colour = BLUE if one_of_many else OBJECT
        axes.add_patch(rectangle(boxes[place], fill=False, edgecolor=colour, linewidth=0.8))
        axes.text(
            left + 0.01, top + 0.01, "\n".join(plain(word) for word in said[:4]), ha="left", va="top",
            fontsize=small() - 0.5, path_effects=HALO, color=colour, linespacing=0.95,
        )  # fmt: skip
