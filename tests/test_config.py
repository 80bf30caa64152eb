"""The parameters of a run: every bad one is named before any work; arms change only what they may."""

import inspect
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tdlib.arms import ARMS
from tdlib.config import RunConfig, apply_arm, check_arm, check_common, parameters_with, replaced_by_arm
from tdlib.core.paths import ROOT, ConfigError, resolve
from tdlib.data.tasks import TASKS
from tdlib.method import registry
from tdlib.method.losses import DISTANCES
from tdlib.method.priors import PRIORS
from tdlib.method.registry import tables
from tdlib.method.relevance import RELEVANCE, STUDENT_RELEVANCE
from tdlib.method.selection import SELECTORS
from tdlib.method.weighting import INSTANCE_WEIGHTS, TOKEN_WEIGHTS

TABLES = {
    "arm": ARMS, "relevance": RELEVANCE, "prior": PRIORS, "selector": SELECTORS,
    "token_weight": TOKEN_WEIGHTS, "instance_weight": INSTANCE_WEIGHTS, "distance": DISTANCES,
    "choice_instance_weight": INSTANCE_WEIGHTS, "repair_instance_weight": INSTANCE_WEIGHTS,
}  # fmt: skip


def problems(**parameters) -> list[str]:
    """The lines of the error that these parameters give."""
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_parameters(**parameters)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "bad parameters:"
    return [line.removeprefix("- ") for line in lines]


def test_a_task_that_a_notebook_adds_can_be_named(monkeypatch):
    assert problems(task="mine") == [f"task='mine': expected one of {', '.join(TASKS)}"]
    assert "did you mean 'snli_ve'?" in problems(task="snli_v")[0]
    monkeypatch.setitem(TASKS, "mine", TASKS["snli_ve"])
    assert RunConfig.from_parameters(task="mine").task == "mine"


def test_defaults_hold():
    config = RunConfig.from_parameters()
    assert RunConfig.from_parameters(**config.model_dump()) == config
    assert RunConfig.from_parameters(**json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning_rte", "learning_rate"),
        ("Seed", "seed"),
        ("distil_weight", "distill_weight"),
        ("shot", "shots"),
    ],
)
def test_unknown_parameters_are_refused_with_a_suggestion(name, meant):
    assert problems(**{name: 1}) == [f"{name}: unknown parameter; did you mean {meant!r}?"]


def test_unknown_parameters_that_resemble_nothing():
    assert problems(xyzzy=1) == ["xyzzy: unknown parameter"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "12"), ("epochs", True), ("shots", True), ("learning_rate", "1e-3"), ("arm", 1),
        ("eval_splits", "val"), ("eval_splits", [1]), ("selector", ["nucleus"]), ("temperature", None),
    ],
)  # fmt: skip
def test_wrong_types_are_refused(name, value):
    for line in problems(**{name: value}):
        assert line.startswith(name) and "Input should be a valid" in line
        assert repr(value) in line or repr(value[0]) in line


def test_values_out_of_range_are_refused():
    for wrong in (
        {
            "epochs": 0, "batch_size": -1, "accumulation": 0, "learning_rate": 0.0, "count": 0, "shots": -1,
            "head_learning_rate": -1.0, "weight_decay": -0.1, "warmup_fraction": 1.0, "seed": -1,
            "mass": 0.0, "fraction": 0.0, "temperature": 0.0, "choice_temperature": 0.0,
            "distill_weight": -1.0, "choice_weight": -1.0, "prior_weight": -1.0, "max_text_tokens": 2,
            "probe_examples": -1, "processes": 0, "checkpoint_every": -1,
        },
        {"shots": 1.5, "mass": 1.1},
    ):  # fmt: skip
        found = sorted(line.partition(": ")[0] for line in problems(**wrong))
        assert found == sorted(f"{name}={value!r}" for name, value in wrong.items())


@pytest.mark.parametrize(
    "name", [n for n, field in RunConfig.model_fields.items() if field.annotation in (float, int | float)]
)
def test_numbers_are_finite(name):
    for value in (math.inf, math.nan):
        assert all(line.startswith(name) for line in problems(**{name: value}))


def test_whole_numbers_do_where_fractions_are_expected():
    config = RunConfig.from_parameters(learning_rate=1, shots=0.5, distill_weight=0)
    assert (config.learning_rate, config.shots, config.distill_weight) == (1.0, 0.5, 0.0)


