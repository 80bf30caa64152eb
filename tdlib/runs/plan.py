"""Plans a batch: reads its file, expands it into runs and lists every mistake in it.

Executes nothing. A batch file is YAML::

    template: 04_distill          # a notebook in notebooks/, or a path
    parameters: {shots: 48}       # of every run
    grid: {arm: [finetune, clip_td]}              # every combination
    zip: {task: [vcr_qa, snli_ve], shift: [shortcut, balanced]}   # side by side
    exclude: [{arm: finetune, task: snli_ve}]     # combinations that are left out
    include: [{arm: naive, shots: 12}]            # runs beside them
    seeds: 6                      # 0 to 5, or a list
    tuned: tune                   # settings of each arm that `tdlib batch best tune` has chosen
    variants: [repair_share]      # parameters that make variants of an arm, compared like other arms
    resources: {cpus: 1, gpus: 0, memory: 4GB, time: 2h}          # of each run
    retries: 0                    # of runs that were killed or lost
    output: runs_dir              # the parameter that says where a run's results go

It is read as YAML 1.2: ``no``, ``1:30`` and ``2026-01-02`` are text, and what tools disagree about (a
number with a leading zero, a key that stands twice) is refused with its line.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from tdlib.core.files import parse_json
from tdlib.core.paths import ROOT, ConfigError, did_you_mean
from tdlib.core.provenance import canonical_json, code_version
from tdlib.runs.checks import notes, run_problems, without_effect
from tdlib.runs.engines import Resources
from tdlib.runs.states import identity
from tdlib.runs.template import UNKNOWN, Template, find_notebook, no_such, read_template

# The file.


def read_batch(file: Path) -> dict[str, Any]:
    """Reads a batch file; ConfigError names the file and what is wrong with it."""
    if not file.is_file():
        raise no_such("batch", file, ".yaml")
    try:
        description = yaml.load(file.read_text(encoding="utf-8-sig"), _Loader)
    except ConfigError as error:
        raise ConfigError(f"{file}:{error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is not YAML: {error}") from None
    if not isinstance(description, dict):
        usual = ", ".join(list(Description.model_fields)[1:4])
        raise ConfigError(f"{file}: expected keys such as {usual}, found {description!r}")
    return description


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with scalars of YAML 1.2; PyYAML alone reads ``010`` as 8 and ``no`` as False."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML reads the class)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":  # what it brings, the mapping may override
                continue
            name, line = str(self.construct_object(key, deep=True)), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(f"{line}: {name!r} stands here and in line {lines[name]}; keep one of them")
            lines[name] = line
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        text = node.value.lower()
        if re.fullmatch(r"[-+]?0\d+", text):
            raise ConfigError(
                f"{node.start_mark.line + 1}: {node.value}: a number with a leading zero; write "
                f"{int(text)}, or '{node.value}' if it is text"
            )
        if text[:2] in ("0o", "0x"):
            return int(text, 0)
        if text.lstrip("+-") in (".inf", ".nan"):
            return float(text.replace(".", "", 1))
        return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


_NUMBER = r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|0o[0-7]+|0x[0-9a-fA-F]+|[-+]?\.(inf|Inf|INF)"
_NUMBER += r"|\.(nan|NaN|NAN)"
for _tag, _pattern, _starts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("number", _NUMBER, [*"-+.0123456789"]),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _starts)
_Loader.add_constructor("tag:yaml.org,2002:number", _Loader.construct_number)


_Names = dict[StrictStr, Any]
_Axes = dict[StrictStr, Annotated[list[Any], Field(min_length=1)]]
_Entries = list[Annotated[_Names, Field(min_length=1)]]


class Description(BaseModel):
    """The keys of a batch file; a field's description says what an error expects."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field("", pattern=r"^(\w[\w.-]*)?$", description="letters, digits, '.', '-' and '_'")
    template: StrictStr = Field("", description="a notebook's name or path")
    parameters: _Names = Field({}, description="names with values")
    grid: _Axes = Field({}, description="names, each with a list of values")
    zip: _Axes = Field({}, description="names, each with a list of values")
    include: _Entries = Field([], description="a list of names with values")
    exclude: _Entries = Field([], description="a list of names with values")
    seeds: Annotated[StrictInt, Field(gt=0)] | Annotated[list[Any], Field(min_length=1)] | None = Field(
        None, description="a number of seeds, or a list of them"
    )
    tuned: StrictStr | None = Field(None, description="the name of a batch, or a path of its tuned.json")
    variants: list[StrictStr] = Field([], description="a list of parameters")
    resources: Resources = Field(default_factory=Resources, description="some of cpus, gpus, memory, time")
    retries: StrictInt = Field(0, ge=0, description="0 or more")
    output: StrictStr | None = Field(None, description="the name of a parameter")

    def all_seeds(self) -> list[Any]:
        return list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds or [])

    def values(self) -> list[tuple[str, str, Any]]:
        """Lists every value that it gives a parameter, as (place, name, value)."""
        values = [("parameters.", name, value) for name, value in self.parameters.items()]
        for key, axes in (("grid", self.grid), ("zip", self.zip)):
            values += [(f"{key}.", name, value) for name, axis in axes.items() for value in axis]
        for key, entries in (("include", self.include), ("exclude", self.exclude)):
            for number, entry in enumerate(entries):
                for name, value in entry.items():
                    alternatives = value if key == "exclude" and isinstance(value, list) else [value]
                    values += [(f"{key}[{number}].", name, alternative) for alternative in alternatives]
        return values + [("seeds: ", "seed", seed) for seed in self.all_seeds()]


