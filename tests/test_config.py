"""The parameters of a run: every bad one is named before any work; arms change only what they may."""

import json
import math

import pytest
from pydantic import ValidationError

from tdlib.arms import ARMS
from tdlib.config import RunConfig, apply_arm
from tdlib.core.paths import ROOT, ConfigError, resolve
from tdlib.method.losses import DISTANCES
from tdlib.method.priors import PRIORS
from tdlib.method.registry import tables
from tdlib.method.relevance import RELEVANCE
from tdlib.method.selection import SELECTORS
from tdlib.method.weighting import INSTANCE_WEIGHTS, TOKEN_WEIGHTS

TABLES = {
    "arm": ARMS, "relevance": RELEVANCE, "prior": PRIORS, "selector": SELECTORS,
    "token_weight": TOKEN_WEIGHTS, "instance_weight": INSTANCE_WEIGHTS, "distance": DISTANCES,
    "choice_instance_weight": INSTANCE_WEIGHTS,
}  # fmt: skip


def problems(**parameters) -> list[str]:
    """The lines of the error that these parameters give."""
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_parameters(**parameters)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "bad parameters:"
    return [line.removeprefix("- ") for line in lines]


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
        ("epochs", "12"), ("epochs", 1.0), ("epochs", True), ("epochs", None), ("seed", "0"), ("shots", "24"),
        ("shots", True), ("arm", 1), ("student", 1), ("learning_rate", "1e-3"), ("learning_rate", True),
        ("eval_splits", "val"), ("eval_splits", [1]), ("selector", ["nucleus"]), ("temperature", None),
    ],
)  # fmt: skip
def test_wrong_types_are_refused(name, value):
    for line in problems(**{name: value}):
        assert line.startswith(name) and "Input should be a valid" in line
        assert repr(value) in line or repr(value[0]) in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("batch_size", -1), ("accumulation", 0), ("learning_rate", 0.0), ("count", 0),
        ("head_learning_rate", -1.0), ("weight_decay", -0.1), ("warmup_fraction", 1.0), ("seed", -1),
        ("shots", -1), ("shots", 1.5), ("mass", 0.0), ("mass", 1.1), ("fraction", 0.0), ("temperature", 0.0),
        ("choice_temperature", 0.0), ("distill_weight", -1.0), ("choice_weight", -1.0),
        ("prior_weight", -1.0), ("max_text_tokens", 2), ("probe_examples", -1), ("processes", 0),
        ("checkpoint_every", -1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(name, value):
    (line,) = problems(**{name: value})
    assert line.startswith(f"{name}={value!r}: ")


@pytest.mark.parametrize(
    "name", [n for n, field in RunConfig.model_fields.items() if field.annotation in (float, int | float)]
)
def test_numbers_are_finite(name):
    for value in (math.inf, math.nan):
        assert all(line.startswith(name) for line in problems(**{name: value}))


def test_whole_numbers_do_where_fractions_are_expected():
    config = RunConfig.from_parameters(learning_rate=1, shots=0.5, distill_weight=0)
    assert (config.learning_rate, config.shots, config.distill_weight) == (1.0, 0.5, 0.0)
    assert isinstance(RunConfig.from_parameters(shots=1).shots, int)
    assert isinstance(RunConfig.from_parameters(shots=1.0).shots, float)


@pytest.mark.parametrize("name", TABLES)
def test_unknown_variants_are_refused_and_the_known_ones_listed(name):
    (line,) = problems(**{name: "nonesuch"})
    table = ({"arm": ARMS} | tables())[name]
    assert set(table) >= set(TABLES[name])
    assert line == f"{name}='nonesuch': expected one of {', '.join(table)}"
    for known in table:
        assert getattr(RunConfig.from_parameters(**{name: known}), name) == known


@pytest.mark.parametrize("name", TABLES)
def test_variants_that_a_user_adds_are_known(name, monkeypatch):
    monkeypatch.setitem(TABLES[name], "mine", {} if name == "arm" else lambda *args: None)
    assert getattr(RunConfig.from_parameters(**{name: "mine"}), name) == "mine"


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


# Paths


def test_paths_of_the_project_are_resolved_and_names_are_not():
    assert resolve("tdlib") == str(ROOT / "tdlib")
    assert resolve("local-dir:tdlib", "local-dir:") == f"local-dir:{ROOT / 'tdlib'}"
    for name in ("", "ViT-B-16", "dandelin/vilt-b32-mlm", "local-dir:nothing/here", "local-dir:"):
        assert resolve(name, "local-dir:") == name
    assert resolve("/no/such/path") == "/no/such/path"
