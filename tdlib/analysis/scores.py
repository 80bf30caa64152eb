"""Reads batches and run folders into tables: a row per run, or per example that a run was scored on.

Every comparison starts here. Reads states, parameters, manifests and predictions; scrapes no notebook and
loads no model.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tdlib.config import RunConfig, parameters_with
from tdlib.core.paths import did_you_mean
from tdlib.core.provenance import canonical, canonical_json
from tdlib.data.tasks import TASKS
from tdlib.data.vcr_results import joint_scores
from tdlib.miniworld.worlds import STRATA
from tdlib.runs.batch import find_batch
from tdlib.runs.report import batch_record, open_results, recorded_runs

log = logging.getLogger(__name__)

RUN_COLUMNS = [
    "batch", "run", "state", "reason", "task", "shots", "arm", "seed", "world", "setting", "train_examples",
    "subset", "tuned", "of_size", "shared", "commit",
]  # fmt: skip
SCORE_COLUMNS = ["batch", "run", "measure", "split", "id", "question", "image", "score", "chance", *STRATA]
DESCRIBED = ("task", "shots", "arm", "seed")  # parameters with a separate column
# Parameters that a batch may vary along with the size: how long and how fast is trained, what is tested.
FOLLOWS_SIZE = (*parameters_with(role="training"), "eval_splits", "shift")
# The parts of VCR that a run of both has answered, beside its own measure.
_PARTS = {"vcr_qa": "", "vcr_qar": "r"}


class ProtocolError(ValueError):
    """Runs that cannot be compared: names them, what differs, and what was expected."""


# Batches.


def read_runs(*folders: Path) -> pd.DataFrame:
    """Every run of batches, finished or not; one that several of them have counts once.

    Columns: batch, run, state, reason, task, shots, arm, seed, world, setting, train_examples, subset, tuned,
    of_size, shared, commit. ``world`` is the seed of the MiniWorld, "" for a user's own data; ``setting``
    names the other parameters in which runs of one task differ, ``of_size`` those that differ with ``shots``
    alone (so many epochs for so few examples), ``shared`` those that all runs of the task have in common and
    that are not the default, with teacher and student; ``tuned`` those that were tuned for each arm, and so
    belong to it; parameters that a batch calls ``variants`` are part of the arm's name. Batches whose code,
    data or weights differ, or of which one was tuned, differ in their setting too. ``subset`` is a digest of
    the ids in manifest.json, empty for runs that are not done, ``commit`` the code's. Of a run that never
    began, and that the batch's file no longer describes, only batch, run and state are known.

    Raises:
        FileNotFoundError: no batch was ever run in a folder.
        ProtocolError: a batch's template does not train arms, or a finished run has no manifest.
    """
    rows: list[dict[str, Any]] = []
    facts: list[tuple[dict[str, str], dict[str, Any]]] = []  # of each row: its settings, its version
    variants = sorted({name for folder in folders for name in batch_record(folder).get("variants", [])})
    for folder in map(Path, folders):
        tuned = batch_record(folder).get("tuned", [])
        for entry in recorded_runs(folder).to_dict("records"):
            row: dict[str, Any] = {"batch": folder.name, "world": "", "subset": "", "tuned": "", "commit": ""}
            row |= {name: entry[name] for name in ("run", "state", "reason")}
            known, version = dict[str, str](), dict[str, Any]()
            if (parameters := entry["parameters"]) is not None:
                row |= _described(folder, parameters, tuned, variants)
                apart = ("world_seed", "interactive", entry["output"], *parameters_with(role="machine"))
                hidden = (*DESCRIBED, *apart, *tuned, *variants)
                known = {n: canonical_json(v) for n, v in parameters.items() if n not in hidden}
                known["tuned"] = ", ".join(tuned)
                version = _version(entry["identity"], parameters, entry["output"])
            if entry["state"] == "done":
                row |= _learned(folder / entry["run"])
            rows.append(row)
            facts.append((known, version))
    table = pd.DataFrame(rows, columns=RUN_COLUMNS)
    _refuse_two_ways(table, [known.get("tuned", "") for known, _ in facts])
    finished = table.sort_values("state", key=lambda state: state != "done", kind="stable")
    table = finished.drop_duplicates("run").sort_index()  # what is known of a run is of the row that is kept
    described = {run: facts[row][0] for row, run in table["run"].items() if facts[row][0]}
    versions = {run: facts[row][1] for row, run in table["run"].items() if facts[row][0]}
    table = table.reset_index(drop=True)
    for run, name in _versions(table, versions).items():
        described[run]["version"] = name
    for name, of_runs in zip(("setting", "of_size", "shared"), _settings(table, described), strict=True):
        table[name] = [of_runs.get(run, "") for run in table["run"]]
    return table


def _refuse_two_ways(runs: pd.DataFrame, tuned: Sequence[str]) -> None:
    """Refuses a run that one batch tuned and another did not: it would be a baseline for one of them only."""
    ways = runs.assign(tuned=tuned)[runs["arm"].notna()].drop_duplicates(["run", "tuned"])
    shared = ways[ways.duplicated("run", keep=False)]
    if len(shared):
        raise ProtocolError(
            f"{', '.join(sorted(set(shared['batch'])))} share runs (such as {shared['run'].iloc[0]}), which "
            "one of them tuned and another did not; read them one after the other, as a study each"
        )


def _described(
    folder: Path, parameters: Mapping[str, Any], tuned: Sequence[str], variants: Sequence[str]
) -> dict[str, Any]:
    """The columns of a run that its parameters tell."""
    lacking = [name for name in DESCRIBED if name not in parameters]
    if lacking:
        raise ProtocolError(
            f"{folder}: its template has no parameter {', '.join(lacking)}; "
            "expected a batch of 04_distill or of a notebook with its parameters"
        )
    row = {name: parameters[name] for name in DESCRIBED} | {"arm": _variant(parameters, variants)}
    if not parameters.get("data_dir"):
        row["world"] = str(parameters.get("world_seed", ""))
    return row | {"tuned": ", ".join(f"{name}={canonical_json(parameters.get(name))}" for name in tuned)}


def _variant(parameters: Mapping[str, Any], names: Sequence[str]) -> str:
    """Names a run's arm, with the values of these parameters that are not the default."""
    values = {name: canonical(parameters[name]) for name in names if name in parameters}
    more = [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
        if not _is_default(name, canonical_json(value))
    ]
    return ", ".join([str(parameters["arm"]), *more])


