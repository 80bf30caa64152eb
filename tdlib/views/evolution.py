"""Shows how targeting changes while a run trains: weights, turnover of the set, instance weights."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdlib.core.facts import ground_truth, highest_weight, kinds, title, token_names, truth_name
from tdlib.core.records import END, TargetRecord
from tdlib.views.compare import same_tokens
from tdlib.views.figures.runs import plot_evolution, plot_instances
from tdlib.views.figures.style import step_name
from tdlib.views.sheet import weight_sheet
from tdlib.views.view import View

PICTURES = 3  # drawn below an evolution: of the first, middle and last step
MOST_VISUAL = 16  # visual tokens that have a row in an evolution: the heaviest on average


def in_order(records: Sequence[TargetRecord]) -> list[TargetRecord]:
    """Sorts records by step, the end last; records of one step keep their order."""
    return sorted(records, key=lambda record: math.inf if record.step == END else record.step)


def of_statement(
    records: Sequence[TargetRecord], example_id: str, choice: int | None = None, split: str | None = None
) -> list[TargetRecord]:
    """Picks the records of one statement, by step; ``choice`` None takes the right one (else the first)."""
    chosen = [r for r in records if r.example_id == example_id and (split is None or r.split == split)]
    if choice is None and chosen:
        choices = {record.choice for record in chosen}
        choice = chosen[0].label if chosen[0].label in choices else min(choices)
    chosen = [record for record in chosen if record.choice == choice]
    if not chosen:
        ids = list(dict.fromkeys(record.example_id for record in records))
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise ValueError(
            f"no record of {example_id!r}, choice {choice}; there are {shown or 'no records at all'}"
        )
    return in_order(chosen)


def evolution_table(records: Sequence[TargetRecord]) -> pd.DataFrame:
    """Make a table with one row per step and token of one statement's records.

    Columns ``step`` (END for the end), ``order`` (its place from 0), ``position``, ``token``, ``kind``,
    ``weight``, ``score``, ``relevance`` and ``selected``, the records' own numbers.

    Raises:
        ValueError: the records are of several statements or runs, or there are none.
    """
    if not records:
        raise ValueError("no records; expected those of one statement at several steps")
    for record in records:
        same_tokens(records[0], record)
    steps = [record.step for record in records]
    if len(set(steps)) < len(steps):
        raise ValueError(f"two records of one step among those of steps {steps}: pass those of one run")
    shown = ["weight", "score", "relevance", "selected"]
    frames = [
        pd.DataFrame({
            "step": record.step, "order": order, "position": range(len(record.tokens)),
            "token": token_names(records[0]), "kind": kinds(record),
            **{name: getattr(record, name) for name in shown},
        })
        for order, record in enumerate(in_order(records))
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def turnover(before: np.ndarray, after: np.ndarray) -> float:
    """``1 - |A and B| / |A or B|`` of two boolean sets, in [0, 1]; 0 for two empty ones."""
    union = (before | after).sum()
    return float(1 - (before & after).sum() / union) if union else 0.0


def turnover_table(records: Sequence[TargetRecord]) -> pd.DataFrame:
    """Measure how large one statement's selected set is at each step, and how much of it is new.

    One row per step: ``selected_text``, ``selected_visual`` (tokens), ``turnover_text`` and
    ``turnover_visual`` against the step recorded before (missing at the first), and p_T, p_S and c.
    """
    rows = []
    before = None
    for order, record in enumerate(in_order(records)):
        row: dict[str, float] = {"step": record.step, "order": order}
        for name, part in (("text", record.is_text), ("visual", record.is_region)):
            row[f"selected_{name}"] = int((record.selected & part).sum())
            new = math.nan if before is None else turnover(before.selected & part, record.selected & part)
            row[f"turnover_{name}"] = new
        rows.append(row | _instance(record))
        before = record
    return pd.DataFrame(rows)


def _instance(record: TargetRecord) -> dict[str, float]:
    numbers = {
        "p_T": record.teacher_probability, "p_S": record.student_probability, "c": record.instance_weight,
    }  # fmt: skip
    return {name: math.nan if value is None else value for name, value in numbers.items()}


def evolution_view(records: Sequence[TargetRecord], labels: Sequence[str] = ()) -> View:
    """Show one statement over training: tokens x steps as a heat map, set size and turnover, pictures.

    Words and pictures share one scale. The heat map has all text tokens and the ``MOST_VISUAL`` visual tokens
    that weighed most on average; the table, ``evolution_table``, has all tokens. ``records`` are of one
    statement of one run, see ``of_statement``.
    """
    data, steps = evolution_table(records), turnover_table(records)
    records = in_order(records)
    mean = np.mean([record.weight * record.selected for record in records], axis=0)
    first = records[0]
    ever = np.flatnonzero(first.is_region & np.any([record.selected for record in records], axis=0))
    ranked = ever[np.argsort(-mean[ever], kind="stable")][:MOST_VISUAL]
    drawn = np.concatenate([np.flatnonzero(first.is_text), np.sort(ranked)])
    hidden = f"{len(ranked)} of the {len(ever)} visual tokens that were ever selected"
    hidden += f" (of {first.is_region.sum()})"
    places = sorted({*np.linspace(0, len(records) - 1, PICTURES).round().astype(int)})
    highest = highest_weight(records)
    shown = [weight_sheet(records[place], highest) for place in places] if first.is_region.any() else []
    heading = f"{title(first, labels)} over training"
    arguments = {
        "tokens": data[data["position"].isin(drawn)], "steps": steps, "shown": shown, "heading": heading,
        "hidden": hidden, "decisive": {i for i, decides in enumerate(ground_truth(first)) if decides},
        "truth": truth_name([first]), "highest": highest,
    }  # fmt: skip
    names = {"selected_text": "words", "selected_visual": "visual", "turnover_text": "turnover, words",
             "turnover_visual": "turnover, visual", "p_T": "p_T", "p_S": "p_S", "c": "c"}  # fmt: skip
    rows = steps.assign(step=steps["step"].map(step_name))[["step", *names]].rename(columns=names).round(3)
    return View(heading, plot_evolution, arguments, data, rows, first.text)


def instance_view(records: Sequence[TargetRecord] | pd.DataFrame, example_id: str | None = None) -> View:
    """Show instance weights: p_T, p_S and c of one example over training, and c over all examples.

    ``records`` may be a table with ``split``, ``example_id``, ``step``, ``p_T``, ``p_S`` and ``c`` instead.
    p is the probability of the true label; examples without a label are left out. The example
    ``example_id`` is drawn by itself and marked among the others; None marks none. Table: these columns and
    ``order``, the step's place.

    Raises:
        ValueError: no record has an instance weight, or none is of that example.
    """
    keys = ["split", "example_id", "step"]
    if not isinstance(records, pd.DataFrame):
        rows = [{name: getattr(record, name) for name in keys} | _instance(record) for record in records]
        records = pd.DataFrame(rows, columns=[*keys, "p_T", "p_S", "c"])
    data = records.dropna(subset=["c"]).drop_duplicates(keys)  # choices share these numbers
    if data.empty:
        raise ValueError(
            "no record has an instance weight: were the examples labelled, and was there a teacher?"
        )
    if example_id is not None and example_id not in set(data["example_id"]):
        ids = ", ".join(data["example_id"].unique()[:8])
        raise ValueError(f"no instance weight of {example_id!r}; there are {ids}")
    steps = sorted(data["step"].unique(), key=lambda step: (step == END, step))
    data.insert(len(keys), "order", data["step"].map(steps.index))
    data = data.sort_values("order", kind="stable", ignore_index=True)
    if example_id is None and data["example_id"].nunique() == 1:
        example_id = str(data["example_id"].iloc[0])
    heading = f"Instance weights of {data['example_id'].nunique()} examples"
    arguments = {"table": data, "example_id": example_id, "heading": heading}
    note = f"p_T, p_S and c of {example_id}" if example_id else ""
    return View(heading, plot_instances, arguments, data, _instance_rows(data, example_id), note)


def _instance_rows(data: pd.DataFrame, example_id: str | None) -> pd.DataFrame:
    """List means and the spread of c at each step, with the numbers of the chosen example beside them."""
    grouped = data.groupby("order")
    rows = grouped[["p_T", "p_S", "c"]].mean().add_prefix("mean ")
    spread = grouped["c"].quantile([0, 0.25, 0.5, 0.75, 1]).unstack()
    spread.columns = ["c: lowest", "quarter", "median", "three quarters", "highest"]
    rows = rows.join(spread)
    if example_id is not None:
        alone = data[data["example_id"] == example_id].set_index("order")[["p_T", "p_S", "c"]]
        rows = rows.join(alone.add_suffix(f" of {example_id}"))
    rows.insert(0, "step", grouped["step"].first().map(step_name))
    return rows.round(3).reset_index(drop=True)