def read_description(given: Mapping[str, Any]) -> tuple[Description, list[str]]:
    """Reads the valid keys and lists what is wrong with the others. A key without value is ignored."""
    remaining: dict[Any, Any] = {key: value for key, value in given.items() if value is not None}
    try:
        return Description.model_validate(remaining), []
    except ValidationError as error:
        problems = dict.fromkeys(_key_problem(item["loc"], remaining) for item in error.errors())
        for key in {item["loc"][0] for item in error.errors()}:
            del remaining[key]
        return Description.model_validate(remaining), [*problems]


def _key_problem(place: tuple[Any, ...], given: Mapping[Any, Any]) -> str:
    key, value = place[0], given[place[0]]
    if key not in Description.model_fields:
        return f"{key}: unknown key{did_you_mean(key, Description.model_fields)}"
    if key == "resources" and isinstance(value, dict) and len(place) > 1:
        inner, known = place[1], Resources.model_fields
        if inner not in known:
            return f"resources.{inner}: unknown{did_you_mean(inner, known)}"
        return f"resources.{inner}={value[inner]!r}: expected {known[inner].description}"
    return f"{key}={value!r}: expected {Description.model_fields[key].description}"


# Plans.


@dataclass(frozen=True)
class PlannedRun:
    """One run: the parameters that the batch sets, all of them, and its identity (``states.identity``)."""

    overrides: dict[str, Any]
    parameters: dict[str, Any]
    identity: dict[str, str]
    notes: tuple[str, ...] = ()  # on settings that only the run can check

    @property
    def id(self) -> str:
        return self.identity["id"]


@dataclass
class Plan:
    """A batch file that was read: its runs in order, and its mistakes (then there may be no runs)."""

    name: str
    template: Path
    runs: list[PlannedRun] = field(default_factory=list)
    resources: Resources = field(default_factory=Resources)
    retries: int = 0
    output: str = ""
    problems: list[str] = field(default_factory=list)
    repeated: int = 0  # how many runs the file describes more than once
    tuned: list[str] = field(default_factory=list)  # parameters whose values were chosen for each arm
    variants: list[str] = field(default_factory=list)  # parameters that make variants of an arm

    @property
    def varied(self) -> list[str]:
        """Names of the parameters in which runs differ."""
        names = dict.fromkeys(name for run in self.runs for name in run.overrides)
        return [n for n in names if len({canonical_json(run.parameters.get(n)) for run in self.runs}) > 1]


