"""What a batch is to run: its file, the runs that it describes, and every mistake in it.

Executes nothing. A batch file is YAML::

    template: 04_distill          # a notebook in notebooks/, or a path
    parameters: {shots: 48}       # of every run
    grid: {arm: [finetune, clip_td]}              # every combination
    zip: {task: [vcr_qa, snli_ve], shift: [shortcut, balanced]}   # side by side
    exclude: [{arm: finetune, task: snli_ve}]     # combinations that are left out
    include: [{arm: naive, shots: 12}]            # runs beside them
    seeds: 6                      # 0 to 5, or a list
    tuned: tune                   # settings of each arm that `tdlib batch best tune` has chosen
    resources: {cpus: 1, gpus: 0, memory: 4GB, time: 2h}          # of each run
    retries: 0                    # of runs that were killed or lost
    output: runs_dir              # the parameter that says where a run's results go
"""

import ast
import difflib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdlib.config import RunConfig
from tdlib.core.paths import ROOT, ConfigError
from tdlib.runs.engines import Resources
from tdlib.runs.states import identity
from tdlib.training.provenance import named_path

KEYS = (
    "name", "template", "parameters", "grid", "zip", "include", "exclude", "seeds", "tuned", "resources",
    "retries", "output",
)  # fmt: skip


# A notebook's parameters.


