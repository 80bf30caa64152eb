"""Checks a run's parameters before a kernel starts, and afterwards that it was run with them.

``tdlib run`` and batches share these checks, which load no torch: names, types, choices, registered
functions, files, splits. After a run ``differences`` compares the ``config.json`` files that it wrote with
the plan, because a notebook's cells may change any variable.
"""

import difflib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from glob import has_magic
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tdlib.arms import ARMS
from tdlib.config import RunConfig, apply_arm, arm_settings, known_names, replaced_by_arm
from tdlib.core.files import visible_files
from tdlib.core.paths import ROOT, ConfigError, did_you_mean
from tdlib.core.provenance import canonical_json
from tdlib.regions.specs import each_path
from tdlib.runs.template import Template, tables_of
from tdlib.training.provenance import named_path

FIELDS = RunConfig.model_fields


def check_parameters(template: Template, given: Mapping[str, Any]) -> list[str]:
    """Returns notes on settings that only the run can check; ConfigError lists everything that is wrong."""
    problems = [text for name, value in given.items() if (text := template.problem(name, value))]
    values = template.defaults | {name: value for name, value in given.items() if name in template.parameters}
    if not problems:
        problems = run_problems(template, values, given)
    if problems:
        unknown = any(name not in template.parameters for name in given)
        declared = f"\ndeclared: {', '.join(template.parameters)}" if unknown else ""
        raise ConfigError("bad parameters:\n" + "\n".join(f"- {line}" for line in problems) + declared)
    return notes(template, values)


def notes(template: Template, values: Mapping[str, Any]) -> list[str]:
    """Notes parameters whose function may be registered later, and those that the arm replaces."""
    settings = {name: value for name, value in values.items() if name in template.settings}
    arm = arm_of(template, values)
    return (replaced_by_arm(settings, arm) if arm is not None else []) + [
        f"{name}={value!r}: nothing of that name is known yet; cells of {template.path.name} register some"
        for name, value in values.items()
        if name in template.settings
        and _unknown_function(name, value)
        and template.registers(name, value) is None
    ]