@pytest.mark.parametrize(("given", "meant"), [(48, 48), (48.0, 48), (1, 1), (0, 0), (0.0, 0), (0.1, 0.1)])
def test_shots_are_a_number_or_a_share(given, meant):
    shots = RunConfig.from_parameters(shots=given).shots
    assert shots == meant and type(shots) is type(meant)


def test_one_point_nought_shots_could_mean_two_things():
    (line,) = problems(shots=1.0)
    assert "Write 1 for one, 0 for all" in line


@pytest.mark.parametrize("name", TABLES)
def test_unknown_variants_are_refused_and_the_known_ones_listed(name):
    (line,) = problems(**{name: "nonesuch"})
    table = ({"arm": ARMS} | tables())[name]
    assert set(table) >= set(TABLES[name])
    assert line == f"{name}='nonesuch': expected one of {', '.join(table)}"
    for known in table:
        assert getattr(RunConfig.from_parameters(**{name: known}), name) == known


def test_a_name_that_a_table_lacks_is_refused_with_what_it_holds():
    for known in registry.TABLES.values():
        for table in known:
            own = table.functions()
            first = next(iter(own))
            with pytest.raises(ValueError, match=rf"'{first}x'.* only .*did you mean '{first}'"):
                _ = own[f"{first}x"]
            assert own.get(f"{first}x") is None and f"{first}x" not in own


@pytest.mark.parametrize("name", TABLES)
def test_variants_that_a_user_adds_are_known(name, monkeypatch):
    monkeypatch.setitem(TABLES[name], "mine", {} if name == "arm" else lambda *arguments: None)
    assert getattr(RunConfig.from_parameters(**{name: "mine"}), name) == "mine"


# Functions that a user adds


def two_arguments(teacher, student):
    return teacher


@pytest.mark.parametrize(
    ("name", "table", "function"),
    [
        ("instance_weight", INSTANCE_WEIGHTS, two_arguments),
        ("choice_instance_weight", INSTANCE_WEIGHTS, lambda: 1),
        ("selector", SELECTORS, lambda scores, valid: valid),
        ("selector", SELECTORS, lambda scores, valid, *, options, generator: valid),
        ("distance", DISTANCES, lambda one, two, three: one),
        ("prior", PRIORS, lambda text: text),
        ("token_weight", TOKEN_WEIGHTS, "score"),
        ("relevance", RELEVANCE, lambda alignment, student: student),
        ("relevance", STUDENT_RELEVANCE, lambda alignment, student, teacher: student),
    ],
)
def test_a_function_that_cannot_be_called_as_it_will_be_is_refused(monkeypatch, name, table, function):
    monkeypatch.setitem(table, "mine", function)
    (line,) = problems(**{name: "mine"})
    (called,) = {known.name for known in registry.TABLES[name] if known.functions() is table}
    assert line.startswith(f"{name}='mine': {called}['mine'] is ")
    assert "called by position as (" in line


def test_functions_may_have_arguments_of_their_own(monkeypatch):
    monkeypatch.setitem(INSTANCE_WEIGHTS, "mine", lambda teacher, student, labels, gamma=2.0: teacher)
    monkeypatch.setitem(SELECTORS, "mine", lambda scores, *rest: scores)
    RunConfig.from_parameters(instance_weight="mine", selector="mine")


def test_every_table_is_listed_with_its_call_and_its_functions():
    rows = {row["table"].rpartition(".")[2]: row for row in registry.signatures()}
    assert set(rows) == {table.name for known in registry.TABLES.values() for table in known}
    weights = rows["INSTANCE_WEIGHTS"]
    assert weights["called as"].count("batch choices") == 2 and "labels: Int[" in weights["called as"]
    for known in registry.TABLES.values():
        for table in known:
            assert rows[table.name]["functions"] == ", ".join(table.functions())
            for function in table.functions().values():
                inspect.signature(function).bind(*table.call().parameters)


def test_names_are_known_before_torch_is_loaded():
    source = (
        "import sys; from tdlib.config import RunConfig; from tdlib.method import registry\n"
        "RunConfig.from_parameters(); assert 'torch' not in sys.modules\n"
        "before = {name: registry.names(name) for name in registry.TABLES}\n"
        "assert before == {name: list(table) for name, table in registry.tables().items()}\n"
        "assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", source], check=True, cwd=ROOT)


THRESHOLD = 0.5


def beside(scores):
    return scores * 2


def read_from_outside(scores, valid, options, generator=None, margin=0.25, other=beside):
    return beside(scores.size) > next(THRESHOLD for _ in range(2)) + margin


size = 3  # an attribute's name is no variable's


@torch.no_grad()
def peeled(n):
    return peeled(n - 1) if n else 0