def _is_default(name: str, value: str) -> bool:
    """Whether a value, as canonical JSON, is that of RunConfig."""
    fields = RunConfig.model_fields
    return name in fields and value == canonical_json(fields[name].default)


def _version(identity: Mapping[str, Any], parameters: Mapping[str, Any], output: str) -> dict[str, Any]:
    """What else a run's result depends on, of its recorded identity; empty for a run that did not begin.

    The code of library and template, and the digest of data and weights by the parameters that name them.
    """
    if not identity:
        return {}
    others = {"arm", "seed", "shots", output}
    others.update(*(parameters_with(role=role) for role in ("method", "training", "recording", "machine")))
    names = canonical_json({name: value for name, value in parameters.items() if name not in others})
    return {"code": (identity["code"], identity["template"]), names: identity["data"]}


def _versions(runs: pd.DataFrame, versions: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Names the version of each run: the first batch of its task with the same code, data and weights.

    Within a batch all are the same, as a change of one makes all its runs anew.
    """
    named = dict[str, str]()
    known = runs[runs["run"].isin(list(versions))]
    for _, of_task in known.groupby("task", sort=False):
        kinds: dict[str, dict[str, Any]] = {}
        for batch, own in of_task.groupby("batch", sort=False):
            facts = {name: value for run in own["run"] for name, value in versions[run].items()}
            alike = (
                name for name, theirs in kinds.items()
                if all(theirs.get(fact, value) == value for fact, value in facts.items())
            )  # fmt: skip
            version = next(alike, str(batch))
            kinds.setdefault(version, {}).update(facts)
            named |= dict.fromkeys(own["run"], version)
    return named


def _settings(runs: pd.DataFrame, described: Mapping[str, Mapping[str, str]]) -> list[dict[str, str]]:
    """Names what tells runs of a task apart, what differs with their size alone, and what all share.

    All three by run, as "name=value, ...".
    """
    apart, of_size, shared = dict[str, str](), dict[str, str](), dict[str, str]()
    for _, own in runs.groupby("task"):
        known = pd.DataFrame([described[run] for run in own["run"]], index=own["run"], dtype=object).fillna(
            ""
        )
        by_size = known.groupby(own["shots"].to_numpy()).nunique().max()
        varied = [name for name in known if known[name].nunique() > 1]
        sized = [name for name in varied if name in FOLLOWS_SIZE and by_size[name] == 1]
        alike = [
            name for name in known
            if name not in (*varied, "version")
            and (name in ("teacher", "student") or not _is_default(name, known[name].iloc[0]))
        ]  # fmt: skip
        told = (apart, [name for name in varied if name not in sized]), (of_size, sized), (shared, alike)
        for run, values in known.iterrows():
            for found, names in told:
                found[str(run)] = ", ".join(f"{name}={values[name]}" for name in names if values[name])
    return [apart, of_size, shared]


def _learned(folder: Path) -> dict[str, Any]:
    """What a finished run learned from, and by which code."""
    manifests = sorted((folder / "output").rglob("manifest.json"))
    if len(manifests) != 1:
        raise ProtocolError(
            f"{folder}: a finished run with {len(manifests)} files manifest.json in its output; expected one"
        )
    ids = json.loads(manifests[0].read_text(encoding="utf-8"))["ids"]
    commits = [
        json.loads(file.read_text(encoding="utf-8")).get("code") or ""
        for file in (folder / "output").rglob("environment.json")
    ]
    digest = hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()[:12]
    return {"train_examples": len(ids), "subset": digest, "commit": ", ".join(sorted(set(commits)))}


def collect(reports: Path, batches: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Reads runs and scores of batches in ``reports``; lists what is missing, with the command to make it.

    The batches are read as one: an arm of one is paired with the baseline of another, if the setting is the
    same (``read_runs``).

    Raises:
        ProtocolError: a batch has neither been run nor a file among those of the project; see ``read_runs``.
    """
    homes, missing = [Path(reports) / name for name in dict.fromkeys(batches)], []
    folders = [folder for folder in homes if (folder / "batch.json").is_file()]
    for home in homes:
        if home not in folders and not (file := find_batch(home.name)).is_file():
            names = [path.parent.name for path in Path(reports).glob("*/batch.json")]
            names += [path.stem for path in file.parent.glob("*.yaml")]
            raise ProtocolError(f"{home.name}: there is no such batch{did_you_mean(home.name, names)}")
    runs, scores = read_runs(*folders), [pd.DataFrame(columns=SCORE_COLUMNS)]
    for folder in folders:
        name, of_batch = folder.name, runs[runs["batch"] == folder.name]
        undone = int((of_batch["state"] != "done").sum())
        if undone:
            missing.append(
                f"{name}: {undone} of {len(of_batch)} runs are not done; `tdlib batch status {name}` says "
                f"why, `tdlib batch resume {name}` goes on"
            )
        if undone < len(of_batch):
            scores.append(read_scores(folder, of_batch))
    if any("version=" in setting for setting in runs["setting"]):
        missing.append(
            "Code, data or weights differ between these batches (version, in the settings): their runs are "
            "never a pair; run the baseline anew beside the arms"
        )
    missing += [
        f"{home.name}: was not run here ({home}); `tdlib batch run {home.name}` does it"
        for home in homes
        if home not in folders
    ]
    return runs, pd.concat(scores[1:] or scores, ignore_index=True), missing


def read_scores(folder: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """Read the score of every finished run on every labelled example.

    Columns: ``SCORE_COLUMNS``, with score and chance in [0, 1]. ``measure`` is the task's (``Task.metric``).
    A run of task "vcr" has three: Q->AR, where a row is a question, right if answer and rationale are, and
    its parts Q->A and QA->R. ``chance`` is what guessing scores on the example (``data.chance``). The
    ``STRATA`` tell kinds of examples apart, "" where the data, or a run of an earlier version, do not say.
    ``runs`` are those of ``read_runs`` for this batch's folder.

    Raises:
        ProtocolError: a finished run has left no predictions, or has some scores missing.
    """
    with open_results(folder, runs[["run", "state"]]) as connection:
        wanted = ["run", "split", "id", "question", "part", "image", "score", "chance", *STRATA]
        columns = "SELECT column_name FROM duckdb_columns() WHERE table_name = 'predictions'"
        held = {name for (name,) in connection.execute(columns).fetchall()}  # nothing if no run has left any
        found = [name for name in wanted if name in held]
        predictions = connection.execute(f"SELECT {', '.join(found)} FROM predictions").df() if held else None
    predictions = pd.DataFrame(predictions, columns=wanted)
    bare = predictions["concept"].isna().groupby(predictions["run"]).all()
    if bare.any():
        log.warning(
            "%s: %d of %d runs are of an earlier version, which did not record what examples are about; "
            "tables of kinds of examples leave them out", folder, bare.sum(), len(bare),
        )  # fmt: skip
    predictions[STRATA] = predictions[STRATA].astype(object).fillna("")
    done = runs[runs["state"] == "done"].set_index("run")
    without = sorted(set(done.index) - set(predictions["run"]))
    if without:
        raise ProtocolError(f"{folder}: finished without predictions.parquet: {', '.join(without)}")
    frames = []
    for (run, split), rows in predictions.groupby(["run", "split"], sort=False):
        labelled = rows["score"].notna()
        if not labelled.any():
            continue  # a test without labels
        if not labelled.all():
            raise ProtocolError(
                f"{folder / str(run)}: {(~labelled).sum()} of {len(rows)} scores of split {split!r} are "
                f"missing (first: {rows.loc[~labelled, 'id'].iloc[0]!r}); expected all of them, or none"
            )
        task = done.at[run, "task"]
        measured = {task: rows}
        if TASKS[task].has_parts:
            measured = {task: joint_predictions(rows)}
            measured |= {name: rows[rows["part"] == part] for name, part in _PARTS.items()}
        for name, own in measured.items():
            frames.append(own.assign(batch=folder.name, measure=TASKS[name].metric)[SCORE_COLUMNS])
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=SCORE_COLUMNS)


# Run folders.


def read_predictions(folders: Sequence[Path]) -> pd.DataFrame:
    """Reads predictions of several runs into one table, with columns arm and seed."""
    frames = []
    for folder in folders:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        frames.append(
            pd.read_parquet(folder / "predictions.parquet").assign(arm=config["arm"], seed=config["seed"])
        )
    return pd.concat(frames, ignore_index=True)


def joint_predictions(predictions: pd.DataFrame) -> pd.DataFrame:
    """Makes Q->AR rows (``vcr_results.joint_scores``) of the rows of task "vcr"; other tasks' stay unchanged.

    Predictions of several runs are told apart by the columns run, or arm and seed.
    """
    if (predictions["part"] == "").all():
        return predictions
    return joint_scores(predictions, [n for n in ("run", "arm", "seed", "split") if n in predictions])