def plan_batch(
    description: Mapping[str, Any], name: str, folder: Path = ROOT, reports: Path | None = None
) -> Plan:
    """Reads a description; the plan's ``problems`` list everything that is wrong with it.

    ``name`` names the batch if the description does not; a relative template is looked for in ``folder``
    first; ``reports`` holds the folders of batches (``reports/batches`` if None).
    """
    whole, problems = read_description(description)
    plan = Plan(whole.name or name, find_notebook(whole.template, folder), problems=problems)
    plan.resources, plan.retries, plan.variants = whole.resources, whole.retries, whole.variants
    problems += _conflicts(whole)
    try:
        template = read_template(plan.template)
    except ConfigError as error:
        problems.append(f"template: {error}")
        return plan
    plan.output = _output(whole, template, problems)
    unknown = [name for name in whole.variants if name not in template.parameters]
    problems += [f"variants: {template.problem(name, None)}" for name in unknown]
    problems += dict.fromkeys(
        f"{place}{text}"
        for place, parameter, value in whole.values()
        if (text := template.problem(parameter, value))
    )
    rows, plan.repeated = expand(whole)
    if problems:  # what is right is checked all the same
        rows = [{n: value for n, value in row.items() if not template.problem(n, value)} for row in rows]
    else:
        crossed = _crossed(whole)
        for number, entry in enumerate(whole.exclude):
            if none := unmatched(crossed, entry):
                problems.append(f"exclude[{number}]={none!r}: no run of grid, zip and seeds is like that")
    if not rows:
        problems.append("no runs are left: exclude takes away all")
    if whole.tuned is not None:
        file = _tuned_file(whole.tuned, folder, reports or ROOT / "reports" / "batches")
        rows, plan.tuned = _with_tuned(file, rows, template, problems)
    problems += _run_problems(rows, template, plan)
    problems += without_effect(rows, template) if not problems else []
    if not problems:
        defaults, code = template.defaults, code_version()
        runs: dict[str, PlannedRun] = {}
        for row in rows:
            whole_row = defaults | row
            told = tuple(notes(template, whole_row))
            run = PlannedRun(row, whole_row, identity(template, whole_row, plan.output, code), told)
            # Rows that differ only in a default written out, or in what changes no result, are one run.
            runs.setdefault(run.id, run)
        plan.runs, plan.repeated = [*runs.values()], plan.repeated + len(rows) - len(runs)
    return plan


def _conflicts(whole: Description) -> list[str]:
    """Lists names that stand in two parts, and lists of ``zip`` that differ in length."""
    problems = []
    lengths = {name: len(values) for name, values in whole.zip.items()}
    if len(set(lengths.values())) > 1:
        problems.append(f"zip: lists of different lengths: {lengths}")
    problems += [f"{name}: stands in grid and in zip" for name in whole.zip if name in whole.grid]
    for key in ("parameters", "grid", "zip"):
        if whole.seeds is not None and "seed" in getattr(whole, key):
            problems.append(f"seed: stands in seeds and in {key}")
    return problems


def _output(whole: Description, template: Template, problems: list[str]) -> str:
    declared = template.parameters
    output = whole.output if whole.output is not None else "runs_dir" if "runs_dir" in declared else ""
    if output and output not in declared:
        problems.append(f"output={template.problem(output, '')}")
    if output and any(name == output for _, name, _ in whole.values()):
        problems.append(f"{output}: is set by the batch (results of a run go into its folder)")
    return output


def expand(whole: Description) -> tuple[list[dict[str, Any]], int]:
    """Expands a description into what each run sets, in order; also counts runs that it describes twice.

    Every combination of ``grid`` and of the rows of ``zip`` with every seed, less those that match an
    entry of ``exclude`` (all its values; a list means any of them), and the entries of ``include`` with
    every seed; all on top of ``parameters``. With ``include`` alone there is no other run. One seed comes
    after the other, so that a batch cut short has compared something.
    """
    kept = [row for row in _crossed(whole) if not any(matches(row, entry) for entry in whole.exclude)]
    rows = kept + _with_seeds([whole.parameters | row for row in whole.include], whole)
    if seeds := whole.all_seeds():
        rows.sort(key=lambda row: seeds.index(row["seed"]) if row["seed"] in seeds else len(seeds))
    distinct: dict[str, dict[str, Any]] = {}
    for row in rows:
        distinct.setdefault(canonical_json(row), row)
    return list(distinct.values()), len(rows) - len(distinct)