def declared_parameters(path: Path) -> dict[str, tuple[str, Any]]:
    """Annotation and default of each parameter in a notebook's ``parameters`` cell.

    Raises:
        ConfigError: there is no such notebook, it is none, or it has not exactly one such cell.
    """
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.ipynb"))) or "none"
        raise ConfigError(f"{path}: no such notebook; there are: {known}")
    try:
        cells = [
            cell
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if "parameters" in cell["metadata"].get("tags", [])
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is no notebook ({type(error).__name__}: {error})") from None
    if len(cells) != 1:
        raise ConfigError(f"{path}: {len(cells)} cells are tagged 'parameters', expected one")
    return {
        node.target.id: (ast.unparse(node.annotation), ast.literal_eval(node.value))
        for node in ast.parse("".join(cells[0]["source"])).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
    }


def notebook_parameters(path: Path) -> dict[str, Any]:
    """Names and default values of a notebook's ``parameters`` cell.

    Raises:
        ConfigError: there is no such notebook or not exactly one such cell.
    """
    return {name: default for name, (_, default) in declared_parameters(path).items()}


def check_parameters(path: Path, parameters: dict[str, Any]) -> None:
    """Papermill only warns about unknown names and takes any type; here both are errors.

    Raises:
        ConfigError: a name that the notebook does not declare, or a value of another type than its default.
    """
    declared = declared_parameters(path)
    problems = [p for name, value in parameters.items() for p in _value_problems(name, value, declared, path)]
    if problems:
        raise ConfigError(
            "bad parameters:\n"
            + "\n".join(f"- {line}" for line in problems)
            + f"\ndeclared: {', '.join(declared)}"
        )


def _value_problems(
    name: str, value: Any, declared: Mapping[str, tuple[str, Any]], path: Path, where: str = ""
) -> list[str]:
    if name not in declared:
        return [f"{where}{name}: unknown parameter of {path.name}{_did_you_mean(name, declared)}"]
    annotation, default = declared[name]
    if annotation.startswith("int") and isinstance(default, int):
        allowed: tuple[type, ...] = (int,)
    elif isinstance(default, int | float) and not isinstance(default, bool):
        allowed = (int, float)
    else:
        allowed = (type(default),)
    if default is None or (
        isinstance(value, allowed) and isinstance(value, bool) == isinstance(default, bool)
    ):
        return []
    return [f"{where}{name}={value!r}: expected {annotation}, like {default!r}"]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# The file.


@dataclass(frozen=True)
class PlannedRun:
    """One run: what differs from the template's defaults, all parameters, and what it depends on."""

    overrides: dict[str, Any]
    parameters: dict[str, Any]
    identity: dict[str, str]

    @property
    def id(self) -> str:
        return self.identity["id"]


@dataclass
class Plan:
    """A batch file, read: its runs in order, and what is wrong with it (then there may be no runs)."""

    name: str
    template: Path
    runs: list[PlannedRun] = field(default_factory=list)
    resources: Resources = field(default_factory=Resources)
    retries: int = 0
    output: str = ""
    problems: list[str] = field(default_factory=list)
    repeated: int = 0  # runs that were described twice
    tuned: list[str] = field(default_factory=list)  # parameters whose values were chosen for each arm

    @property
    def varied(self) -> list[str]:
        """Names of the parameters in which runs differ."""
        names = dict.fromkeys(name for run in self.runs for name in run.overrides)
        return [n for n in names if len({json.dumps(run.parameters.get(n)) for run in self.runs}) > 1]


def read_batch(file: Path) -> dict[str, Any]:
    """The description in a YAML file.

    Raises:
        ConfigError: there is no such file, or it is not YAML with a mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Takes 5e-4 for a number, as YAML 1.2 does; PyYAML takes it for text."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), [*"-+0123456789"]
    )
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"{file}: no such batch; there are: {known}")
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected keys such as {', '.join(KEYS[1:4])}, found {found!r}")
    return found


def plan_batch(
    description: Mapping[str, Any], name: str, folder: Path = ROOT, reports: Path | None = None
) -> Plan:
    """Reads a description; all that is wrong with it is listed in the plan's ``problems``.

    Args:
        description: as in a batch file.
        name: of the batch, if the description names none.
        folder: where a relative template is looked for first.
        reports: folder under which the batches' own lie; ``reports/batches`` if None.
    """
    problems = [f"{key}: unknown key{_did_you_mean(key, KEYS)}" for key in description if key not in KEYS]
    given = {key: description.get(key) for key in KEYS}
    plan = Plan(str(given["name"] or name), _template(given["template"], folder), problems=problems)
    if not re.fullmatch(r"[\w][\w.-]*", plan.name):
        problems.append(f"name={plan.name!r}: expected letters, digits, '.', '-' and '_'")
    plan.resources = _resources(given["resources"], problems)
    plan.retries = given["retries"] or 0
    if not isinstance(plan.retries, int) or isinstance(plan.retries, bool) or plan.retries < 0:
        problems.append(f"retries={plan.retries!r}: expected 0 or more")
    parts = _shapes(given, problems)
    try:
        declared = declared_parameters(plan.template)
    except ConfigError as error:
        problems.append(f"template: {error}")
        return plan
    plan.output = _output(given["output"], parts, declared, plan.template.name, problems)
    problems += _part_problems(parts, declared, plan.template)
    if problems:
        parts = _usable(parts, declared, plan.template)  # so that the rest is looked at as well
    else:
        every, _ = expand(parts | {"exclude": []})
        for number, entry in enumerate(parts["exclude"]):
            if not any(matches(row, entry) for row in every):
                problems.append(f"exclude[{number}]={entry!r}: no run is like that")
    rows, plan.repeated = expand(parts)
    if not rows:
        problems.append("no runs are left: exclude takes away all")
    defaults = {key: default for key, (_, default) in declared.items()}
    if given["tuned"] is not None:
        file = _tuned_file(given["tuned"], folder, reports or ROOT / "reports" / "batches")
        rows, plan.tuned = _with_tuned(file, rows, defaults, problems)
        problems += _tuned_problems(plan.tuned, rows, declared, plan.template)
    template = plan.template.read_bytes()
    problems += _setting_problems(rows, defaults, template.decode(), plan.resources)
    if not problems:
        plan.runs = [
            PlannedRun(row, defaults | row, identity(template, defaults | row, plan.output)) for row in rows
        ]
    return plan


def _template(given: Any, folder: Path) -> Path:
    if not isinstance(given, str) or not given:
        return ROOT / "notebooks" / f"{given or ''}"
    if not given.endswith(".ipynb"):
        return ROOT / "notebooks" / f"{given}.ipynb"
    places = [folder / given, ROOT / given, ROOT / "notebooks" / given]
    return next((place.resolve() for place in places if place.is_file()), places[0])


_UNITS = {"": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "tb": 2**40}
_TIMES = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def _quantity(value: Any, units: Mapping[str, float]) -> float | None:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    unit = match[2].lower().replace("ib", "b") if match else ""
    return float(match[1]) * units[unit] if match and unit in units else None


def _resources(given: Any, problems: list[str]) -> Resources:
    known = ("cpus", "gpus", "memory", "time")
    if given is None:
        return Resources()
    if not isinstance(given, dict):
        problems.append(f"resources={given!r}: expected some of {', '.join(known)}")
        return Resources()
    problems += [f"resources.{key}: unknown{_did_you_mean(key, known)}" for key in given if key not in known]
    values: dict[str, float] = {}
    for key, units in {"cpus": {"": 1}, "gpus": {"": 1}, "memory": _UNITS, "time": _TIMES}.items():
        value = _quantity(given.get(key, 1 if key == "cpus" else 0), units)
        if value is None:
            problems.append(f"resources.{key}={given[key]!r}: expected a number{_with_unit(units)}")
        values[key] = value or 0
    if values["cpus"] <= 0 and isinstance(given["cpus"], int | float):
        problems.append(f"resources.cpus={given.get('cpus')!r}: expected more than 0")
    if values["gpus"] > 1 and values["gpus"] % 1:
        problems.append(f"resources.gpus={given['gpus']!r}: expected a whole number, or a part of one GPU")
    return Resources(values["cpus"], values["gpus"], int(values["memory"]), values["time"])


def _with_unit(units: Mapping[str, float]) -> str:
    return f" and one of {', '.join(unit for unit in units if unit)}" if len(units) > 1 else ""


def _shapes(given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The parts that describe runs, each in its shape; what has another is a problem and left out."""
    parts: dict[str, Any] = {
        "parameters": {},
        "grid": {},
        "zip": {},
        "include": [],
        "exclude": [],
        "seeds": None,
    }
    for key in parts:
        value = given[key]
        if value is None:
            continue
        if key == "parameters":
            good, wanted = isinstance(value, dict), "names with values"
        elif key in ("grid", "zip"):
            good = isinstance(value, dict) and all(isinstance(v, list) and v for v in value.values())
            wanted = "names, each with a list of values"
        elif key == "seeds":
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                value = list(range(value))
            good, wanted = isinstance(value, list) and bool(value), "a number of seeds, or a list of them"
        else:
            good = isinstance(value, list) and all(isinstance(entry, dict) and entry for entry in value)
            wanted = "a list of names with values"
        if good:
            parts[key] = value
        else:
            problems.append(f"{key}={value!r}: expected {wanted}")
    lengths = {name: len(values) for name, values in parts["zip"].items()}
    if len(set(lengths.values())) > 1:
        problems.append(f"zip: lists of different lengths: {lengths}")
    twice = [name for name in parts["zip"] if name in parts["grid"]]
    problems += [f"{name}: stands in grid and in zip" for name in twice]
    if parts["seeds"] is not None:
        places = [key for key in ("parameters", "grid", "zip") if "seed" in parts[key]]
        problems += [f"seed: stands in seeds and in {key}" for key in places]
    return parts


def _output(
    given: Any, parts: Mapping[str, Any], declared: Mapping[str, Any], name: str, problems: list[str]
) -> str:
    output = given if given is not None else "runs_dir" if "runs_dir" in declared else ""
    if output and output not in declared:
        hint = _did_you_mean(output, declared)
        problems.append(f"output={output!r}: unknown parameter of {name}{hint}")
    entries = [parts["parameters"], parts["grid"], parts["zip"], *parts["include"], *parts["exclude"]]
    if output and any(output in entry for entry in entries):
        problems.append(f"{output}: is set by the batch (results of a run go into its folder)")
    return output


def _part_problems(parts: Mapping[str, Any], declared: Mapping[str, Any], template: Path) -> list[str]:
    """Unknown names and wrong types, in each part."""
    values = [("parameters.", name, value) for name, value in parts["parameters"].items()]
    for key in ("grid", "zip"):
        values += [(f"{key}.", name, value) for name, given in parts[key].items() for value in given]
    for key in ("include", "exclude"):
        for number, entry in enumerate(parts[key]):
            for name, value in entry.items():
                alternatives = value if key == "exclude" and isinstance(value, list) else [value]
                values += [(f"{key}[{number}].", name, alternative) for alternative in alternatives]
    values += [("seeds: ", "seed", seed) for seed in parts["seeds"] or []]
    found = [
        p for where, name, value in values for p in _value_problems(name, value, declared, template, where)
    ]
    return list(dict.fromkeys(found))


def _usable(parts: Mapping[str, Any], declared: Mapping[str, Any], template: Path) -> dict[str, Any]:
    """The parts without what is wrong in them."""

    def good(name: str, value: Any) -> bool:
        return not _value_problems(name, value, declared, template)

    zipped = {n: given for n, given in parts["zip"].items() if all(good(n, value) for value in given)}
    grid = {n: [value for value in given if good(n, value)] for n, given in parts["grid"].items()}
    return {
        "parameters": {n: value for n, value in parts["parameters"].items() if good(n, value)},
        "grid": {n: given for n, given in grid.items() if given},
        "zip": zipped if len({len(given) for given in zipped.values()}) == 1 else {},
        "include": [{n: v for n, v in entry.items() if good(n, v)} for entry in parts["include"]],
        "exclude": [],
        "seeds": None,
    }


def expand(parts: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """What each run sets, in order, and how many were described twice.

    Every combination of ``grid`` and of the rows of ``zip``, less those that match an entry of
    ``exclude`` (all its values; a list means any of them), and the entries of ``include``; all on top
    of ``parameters``. With ``include`` alone there is no other run. Each comes with every seed, one
    seed after the other, so that a batch cut short has compared something.
    """
    axes = [[{name: value} for value in values] for name, values in parts.get("grid", {}).items()]
    if parts.get("zip"):
        names = list(parts["zip"])
        axes.append([dict(zip(names, row, strict=True)) for row in zip(*parts["zip"].values(), strict=True)])
    base = dict(parts.get("parameters", {}))
    rows: list[dict[str, Any]] = []
    if axes or not parts.get("include"):
        for combination in itertools.product(*axes):
            row = base | {name: value for part in combination for name, value in part.items()}
            if not any(matches(row, entry) for entry in parts.get("exclude", [])):
                rows.append(row)
    rows += [base | entry for entry in parts.get("include", [])]
    if parts.get("seeds"):
        rows = [{"seed": seed} | row for seed in parts["seeds"] for row in rows]
    distinct = {json.dumps(row, sort_keys=True): row for row in rows}
    return list(distinct.values()), len(rows) - len(distinct)


def _tuned_file(given: Any, folder: Path, reports: Path) -> Path:
    """Where a batch has left the settings that were chosen: the batch's name, or a path."""
    text = str(given)
    if not text.endswith(".json"):
        return reports / text / "tuned.json"
    return next((path for path in (folder / text, ROOT / text) if path.is_file()), folder / text)


def _with_tuned(
    file: Path, rows: list[dict[str, Any]], defaults: dict[str, Any], problems: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows with what was chosen for each, and the names of all that was; what does not fit is a problem."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        chosen = [(dict(entry["where"]), dict(entry["settings"])) for entry in known["chosen"]]
        seeds = set(known["seeds"])
    except FileNotFoundError:
        problems.append(f"tuned: there is no {file}; `tdlib batch best NAME` writes it in a finished batch")
        return rows, []
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(
            f"tuned: {file} is not what `tdlib batch best` writes ({type(error).__name__}: {error})"
        )
        return rows, []
    names = list(dict.fromkeys(name for _, settings in chosen for name in settings))
    problems += [f"{name}: is set here and by tuned" for name in names if any(name in row for row in rows)]
    again = sorted({row["seed"] for row in rows if row.get("seed") in seeds})
    if again:
        problems.append(f"seeds: {again} were tuned with, so their results are too good; take others")
    found = []
    for row in rows:
        fitting = [settings for where, settings in chosen if matches(defaults | row, where)]
        if not fitting and chosen:
            wanted = {name: (defaults | row).get(name) for name in chosen[0][0]}
            problems.append(f"tuned: nothing was chosen for {wanted}")
        found.append(row | (fitting[0] if fitting else {}))
    problems[:] = dict.fromkeys(problems)
    return found, names


def _tuned_problems(
    names: Iterable[str], rows: Iterable[Mapping[str, Any]], declared: Mapping[str, Any], template: Path
) -> list[str]:
    values = [(name, row[name]) for row in rows for name in names if name in row]
    found = [p for name, value in values for p in _value_problems(name, value, declared, template, "tuned.")]
    return list(dict.fromkeys(found))


def matches(row: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether parameters have all of an entry's values; a list means any of them."""
    return all(
        row[name] in value if isinstance(value, list) else row[name] == value
        for name, value in entry.items()
        if name in row
    ) and all(name in row for name in entry)


def _setting_problems(
    rows: list[dict[str, Any]], defaults: dict[str, Any], source: str, resources: Resources
) -> list[str]:
    """Files that are not there; where the template builds a ``RunConfig``, bad values and combinations."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(dict.fromkeys(_missing_files(row, defaults), 1))
        if "RunConfig" in source:
            counts.update(dict.fromkeys(_config_problems(defaults | row, source), 1))
            counts.update(dict.fromkeys(_gpu_problems(defaults | row, resources.gpus), 1))
    return [f"{text} ({number} of {len(rows)} runs)" for text, number in counts.items()]


def _missing_files(row: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Of what the run sets itself, and of teacher and student, which every run reads."""
    found = []
    for name, value in (defaults | row).items():
        if name not in row and name not in ("teacher", "student"):
            continue
        path = named_path(value, anything=name == "data_dir")
        local = name == "data_dir" or (isinstance(value, str) and re.match(r"(.*:)?(data/|[./~])", value))
        if path and local and not path.exists():
            found.append(f"{name}={value!r}: there is no {path}")
        elif path and name == "data_dir" and path.is_file():
            found.append(f"{name}={value!r}: is a file, expected a data set's folder")
    return found


def _gpu_problems(row: Mapping[str, Any], gpus: float) -> list[str]:
    """Settings that need other GPUs than a run is to have."""
    found, processes = [], row.get("processes", 1)
    if 0 < gpus < processes > 1:
        found.append(
            f"processes={processes}: each needs a GPU; set resources.gpus to {processes}, or to 0 for the CPU"
        )
    if row.get("precision") == "fp16" and not gpus:
        found.append("precision='fp16' needs a GPU; set resources.gpus")
    return found


def _config_problems(row: Mapping[str, Any], source: str) -> list[str]:
    from tdlib.config import apply_arm
    from tdlib.data.tasks import splits_of, submission_split

    settings = {name: value for name, value in row.items() if name in RunConfig.model_fields}
    for name, value in row.items():
        # A function of the template's own: its table has it only when the notebook runs.
        if isinstance(value, str) and value and re.search(rf"\[\W*{re.escape(value)}\W*\]\s*=", source):
            settings.pop(name, None)
    shots = settings.get("shots", 0)
    if isinstance(shots, float) and shots >= 1:
        settings["shots"] = int(shots)
    try:
        config = apply_arm(RunConfig.from_parameters(**settings))
        train, evaluated = splits_of(config)
        asked = [train, *evaluated, submission_split(config.task) if row.get("submission") else ""]
        return _split_problems(config, [split for split in asked if split])
    except ConfigError as error:
        lines = [line.removeprefix("- ") for line in str(error).splitlines()]
        return [line for line in lines if line != "bad parameters:"]
    except OSError as error:
        return [str(error)]


def _split_problems(config: RunConfig, splits: Iterable[str]) -> list[str]:
    """Splits that a named data set lacks. Sets that rules make of others are not made here."""
    from tdlib.data.examples import DataError
    from tdlib.data.tasks import HELD_OUT, data_folder, reader
    from tdlib.data.vcr_shifts import RULES

    if not config.data_dir or not data_folder(config).is_dir():
        return []
    found = []
    for split in dict.fromkeys(splits):
        source = split.removesuffix(HELD_OUT)
        for rule in RULES:
            source = source.removesuffix(f"_{rule}")
        try:
            reader(config, source)
        except DataError as error:
            found.append(str(error))
    return found


# How long it will take.


def estimate(plan: Plan, earlier: Iterable[tuple[dict[str, Any], float]]) -> dict[str, float]:
    """Seconds of each run by its id: the median of those earlier ones that are most like it.

    Args:
        plan: the runs.
        earlier: parameters and seconds of finished runs of the same template.
    """
    earlier = [(known, seconds) for known, seconds in earlier if seconds]
    found = {}
    for run in plan.runs:
        likeness = [
            (sum(known.get(name) == value for name, value in run.parameters.items()), seconds)
            for known, seconds in earlier
        ]
        best = max((score for score, _ in likeness), default=0)
        nearest = sorted(seconds for score, seconds in likeness if score == best)
        if nearest:
            found[run.id] = nearest[len(nearest) // 2]
    return found