def test_the_source_of_a_function_holds_what_decides_what_it_does(monkeypatch):
    source = registry.source_of(read_from_outside)
    assert "# THRESHOLD = 0.5" in source and "# defaults = [None, 0.25, beside]" in source
    assert "return scores * 2" in source and "size =" not in source and " at 0x" not in source
    assert registry.source_of(peeled).count("def ") == 1
    assert registry.source_of(partial(beside, 1)) != registry.source_of(partial(beside, 2))
    monkeypatch.setitem(globals(), "THRESHOLD", 0.75)
    assert registry.source_of(read_from_outside) != source

    class Reader:
        def labels(self):
            return [THRESHOLD] * 2

    assert "# THRESHOLD = 0.75" in registry.source_of(Reader)

    def one(n):
        return two(n) if n else 0

    def two(n):
        return one(n - 1)

    assert registry.source_of(one).count("def ") == 2, "functions that call each other end"


# Notebooks


def test_a_notebook_s_variables_are_a_configuration():
    cell = {"arm": "naive", "shots": 24.0, "seeds": [3, 4], "runs_dir": "x", "epochs": 2, "mass": math}
    annotations = dict.fromkeys([*cell, "interactive"], str)
    config = RunConfig.from_notebook(cell | {"__annotations__": annotations}, seed=3, epochs=5)
    assert config == RunConfig(arm="naive", shots=24, seed=3, epochs=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data_dir", Path("/data/vcr")), ("data_dir", None), ("seed", np.int64(3)), ("eval_splits", ("val",)),
        ("learning_rate", np.float64(1e-5)), ("eval_splits", np.array(["val"])),
    ],
)  # fmt: skip
def test_a_value_of_a_notebook_that_is_nearly_a_parameter_s_is_not_ignored(name, value):
    with pytest.raises(ConfigError, match=rf"- {name}=.*: is a {type(value).__name__}\nexpected text"):
        RunConfig.from_notebook({name: value})
    known = RunConfig.model_fields[name].default
    assert getattr(RunConfig.from_notebook({name: value}, **{name: known}), name) == known
    assert RunConfig.from_notebook({name: lambda: None, "student": object()}) == RunConfig()


def test_a_slip_of_the_pen_in_a_notebook_is_refused():
    with pytest.raises(ConfigError, match="selecter: unknown parameter; did you mean"):
        RunConfig.from_notebook({"selecter": 0.1, "__annotations__": {"selecter": float}})


def test_bad_values_of_a_notebook_are_refused():
    with pytest.raises(ConfigError, match="mass=3"):
        RunConfig.from_notebook({"mass": 3.0})


# Roles


def test_every_parameter_has_a_role_and_lists_follow_from_it():
    roles = ("data", "model", "method", "training", "recording", "machine")
    by_role = [name for role in roles for name in parameters_with(role=role)]
    assert sorted(by_role) == sorted(RunConfig.model_fields)
    assert parameters_with(role="machine") == ("checkpoint_every", "loader_workers")
    assert parameters_with(prepares="arm") == ("student", "regions", "teacher_control")
    assert {"task", "shots", "teacher", "probe_examples"} <= set(parameters_with(prepares="all"))
    for settings in ARMS.values():
        assert not set(settings) & set(parameters_with(prepares="all")), "arms share what is prepared"


def test_all_problems_are_listed_at_once():
    lines = problems(
        epochs="3", selector="nonesuch", arm="nonesuch", mass=2.0, learning_rte=1.0, references="ids"
    )
    assert sorted(line.split("=")[0].split(":")[0] for line in lines) == sorted(
        ["epochs", "selector", "arm", "mass", "learning_rte", "references"]
    )


def test_a_configuration_does_not_change():
    config = RunConfig.from_parameters()
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]


# Arms


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_valid_configuration(arm):
    config = RunConfig.from_parameters(arm=arm, seed=4, epochs=2)
    own = apply_arm(config)
    changed = {name for name in RunConfig.model_fields if getattr(own, name) != getattr(config, name)}
    assert changed <= set(ARMS[arm])
    assert all(getattr(own, name) == value for name, value in ARMS[arm].items())


@pytest.mark.parametrize(
    "update", [{"selectr": "all"}, {"selector": "nonesuch"}, {"epochs": "3"}, {"mass": 3.0}]
)
def test_arms_with_bad_settings_are_refused(monkeypatch, update):
    monkeypatch.setitem(ARMS, "mine", update)
    with pytest.raises(ConfigError, match=next(iter(update))):
        apply_arm(RunConfig.from_parameters(arm="mine"))


