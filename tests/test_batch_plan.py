"""Batches are planned: every mistake is listed before anything starts, and what is planned is right."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from batch_helpers import PARAMETERS, RESULT, make_batch, problems_of, write_template
from hypothesis import given, settings
from hypothesis import strategies as st

from tdlib.cli import main
from tdlib.config import apply_arm
from tdlib.core.paths import ROOT, ConfigError
from tdlib.runs import states as run_states
from tdlib.runs.batch import Batch, find_batch
from tdlib.runs.checks import RunConfig, differences
from tdlib.runs.engines import LocalEngine, Resources
from tdlib.runs.plan import Description, expand, plan_batch, read_batch
from tdlib.runs.template import read_template


def test_every_mistake_is_listed_before_anything_starts(tmp_path):
    batch = make_batch(
        tmp_path,
        parametres={}, parameters={"aa": 1, "runs_dir": "here"}, grid={"a": [1, "2"]},
        zip={"seconds": [0.5, 1.0], "seed": [1]}, include=[{"sed": 1}], exclude={"a": 3}, seeds=2, retries=-1,
        resources={"cpus": "many", "memory": "4 elephants", "tme": 3},
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        batch.run()
    for expected in (
        "parametres: unknown key; did you mean 'parameters'?",
        "parameters.aa: unknown parameter of template.ipynb; did you mean 'a'?",
        "runs_dir: is set by the batch", "grid.a='2': expected int", "exclude={'a': 3}: expected a list",
        "different lengths", "include[0].sed: unknown", "did you mean 'seed'?", "seeds and in zip",
        "retries=-1", "resources.cpus='many'", "4 elephants", "resources.tme: unknown; did you mean 'time'?",
    ):  # fmt: skip
        assert expected in str(error.value), expected
    assert not batch.folder.exists()


def test_settings_of_the_training_template_are_checked_too(tmp_path):
    description = {
        "template": "04_distill",
        "parameters": {"data_dir": "data/nowhere", "mass": 1.5, "shotz": 3},
        "grid": {"arm": ["finetune", "clip_dt"], "selector": ["nucleus", "nuclei"]},
        "zip": {"task": ["vcr_qa", "vqa_v2"], "shift": ["prior", "prior"]},
    }
    found = problems_of(description)
    for expected in (
        "'shots'",
        "data_dir='data/nowhere': there is no",
        "mass=1.5",
        "arm='clip_dt'",
        "nuclei",
    ):
        assert expected in found, expected
    description |= {"parameters": {}, "grid": {"arm": ["finetune"]}}
    assert "shift='prior' does not apply to task='vcr_qa'" in problems_of(description)


def test_gpus_that_runs_need_must_be_among_their_resources():
    def problems(parameters: dict, gpus: float) -> str:
        description = {"template": "04_distill", "parameters": parameters, "resources": {"gpus": gpus}}
        return problems_of(description)

    assert "processes=4: each needs a GPU; set resources.gpus to 4" in problems({"processes": 4}, 2)
    assert "precision='fp16' needs a GPU" in problems({"precision": "fp16"}, 0)
    for parameters, gpus in (({"processes": 4}, 4), ({"processes": 4}, 0), ({"precision": "fp16"}, 0.5)):
        assert not problems(parameters, gpus)


def test_splits_that_a_data_set_lacks_are_found_before_anything_starts(world):
    def problems(**parameters) -> str:
        named = {"data_dir": str(world)} | parameters
        return problems_of({"template": "04_distill", "parameters": named})

    assert not problems() and not problems(eval_splits=["val", "val_rule_singular", "test"])
    assert not (Path(world) / "val_rule_singular.jsonl").exists(), "nothing is made by looking"
    assert "val_nowhere.jsonl: no such file" in problems(eval_splits=["val", "val_nowhere"])
    assert "training.jsonl: no such file" in problems(train_split="training")
    assert "tdlib data mask" in problems(eval_splits=["val_rmtop1"])
    assert "snli_ve_train.jsonl: no such file" in problems(task="snli_ve")


def test_resources_can_be_others_for_once(tmp_path):
    file = make_batch(tmp_path, grid={"a": [1]}, resources={"cpus": 1, "memory": "2GB"}).file
    here, there = Batch(file), Batch(file, resources={"gpus": 0.25, "memory": "8GB"})
    assert there.plan.resources == Resources(gpus=0.25, memory=2**33) and here.plan.resources == Resources(
        memory=2**31
    )
    assert [run.id for run in here.plan.runs] == [run.id for run in there.plan.runs]
    assert "resources.gpu: unknown" in "\n".join(Batch(file, resources={"gpu": 1}).problems)


def write_choice(reports: Path, chosen: list[tuple[dict, dict]], seeds=(100,), name: str = "tune") -> Path:
    entries = [{"where": where, "settings": settings, "mean": 0.5} for where, settings in chosen]
    folder = reports / name
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"batch": name, "seeds": list(seeds), "chosen": entries})
    (folder / "tuned.json").write_text(text)
    return reports


TUNING = {"template": "04_distill", "grid": {"arm": ["finetune", "clip_td"]}, "seeds": 2, "tuned": "tune"}


@pytest.fixture
def reports_with_tuned(tmp_path) -> Path:
    """What `tdlib batch best tune` would have left: for every task and arm the learning rate of its own."""
    tune = Batch("tune").plan
    rates = {(run.parameters["task"], run.parameters["arm"]): 2.5e-4 for run in tune.runs}
    arms = ("finetune", "naive", "clip_td", "clip_td_repaired")
    write_choice(tmp_path, [({"arm": arm}, {"epochs": 16}) for arm in arms], name="repair_tune")
    return write_choice(
        tmp_path,
        [({"task": task, "arm": arm}, {"learning_rate": rate}) for (task, arm), rate in rates.items()],
    )


def test_a_batch_takes_the_settings_chosen_for_each_arm(tmp_path):
    reports = write_choice(
        tmp_path,
        [
            ({"arm": "finetune", "task": "vcr_qa"}, {"learning_rate": 1e-3}),
            ({"arm": "clip_td", "task": "vcr_qa"}, {"learning_rate": 2e-4, "distill_weight": 5.0}),
        ],
    )
    plan = plan_batch(TUNING, "b", reports=reports)
    assert not plan.problems and plan.tuned == ["learning_rate", "distill_weight"]
    for run in plan.runs:
        ours = run.parameters["arm"] == "clip_td"
        assert run.parameters["learning_rate"] == (2e-4 if ours else 1e-3)
        assert run.parameters["distill_weight"] == (5.0 if ours else 1.0)
    before = {run.id for run in plan.runs}
    write_choice(tmp_path, [({"arm": "finetune"}, {"learning_rate": 1e-3}), ({"arm": "clip_td"}, {})])
    after = plan_batch(TUNING, "b", reports=reports)
    assert len(before & {run.id for run in after.runs}) == 2, "another choice makes other runs"
    by_path = plan_batch(TUNING | {"tuned": "tune/tuned.json"}, "b", tmp_path)
    assert [run.id for run in by_path.runs] == [run.id for run in after.runs]
    batch = Batch(TUNING, name="b", reports=reports)
    assert batch._description()["tuned"] == ["learning_rate"]


def test_a_choice_that_does_not_fit_is_found_before_anything_starts(tmp_path):
    def problems(chosen=None, seeds=(100,), **changes) -> str:
        reports = write_choice(tmp_path, chosen, seeds) if chosen is not None else tmp_path / "none"
        return "\n".join(plan_batch(TUNING | changes, "b", tmp_path, reports).problems)

    every = [({"arm": arm}, {"learning_rate": 1e-3}) for arm in ("finetune", "clip_td")]
    assert not problems(every)
    assert "`tdlib batch best NAME` writes it" in problems()
    assert "nothing was chosen for {'arm': 'clip_td'}" in problems(every[:1])
    assert "seeds: [1] were tuned with" in problems(every, seeds=(1, 100))
    reports = write_choice(tmp_path, every, (0, 1))
    alone = {name: value for name, value in TUNING.items() if name != "seeds"}
    unseeded = "\n".join(plan_batch(alone, "b", tmp_path, reports).problems)
    assert "seeds: [0] were tuned with" in unseeded, "the template's"
    for place in ("parameters", "grid"):
        entry = [5e-4] if place == "grid" else 5e-4
        given = {place: TUNING.get(place, {}) | {"learning_rate": entry}}
        assert "learning_rate: is set here and by tuned" in problems(every, **given)
    assert "tuned.learning_rate='much': expected float" in problems([({}, {"learning_rate": "much"})])
    assert "tuned.learning_rat: unknown parameter" in problems([({}, {"learning_rat": 1e-3})])
    assert "learning_rate=-1.0" in problems([({}, {"learning_rate": -1.0})])
    for text in ("{", "[]", '{"chosen": 3, "seeds": []}', '{"chosen": [{"where": {}}], "seeds": []}'):
        (tmp_path / "tune" / "tuned.json").write_text(text)
        found = plan_batch(TUNING, "b", tmp_path, tmp_path).problems
        assert len(found) == 1 and "is not what `tdlib batch best` writes" in found[0], text


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks" / "batches").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_batches_that_come_along_are_right(path, reports_with_tuned):
    plan = Batch(path, reports=reports_with_tuned).plan
    assert not plan.problems and plan.runs and not plan.repeated
    beside = re.search(r"batches=\[(.+?)\]", path.read_text())  # its comment names those it is read with
    others = [Batch(path.with_stem(name)).plan for name in beside[1].split(", ")] if beside else []
    assert "finetune" in {run.parameters["arm"] for one in (plan, *others) for run in one.runs}
    for run in plan.runs:
        assert run.parameters["arm"] and set(run.overrides) <= set(RunConfig.model_fields)


def test_a_batch_tunes_the_weight_that_an_arm_starts_at(tmp_path):
    template = read_template(ROOT / "notebooks" / "04_distill.ipynb")
    description = {
        "template": "04_distill", "parameters": {"repair_share": 0.5},
        "grid": {"arm": ["clip_td_repaired"], "repair_weight": [1.0, 3.0, 10.0]},
    }  # fmt: skip
    plan = plan_batch(description, "b", tmp_path)
    assert not plan.problems and not any(run.notes for run in plan.runs)
    assert len({run.id for run in plan.runs}) == 3 and plan.varied == ["repair_weight"]
    file = tmp_path / "config.json"
    for run in plan.runs:
        settings = {n: v for n, v in run.parameters.items() if n in template.settings}
        config = apply_arm(RunConfig.from_parameters(**settings))
        assert (config.repair_weight, config.repair_share) == (run.overrides["repair_weight"], 0.5)
        file.write_text(config.model_dump_json())
        assert differences(template, run.parameters, tmp_path) == []
        file.write_text(config.model_copy(update={"repair_weight": 7.0}).model_dump_json())
        assert len(differences(template, run.parameters, tmp_path)) == 1


def test_values_that_arms_replace_are_told_and_make_no_second_run(tmp_path):
    description = {
        "template": "04_distill",
        "grid": {"arm": ["finetune", "clip_td_repaired"], "repair_weight": [1.0, 10.0]},
    }
    (problem,) = plan_batch(description, "b", tmp_path).problems
    assert problem.startswith("repair_weight=1.0, 10.0: arm='finetune' sets") and "(2 of 4 runs)" in problem
    description["exclude"] = [{"arm": "finetune", "repair_weight": 10.0}]
    plan = plan_batch(description, "b", tmp_path)
    assert not plan.problems and len(plan.runs) == 3
    (note,) = {note for run in plan.runs for note in run.notes}
    assert note.startswith("repair_weight=1.0: has no effect, because arm='finetune' sets")
    usual = {"template": "04_distill", "grid": {"arm": ["clip_td_repaired"], "repair_weight": [0.0, 3.0]}}
    (problem,) = plan_batch(usual, "b", tmp_path).problems
    assert problem.startswith("repair_weight=0.0, 3.0: arm='clip_td_repaired'"), "0 is the arm's own, 3"


def test_a_run_that_is_described_twice_is_one_run(tmp_path):
    def planned(**more):
        plan = plan_batch({"template": "04_distill", "seeds": 3} | more, "b", tmp_path)
        assert not plan.problems
        assert len({run.id for run in plan.runs}) == len(plan.runs)
        return len(plan.runs), plan.repeated

    arms = {"arm": ["finetune", "clip_td"]}
    assert planned(grid=arms) == (6, 0)
    assert planned(grid=arms, include=[{"arm": "clip_td", "shots": 48}]) == (6, 3), "the default, written out"
    assert planned(grid=arms | {"loader_workers": [0, 2]}) == (6, 6), "changes no result"


def test_a_whole_number_is_one_setting_however_it_is_written(tmp_path):
    def ids(**more) -> list[str]:
        plan = plan_batch({"template": "04_distill"} | more, "b", tmp_path)
        assert not plan.problems
        return [run.id for run in plan.runs]

    (usual,) = ids()
    weight = {"arm": "clip_td_repaired", "repair_weight": 10}
    assert ids(parameters=weight) == ids(parameters=weight | {"repair_weight": 10.0}) != [usual]
    assert ids(grid={"shots": [48, 48.0]}) == ids(parameters={"distill_weight": 1}) == [usual]
    write_template(tmp_path, "print(b)\n" + RESULT, PARAMETERS + "b: list = []\nc: bool = True\n")
    twice = make_batch(tmp_path, grid={"b": [[{"x": 1}], [{"x": 1.0}], [{"x": True}], [{"x": 1.5}]]}).plan
    assert (len(twice.runs), twice.repeated) == (3, 1), "true is no number"


def test_every_arm_of_the_tuning_batches_has_as_many_settings():
    for name in ("tune", "repair_tune"):
        plan = plan_batch(read_batch(ROOT / f"notebooks/batches/{name}.yaml"), name)
        assert not plan.problems
        assert len(set(Counter(run.parameters["arm"] for run in plan.runs).values())) == 1


def test_variants_are_parameters(tmp_path):
    description = {
        "template": "04_distill",
        "parameters": {"arm": "repair_only"},
        "variants": ["repair_shar"],
    }
    (problem,) = plan_batch(description, "b", tmp_path).problems
    assert problem.startswith("variants: repair_shar: unknown") and "repair_share" in problem


def test_a_default_that_only_a_kernel_can_tell_is_set_by_the_batch(tmp_path):
    parameters = PARAMETERS + 'import os\nhome = os.environ["HOME"]\n'
    write_template(tmp_path, "print(home)\n" + RESULT, parameters)
    (problem,) = make_batch(tmp_path).problems
    assert problem.startswith("home: its default, os.environ['HOME'], can be told only by a kernel")
    assert not make_batch(tmp_path, parameters={"home": str(tmp_path)}).problems


def test_a_cell_of_parameters_that_is_no_python_names_its_line(tmp_path):
    write_template(tmp_path, parameters="a: int = 1\nseed: int = = 3\n")
    (problem,) = make_batch(tmp_path).problems
    assert "line 2: invalid syntax: seed: int = = 3" in problem


def test_numbers_of_a_file_are_numbers(tmp_path):
    file = tmp_path / "b.yaml"
    file.write_text(
        "parameters: {a: 5e-4, b: 1E+3, c: 2.5e-4, d: -1e2, e: 12, f: 1.5, g: e5, h: 5e, i: '1e3'}"
    )
    assert list(read_batch(file)["parameters"].values()) == [
        5e-4, 1000.0, 2.5e-4, -100.0, 12, 1.5, "e5", "5e", "1e3",
    ]  # fmt: skip


def test_a_file_is_read_as_yaml_1_2(tmp_path):
    file = tmp_path / "b.yaml"
    file.write_text(
        "parameters:\n  [no, yes, on, Off, y, 1:30, 2026-01-02, 1_000, 0o17, 0x1F, true, False, ~, null, "
        ".inf, -.5, +3, '010', 190:20:30]\n"
    )
    assert read_batch(file)["parameters"] == [
        "no", "yes", "on", "Off", "y", "1:30", "2026-01-02", "1_000", 15, 31, True, False, None, None,
        float("inf"), -0.5, 3, "010", "190:20:30",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grid: {a: [1]}\nseeds: 2\ngrid: {mode: [x]}\n", "b.yaml:3: 'grid' stands here and in line 1"),
        ("parameters:\n  a: 1\n  mode: x\n  a: 2\n", "b.yaml:4: 'a' stands here and in line 2"),
        ("include:\n  - {a: 1,\n     a: 1}\n", "b.yaml:3: 'a' stands here and in line 2"),
        ("parameters:\n  epochs: 010\n", "b.yaml:2: 010: a number with a leading zero; write 10, or '010'"),
        ("grid: {a: [1, -007]}\n", "b.yaml:1: -007: a number with a leading zero"),
    ],
)
def test_what_a_file_says_twice_or_in_two_ways_is_refused_with_its_line(tmp_path, text, expected):
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_batch(tmp_path / "b.yaml")
    assert expected in str(error.value)


def test_parts_of_a_file_may_be_shared_by_an_anchor(tmp_path):
    (tmp_path / "b.yaml").write_text("parameters: &base {a: 1}\ninclude:\n  - {<<: *base, a: 2, mode: x}\n")
    assert read_batch(tmp_path / "b.yaml")["include"] == [{"a": 2, "mode": "x"}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [(None, "no such batch; there are: small"), ("a: [", "is not YAML"), ("- 1", "expected keys such as")],
)
def test_a_file_that_is_none(tmp_path, source, expected):
    make_batch(tmp_path)
    file = tmp_path / "other.yaml"
    if source is not None:
        file.write_text(source)
    with pytest.raises(ConfigError, match=expected):
        Batch(file)


def test_a_run_of_one_seed_can_be_excluded_and_what_excludes_nothing_is_told(tmp_path):
    both = {"grid": {"a": [1, 2]}, "seeds": 2}
    plan = make_batch(tmp_path, **both, exclude=[{"a": 1, "seed": 1}]).plan
    assert [(run.overrides["seed"], run.overrides["a"]) for run in plan.runs] == [(0, 1), (0, 2), (1, 2)]
    plan = make_batch(tmp_path, **both, include=[{"a": 5}], exclude=[{"a": 5}]).plan
    assert plan.problems and plan.problems[0].startswith("exclude[0]={'a': 5}: no run of grid"), "not include"
    plan = make_batch(tmp_path, **both, exclude=[{"a": [1, 7], "seed": [0]}]).plan
    assert plan.problems == ["exclude[0]={'a': 7, 'seed': [0]}: no run of grid, zip and seeds is like that"]


def test_a_batch_is_found_by_its_path_without_its_ending(tmp_path, monkeypatch):
    file = make_batch(tmp_path).file
    assert find_batch(tmp_path / "small") == find_batch(str(file)) == file
    monkeypatch.chdir(tmp_path)
    assert find_batch("./small") == file
    assert find_batch("low_shot") == ROOT / "notebooks" / "batches" / "low_shot.yaml"
    with pytest.raises(ConfigError, match=r"low_shot\.yaml: no such batch"):
        Batch(tmp_path / "low_shot")  # not the project's of that name
    with pytest.raises(ConfigError, match=r"small\.yml: no such batch; did you mean 'small'\?"):
        Batch("small.yml")
    (problem,) = Batch({"grid": {"a": [1]}}).problems
    assert "no such notebook; there are: 00_start_here, " in problem and "batches" not in problem


def test_a_part_of_a_batch_that_is_not_there_is_told_what_is(tmp_path):
    batch = make_batch(tmp_path, grid={"a": [1, 2]})
    with pytest.raises(ConfigError, match=r"a is 1, 2; there is no sed; did you mean 'seed'"):
        batch.like({"a": 3, "sed": 0})
    write_template(tmp_path, "print(b)\n" + RESULT, PARAMETERS + "b: list = []\n")
    batch = make_batch(tmp_path, grid={"b": [[1], [2, 3]]})
    assert [run.parameters["b"] for run in batch.like({"b": [2, 3]})] == [[2, 3]]


def test_resources_for_once_hide_no_mistake_in_the_file(tmp_path):
    file = make_batch(tmp_path, resources=4).file
    assert any("resources=4: expected" in problem for problem in Batch(file, resources={"gpus": 1}).problems)


values = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True)
entry = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 3), min_size=1, max_size=2)


@settings(max_examples=60, deadline=None)
@given(
    grid=st.dictionaries(st.sampled_from("ab"), values), rows=st.integers(1, 3), zipped=st.booleans(),
    exclude=st.lists(entry, max_size=2), include=st.lists(entry, max_size=2),
    seeds=st.none() | values, base=st.dictionaries(st.sampled_from("abe"), st.integers(0, 3)),
)  # fmt: skip
def test_expansion(grid, rows, zipped, exclude, include, seeds, base):
    pairs = {"c": list(range(rows)), "d": list(range(rows))} if zipped else {}
    parts = {"grid": grid, "zip": pairs, "include": include, "seeds": seeds, "parameters": base}
    runs, repeated = expand(Description(**parts, exclude=exclude))
    assert len({json.dumps(run, sort_keys=True) for run in runs}) == len(runs), "a run stands there twice"
    sides = 1
    for axis in grid.values():
        sides *= len(axis)
    if zipped:
        sides *= rows
    if include and not grid and not zipped:
        sides = 0
    assert len(runs) + repeated <= (sides + len(include)) * len(seeds or [0])
    if not exclude:
        assert len(runs) + repeated == (sides + len(include)) * len(seeds or [0])
    included = [base | given for given in include]
    for run in runs:
        assert all(name in run for name in base)
        assert ("seed" in run) == (seeds is not None)
        plain = {name: value for name, value in run.items() if name != "seed"}
        if plain not in included:
            assert all(run[name] in axis for name, axis in grid.items())
            assert not zipped or run["c"] == run["d"]
            assert not any(all(run.get(n, ...) == v for n, v in given.items()) for given in exclude)
    without, _ = expand(Description(**parts, exclude=[{"seed": 1}]))
    unseeded = [{n: v for n, v in run.items() if n != "seed"} for run in without if run.get("seed") == 1]
    assert all(run in included for run in unseeded), "a seed can be excluded"
    assert all(any(given.items() <= run.items() for run in runs) for given in included)
    if seeds and runs:
        order = [run["seed"] for run in runs]
        assert order == sorted(order, key=seeds.index), "one seed after the other"


def test_hours_are_estimated_from_the_runs_most_alike(tmp_path, monkeypatch, capsys):
    batch = make_batch(tmp_path, grid={"a": [1, 2]}, seeds=1)
    assert batch.planned()["expected_seconds"].isna().all()
    for a, seconds in ((1, 100.0), (2, 300.0)):
        folder = batch.reports / "earlier" / f"run{a}"
        folder.mkdir(parents=True)
        known = {"template": "/elsewhere/template.ipynb", "parameters": {"a": a, "mode": "fine", "seed": 9}}
        (folder / "parameters.json").write_text(json.dumps(known))
        run_states.write_state(folder, {"state": "done", "seconds": seconds})
    assert list(batch.planned()["expected_seconds"]) == [100, 300]
    monkeypatch.setattr(LocalEngine, "at_once", lambda *_: 4)
    command = ["batch", "plan", str(batch.file), "--folder", str(batch.reports)]
    main(command)
    told = capsys.readouterr().out
    assert f"about {300 / 3600:.2g} hours" in told, "no sooner than the longest run"
    assert "(from the durations of earlier runs)" in told and "2 runs" in told
    main([*command, "-w", "a", "1"])
    told = capsys.readouterr().out
    assert f"about {100 / 3600:.2g} hours" in told and "1 runs" in told
    longer = make_batch(tmp_path / "longer", grid={"a": [3]}, parameters={"mode": "coarse"}, seeds=1)
    main(["batch", "plan", str(longer.file), "--folder", str(batch.reports)])
    assert "earlier runs, which had other a, mode)" in capsys.readouterr().out


def test_a_batch_without_a_file(tmp_path):
    template = write_template(tmp_path)
    batch = Batch({"template": str(template), "seeds": [5]}, "mine", reports=tmp_path / "batches")
    assert batch.folder.name == "mine" and list(batch.planned()["state"]) == ["queued"]
