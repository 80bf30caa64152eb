"""Tables of several runs: their predictions together, and each arm's mean beside the baseline's."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tdlib.analysis.statistics import adjusted_together, bootstrap_interval, paired_difference
from tdlib.data.vcr import joint_scores


def read_predictions(folders: Sequence[Path]) -> pd.DataFrame:
    """Predictions of several runs as one table with columns arm and seed."""
    frames = []
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        frames.append(
            pd.read_parquet(folder / "predictions.parquet").assign(arm=config["arm"], seed=config["seed"])
        )
    return pd.concat(frames, ignore_index=True)


def joint_predictions(predictions: pd.DataFrame) -> pd.DataFrame:
    """Q->AR rows (answer and rationale both right) from the rows of task "vcr", or the rows as they are."""
    if "part" not in predictions or predictions["part"].isna().any():
        # Runs of earlier versions did not record question and part; the end of the id told them.
        part = predictions["id"].str.extract(r":(r)$")[0].fillna("")
        predictions = predictions.assign(part=part, question=predictions["id"].str.removesuffix(":r"))
    if (predictions["part"] == "").all():
        return predictions
    return joint_scores(predictions, ["arm", "seed", "split"])


def summarise(predictions: pd.DataFrame, baseline: str = "finetune") -> pd.DataFrame:
    """Mean score per arm and split with 95 % intervals, and the paired difference to the baseline.

    Columns: arm, split, mean, low, high, n (seeds), difference, difference_low, difference_high, and the
    verdict of ``statistics.PairedDifference``, corrected for the number of arms on the same split.
    Intervals: two-level bootstrap over seeds and over pictures. Splits without labels are left out;
    for task "vcr" the score is Q->AR.
    """
    rows = []
    predictions = predictions[~predictions["split"].isin(_unlabelled(predictions))]
    for split, part in joint_predictions(predictions).groupby("split", sort=False):
        tables = {
            arm: own.pivot(index="seed", columns="id", values="score").astype(float)
            for arm, own in part.groupby("arm", sort=False)
        }
        images = part.drop_duplicates("id").set_index("id")["image"]
        compared = {
            arm: paired_difference(
                table.to_numpy(),
                tables[baseline].loc[table.index, table.columns].to_numpy(),
                images[table.columns].to_numpy(),
            )
            for arm, table in tables.items()
            if arm != baseline and baseline in tables
        }
        compared = adjusted_together(compared)
        for arm, table in tables.items():
            values = table.to_numpy()
            low, high = bootstrap_interval(values, images[table.columns].to_numpy())
            row = {
                "arm": arm, "split": split, "mean": values.mean(), "low": low, "high": high, "n": len(table),
            }  # fmt: skip
            if arm in compared:
                gain = compared[arm]
                row |= {
                    "difference": gain.difference, "difference_low": gain.low, "difference_high": gain.high,
                    "verdict": gain.verdict(),
                }  # fmt: skip
            rows.append(row)
    return pd.DataFrame(rows)


def _unlabelled(predictions: pd.DataFrame) -> list[str]:
    """Splits without labels: a test split's scores are all missing."""
    known = predictions.groupby("split", sort=False)["score"].count()
    return list(known[known == 0].index)