@pytest.mark.parametrize("arm", ["finetune", "naive", "random_teacher", "repair_own", "extra_only"])
def test_settings_of_one_arm_are_not_those_of_several(arm):
    applied = apply_arm(RunConfig.from_parameters(arm=arm))
    with pytest.raises(ConfigError, match=rf"those that apply_arm makes of arm='{arm}'.*every arm would be"):
        check_common(applied, [arm, "clip_td"])
    check_common(applied, [arm])
    check_common(RunConfig.from_parameters(arm=arm), ["finetune", "clip_td"])
    check_common(apply_arm(RunConfig.from_parameters(arm="clip_td")), ["finetune", "clip_td"])


@pytest.mark.parametrize("arm", [arm for arm in ARMS if "extra" not in arm])
def test_a_term_of_ones_own_is_in_its_arms_alone(arm):
    own = apply_arm(RunConfig.from_parameters(arm=arm, extra_weight=2.0, repair_weight=5.0))
    assert own.extra_weight == 0 and (own.repair_weight == 5) == arm.startswith(
        ("repair", "clip_td_repaired", "truth")
    )


def test_steps_of_ascent_need_two_inputs_and_words_that_can_be_moved():
    assert problems(adversarial_steps=1) == [
        "adversarial_steps=1: the first of them is the unmoved input: expected 0, or 2 and more"
    ]
    moved = RunConfig.from_parameters(arm="clip_finetune", adversarial_steps=2)
    with pytest.raises(ConfigError, match="words of CLIP itself are not moved"):
        apply_arm(moved)
    apply_arm(moved.model_copy(update={"adversarial_on": "visual"}))


def test_a_weight_that_a_run_sets_goes_before_the_arm_s():
    def weight(name: str, **settings) -> float:
        config = apply_arm(RunConfig.from_parameters(**settings))
        check_arm(config)
        assert apply_arm(config) == config, "an arm is applied once and for all"
        return getattr(config, name)

    assert weight("repair_weight", arm="clip_td_repaired") == 3
    assert weight("repair_weight", arm="clip_td_repaired", repair_weight=10.0) == 10
    assert weight("truth_weight", arm="truth_only", truth_weight=0.5) == 0.5
    assert weight("truth_weight", arm="repair_only", truth_weight=0.5) == 0.5
    assert weight("label_smoothing", arm="label_smoothing", label_smoothing=0.2) == 0.2


@pytest.mark.parametrize("arm", ["finetune", "naive", "clip_td", "clip_td_features", "clip_input"])
def test_a_term_that_an_arm_lacks_stays_out(arm):
    wanted = RunConfig.from_parameters(arm=arm, repair_weight=10.0, truth_weight=1.0)
    config = apply_arm(wanted)
    assert config.repair_weight == config.truth_weight == 0
    assert [line.split("=")[0] for line in replaced_by_arm(wanted.model_dump())] == [
        "repair_weight", "truth_weight"
    ]  # fmt: skip
    assert not replaced_by_arm(config.model_dump())


def test_what_an_arm_is_goes_before_what_a_run_sets():
    wanted = RunConfig.from_parameters(arm="repair_own", repair_pool="train", repair_weight=1.0)
    assert apply_arm(wanted).repair_pool == "own"
    (line,) = replaced_by_arm(wanted.model_dump())
    assert line.startswith("repair_pool='train'")


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (8, 8)])
def test_an_example_alone_in_its_batch_cannot_be_repaired_within_it(batch_size, processes):
    alone = {"batch_size": batch_size, "processes": processes}
    with pytest.raises(ConfigError, match=r"alone in its batch.*repair_pool='subset'"):
        apply_arm(RunConfig.from_parameters(arm="clip_td_repaired", **alone))
    apply_arm(RunConfig.from_parameters(arm="clip_td_repaired", repair_pool="subset", **alone))
    apply_arm(RunConfig.from_parameters(arm="repair_own", **alone))
    apply_arm(RunConfig.from_parameters(arm="finetune", repair_weight=1.0, **alone))


# Paths


def test_paths_of_the_project_are_resolved_and_names_are_not():
    assert resolve("tdlib") == str(ROOT / "tdlib")
    assert resolve("local-dir:tdlib", "local-dir:") == f"local-dir:{ROOT / 'tdlib'}"
    for name in ("", "ViT-B-16", "dandelin/vilt-b32-mlm", "local-dir:nothing/here", "local-dir:"):
        assert resolve(name, "local-dir:") == name
    assert resolve("/no/such/path") == "/no/such/path"
