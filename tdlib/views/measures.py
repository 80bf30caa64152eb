"""Shows measures of the targeting: against ground truth, and by masking tokens."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from tdlib.core.facts import title
from tdlib.core.records import TargetRecord
from tdlib.data.examples import GROUND_TRUTH
from tdlib.views.figures.protocol import plot_curves, plot_quality
from tdlib.views.view import METHOD, View

if TYPE_CHECKING:
    from tdlib.analysis.masking import Curves


def quality_view(quality: pd.DataFrame, method: str = METHOD) -> View:
    """Show ``targeting.targeting_quality`` as a figure and a table: the targeting beside its baselines.

    Values have 95 % intervals over pictures; the table's gains are targeting minus baseline, paired.

    Raises:
        ValueError: there are no rows.
    """
    if quality.empty:
        raise ValueError("no rows: the measures have nothing to show")
    heading = f"{method}: targeted tokens"
    if (truth := quality["truth"].iloc[0] if "truth" in quality else "") not in ("", GROUND_TRUTH):
        heading += f" against {truth}, a proxy for the ground truth"
    rows = quality[["modality", "metric", "source"]].copy()
    rows["mean [95 %]"] = [_interval(row, "value", "low", "high", "") for row in quality.to_dict("records")]
    rows["gain of the targeting [95 %]"] = [
        _interval(row, "gain", "gain_low", "gain_high", "+") for row in quality.to_dict("records")
    ]
    rows[["records", "pictures"]] = quality[["n", "pictures"]]
    return View(heading, plot_quality, {"quality": quality, "heading": heading}, quality, rows)


def _interval(row: Mapping, value: str, low: str, high: str, sign: str) -> str:
    if pd.isna(row.get(value)):
        return ""
    return f"{row[value]:{sign}.3f} [{row[low]:{sign}.3f}, {row[high]:{sign}.3f}]"


def curves_view(
    record: TargetRecord,
    curves: Mapping[str, "Curves"],
    labels: Sequence[str] = (),
) -> View:
    """Show the deletion and insertion curves of one record, by source (``masking.record_curves``).

    Table: ``source``, ``fraction``, ``deletion``, ``insertion`` (probabilities of the true label).
    """
    columns = ("fraction", "deletion", "insertion")
    frames = [
        pd.DataFrame({"source": name, **{column: getattr(curve, column) for column in columns}})
        for name, curve in curves.items()
    ]
    data = pd.concat(frames, ignore_index=True)
    areas = pd.DataFrame(
        {name: {"deletion": c.deletion_area, "insertion": c.insertion_area} for name, c in curves.items()}
    ).T
    heading = f"{title(record, labels)}: masking tokens"
    arguments = {"curves": data, "areas": areas, "heading": heading}
    rows = areas.add_suffix(", mean height").round(3).rename_axis("source").reset_index()
    return View(heading, plot_curves, arguments, data, rows)