def arm_of(template: Template, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the settings of a run's arm; None if it has none, or one that only a kernel can tell."""
    settings = template.arms.get(values.get("arm", ""))
    return settings if isinstance(settings, dict) else None


def run_problems(
    template: Template, values: Mapping[str, Any], given: Collection[str], gpus: float | None = None
) -> list[str]:
    """Lists everything that is wrong with one run's parameters but their names and types.

    ``values`` are all parameters, ``given`` names those that were set for the run. Defaults are chosen by
    the notebook's author: of them only teacher and student are looked for. ``gpus`` is how many the run is to
    have; None: those that it sees.
    """
    problems = [text for name in given if (text := _ignored(template, name, values))]
    problems += _missing_files(template, values, given)
    if template.builds_config:
        problems += _config_problems(template, values)
        if gpus is not None:
            problems += _gpu_problems(values, gpus)
    return list(dict.fromkeys(problems))


def _ignored(template: Template, name: str, values: Mapping[str, Any]) -> str:
    """Returns why a parameter that was set would change nothing; "" if it would."""
    if name in template.overridden and template.overridden[name] != values[name]:
        return (
            f"{name}={values[name]!r}: a cell of {template.path.name} sets {name} = "
            f"{template.overridden[name]!r} after the parameters, so this would not be run; take that line "
            "out (a cell registers a function, the parameter names it)"
        )
    if name not in template.settings and not template.reads(name):
        return f"{name}={values[name]!r}: nothing in {template.path.name} reads this parameter"
    return ""


def without_effect(rows: Sequence[dict[str, Any]], template: Template) -> list[str]:
    """Lists runs that would be equal, because their arm itself sets the parameters in which they differ."""
    same: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        values = template.defaults | row
        of_arm = arm_settings(arm_of(template, values) or {}, values)
        same.setdefault(canonical_json(values | of_arm), []).append(values)
    problems: Counter[str] = Counter()
    for alike in same.values():
        for name in alike[0]:
            tried = {canonical_json(values[name]): repr(values[name]) for values in alike}
            if len(tried) == 1:
                continue
            named, arm = ", ".join(tried.values()), alike[0].get("arm")
            problems[f"{name}={named}: arm={arm!r} sets it by itself; exclude all but one"] += len(alike)
    return [f"{text} ({number} of {len(rows)} runs)" for text, number in problems.items()]


# Files.


def _missing_files(template: Template, values: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """Lists files that are missing: those that the run sets, and teacher and student.

    Of parameters that end in ``_dir`` only ``data_dir`` is read; others, as ``runs_dir``, are written to.
    """
    problems = []
    for name, value in values.items():
        if name not in given and name not in ("teacher", "student"):
            continue
        if name.endswith("_dir") and name != "data_dir":
            continue
        for one in value if isinstance(value, list) and name.endswith("s") else [value]:
            if isinstance(one, str) and one and not has_magic(one):  # 05_tokens' `runs` may be globs
                said = name.removesuffix("s") if one is not value else name
                for path in each_path(one):
                    problems += _file_problem(template, said, path)
    return problems


def _file_problem(template: Template, name: str, value: str) -> list[str]:
    path = named_path(value, anything=name == "data_dir")
    if path and path.exists():
        if name == "data_dir" and path.is_file():
            return [f"{name}={value!r}: is a file, expected a data set's folder"]
        if name == "teacher" and path.is_dir() and ":" not in value:
            return [f"{name}={value!r}: a folder is named 'local-dir:{value}'"]
        return []
    if path and (name == "data_dir" or _is_local(value)):
        return [f"{name}={value!r}: there is no {path}{_similar_path(value)}"]
    if name == "student" and value != "teacher" and "/" not in value and not (ROOT / value).exists():
        near = difflib.get_close_matches(value, [path.name for path in (ROOT / "data/models").glob("*")], n=1)
        hint = f"; did you mean 'data/models/{near[0]}'?" if near else ""
        return [f"{name}={value!r}: there is no such folder, and a hub id is OWNER/NAME{hint}"]
    if name == "teacher" and ":" not in value and not any("add_model_config" in c for c in template.cells):
        known = _open_clip_names()
        if known and value.replace("/", "-") not in known:
            return [
                f"{name}={value!r}: open_clip knows no model of that name{did_you_mean(value, known)} (its "
                "names, 'local-dir:FOLDER' or 'hf-hub:OWNER/NAME')"
            ]
    return []


def _is_local(value: str) -> bool:
    """True for a path in this project or an absolute one; False for a hub's OWNER/NAME."""
    name = value.rpartition(":")[2].rpartition("@")[2]
    first = name.partition("/")[0]
    return name[:1] in ("/", ".", "~") or first == "data" or ("/" in name and (ROOT / first).is_dir())


def _similar_path(value: str) -> str:
    """Suggests the most similar path beside a missing one."""
    kind, colon, name = value.rpartition(":")
    path = ROOT / Path(name).expanduser()
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; did you mean {kind + colon + str(Path(name).with_name(near[0]))!r}?" if near else ""


def _open_clip_names() -> list[str]:
    """Lists open_clip's models by the files that it reads them from, because importing it loads torch."""
    spec = find_spec("open_clip")
    homes = [Path(place) / "model_configs" for place in (spec and spec.submodule_search_locations) or ()]
    return sorted(path.stem for home in homes for path in home.glob("*.json"))


# Settings.


def _unknown_function(name: str, value: Any) -> bool:
    known = known_names(name)
    return known is not None and isinstance(value, str) and value not in known


def _config_problems(template: Template, values: Mapping[str, Any]) -> list[str]:
    """Lists the settings that ``RunConfig`` refuses: single ones, entries of lists of them, combinations."""
    settings = {name: value for name, value in values.items() if name in template.settings}
    # `arms` is a list of `arm`, `seeds` one of `seed`; no run is made of none of a list's entries.
    lists = {
        name.removesuffix("s"): value
        for name, value in values.items()
        if name not in FIELDS and name.endswith("s") and name.removesuffix("s") in FIELDS
        if isinstance(value, list) and value
    }
    first = {name: entries[0] for name, entries in lists.items()}
    cases = [first] + [first | {name: entry} for name, entries in lists.items() for entry in entries[1:]]
    return list(
        dict.fromkeys(p for case in cases for p in _setting_problems(template, settings | case, values))
    )


def _setting_problems(template: Template, settings: dict[str, Any], values: Mapping[str, Any]) -> list[str]:
    from tdlib.data.tasks import splits_of, submission_split

    named, arm = settings.get("arm", ""), None
    registered = template.registers("arm", named)
    if registered or (registered is None and named not in ARMS):
        arm = arm_of(template, settings) or {}
        settings = {**settings, **arm_settings(arm, settings)}  # the arm may name functions, too
    unknown = [name for name, value in settings.items() if _unknown_function(name, value)]
    for name in unknown:
        if template.registers(name, settings[name]) is not False:
            del settings[name]
    if arm is not None:
        arm = {name: value for name, value in arm.items() if name in settings}
    try:
        config = apply_arm(RunConfig.from_parameters(**settings), arm)
        if "task" in unknown:  # only the kernel knows its splits
            return []
        train, evaluated = splits_of(config)
        asked = [train, *evaluated, submission_split(config.task) if values.get("submission") else ""]
        return _split_problems(config, [split for split in asked if split])
    except ConfigError as error:
        lines = [line.removeprefix("- ") for line in str(error).splitlines()]
        recipes = {
            f"{name}={settings[name]!r}: ": f" (or what a cell registers: {tables_of(name)[0]}[NAME] = ...)"
            for name in unknown
            if name in settings
        }
        return [
            line + "".join(recipe for start, recipe in recipes.items() if line.startswith(start))
            for line in lines
            if line != "bad parameters:"
        ]
    except OSError as error:
        return [str(error)]


def _split_problems(config: RunConfig, splits: Iterable[str]) -> list[str]:
    """Lists splits that a named data set lacks. Sets that rules derive from others are not written here."""
    from tdlib.data.examples import DataError
    from tdlib.data.tasks import HELD_OUT, data_folder, reader
    from tdlib.data.vcr_shifts import RULES

    if not config.data_dir or not data_folder(config).is_dir():
        return []
    problems = []
    for split in dict.fromkeys(splits):
        source = split.removesuffix(HELD_OUT)
        for rule in RULES:
            source = source.removesuffix(f"_{rule}")
        try:
            reader(config, source)
        except DataError as error:
            problems.append(str(error))
    return problems


def _gpu_problems(values: Mapping[str, Any], gpus: float) -> list[str]:
    """Lists settings that do not fit the number of GPUs of a run."""
    problems, processes = [], values.get("processes", 1)
    if 0 < gpus < processes > 1:
        problems.append(
            f"processes={processes}: each needs a GPU; set resources.gpus to {processes}, or to 0 for the CPU"
        )
    if values.get("precision") == "fp16" and not gpus:
        problems.append("precision='fp16' needs a GPU; set resources.gpus")
    return problems


# Afterwards.


def differences(
    template: Template, planned: Mapping[str, Any], folder: Path, since: float = 0.0
) -> list[str]:
    """Compares every ``config.json`` that a run wrote below ``folder`` with the planned parameters.

    Settings of the arm that a configuration names count as planned, except weights that the run sets. Files
    older than ``since`` (seconds since the epoch) are of earlier runs.
    """
    lines = []
    for file in visible_files(folder, "config.json"):
        if file.stat().st_mtime < since:
            continue
        try:
            ran = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            lines.append(f"{file}: is not whole JSON ({error})")
            continue
        if not isinstance(ran, dict) or ran.keys() != FIELDS.keys():
            continue  # such as the config.json of a student
        arm = arm_of(template, ran)
        expected = {name: value for name, value in planned.items() if name in template.settings}
        if arm is None:
            expected = {name: value for name, value in expected.items() if name == "arm"}
        else:
            expected |= arm_settings(arm, expected)
        lines += [
            f"{name}: planned {value!r}, run with {ran[name]!r} ({file})"
            for name, value in expected.items()
            if ran[name] != value
        ]
    return lines


def difference_reason(lines: Iterable[str]) -> str:
    """Makes the reason of a failed run from ``differences``."""
    return (
        f"it was not run as planned, because a cell changes what the parameters say: {'; '.join(lines)}. Let "
        "cells register functions and parameters name them"
    )