def _crossed(whole: Description) -> list[dict[str, Any]]:
    """Expands ``grid``, ``zip`` and seeds on top of ``parameters``: all that ``exclude`` can leave out."""
    axes = [[{name: value} for value in values] for name, values in whole.grid.items()]
    if whole.zip:
        side_by_side = zip(*whole.zip.values(), strict=False)  # ``_conflicts`` tells of other lengths
        axes.append([dict(zip(whole.zip, row, strict=True)) for row in side_by_side])
    if not axes and whole.include:
        return []
    rows = []
    for combination in itertools.product(*axes):
        rows.append(dict(whole.parameters))
        for part in combination:
            rows[-1] |= part
    return _with_seeds(rows, whole)


def _with_seeds(rows: list[dict[str, Any]], whole: Description) -> list[dict[str, Any]]:
    seeds = whole.all_seeds()
    return [{"seed": seed} | row for seed in seeds for row in rows] if seeds else rows


def _tuned_file(given: str, folder: Path, reports: Path) -> Path:
    """Finds a file of tuned settings by the name of the batch that they are from, or by its path."""
    if not given.endswith(".json"):
        return reports / given / "tuned.json"
    return next((path for path in (folder / given, ROOT / given) if path.is_file()), folder / given)


def _with_tuned(
    file: Path, rows: list[dict[str, Any]], template: Template, problems: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Adds the tuned settings to each row; also returns the names of all tuned parameters."""
    try:
        tuned = parse_json(file.read_text(encoding="utf-8"), str(file))
        chosen = [(dict(entry["where"]), dict(entry["settings"])) for entry in tuned["chosen"]]
        seeds = set(tuned["seeds"])
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
    if again := sorted(seeds & {(template.defaults | row).get("seed") for row in rows}):
        problems.append(f"seeds: {again} were tuned with, so their results are too good; take others")
    tuned_rows = []
    for row in rows:
        values = template.defaults | row
        fitting = [settings for where, settings in chosen if matches(values, where)]
        if not fitting and chosen:
            wanted = {name: values.get(name) for name in chosen[0][0]}
            problems.append(f"tuned: nothing was chosen for {wanted}")
        tuned_rows.append(row | (fitting[0] if fitting else {}))
        for name in names:
            if name in tuned_rows[-1] and (text := template.problem(name, tuned_rows[-1][name])):
                problems.append(f"tuned.{text}")
    problems[:] = dict.fromkeys(problems)
    return tuned_rows, names


def unmatched(rows: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an entry, or it with one value of a list, that no row matches: a misspelt value; else {}."""
    each = [dict(entry)]
    for name, value in entry.items():
        if isinstance(value, list) and not any(row.get(name) == value for row in rows):
            each += [{**entry, name: one} for one in value]
    return next((one for one in each if not any(matches(row, one) for row in rows)), {})


def matches(row: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """True if parameters have all of an entry's values; a list means any of them."""
    return all(
        name in row and (row[name] == value or (isinstance(value, list) and row[name] in value))
        for name, value in entry.items()
    )


def _run_problems(rows: list[dict[str, Any]], template: Template, plan: Plan) -> list[str]:
    """Lists what is wrong with the runs' values, each with the number of runs that it concerns."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(run_problems(template, template.defaults | row, row, plan.resources.gpus))
        counts.update(
            f"{name}: its default, {parameter.source}, can be told only by a kernel; set it in parameters"
            for name, parameter in template.parameters.items()
            if parameter.default is UNKNOWN and name not in row and name != plan.output
        )
    return [f"{text} ({number} of {len(rows)} runs)" for text, number in counts.items()]
