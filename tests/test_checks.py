"""What a notebook declares, and what is wrong with values for it: found before anything starts, and after."""

import json
import time
from pathlib import Path

import nbformat
import pytest
from batch_helpers import by_run, make_batch, write_notebook, write_template

from tdlib.arms import ARMS
from tdlib.core.paths import ROOT, ConfigError
from tdlib.runs.checks import RunConfig, check_parameters, differences
from tdlib.runs.plan import plan_batch
from tdlib.runs.template import UNKNOWN, declared_in, read_template

pytestmark = pytest.mark.usefixtures("no_orphans")


def training_template(folder: Path, own: str, name: str = "own.ipynb") -> Path:
    """The training template with a cell of one's own behind the parameters."""
    template = nbformat.read(ROOT / "notebooks" / "04_distill.ipynb", as_version=4)
    (place,) = [n for n, cell in enumerate(template.cells) if cell.source == "# your own functions"]
    template.cells[place].source = own
    nbformat.write(template, folder / name)
    return folder / name


OWN_SELECTOR = """\
from tdlib.method.selection import SELECTORS

def above_mean(scores, valid, options, generator=None):
    mean = (scores * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return valid & (scores > mean)

SELECTORS["above_mean"] = above_mean
"""


def test_a_function_that_the_template_registers_may_be_named(tmp_path):
    training_template(tmp_path, OWN_SELECTOR)
    description = {"template": "own.ipynb", "grid": {"selector": ["nucleus", "above_mean"]}}
    plan = plan_batch(description, "b", tmp_path)
    assert not plan.problems and not any(run.notes for run in plan.runs) and len(plan.runs) == 2
    # its prose shows the recipe, but no cell of the template itself registers anything
    elsewhere = {"template": "04_distill", "parameters": {"selector": "best_three"}}
    (problem,) = plan_batch(elsewhere, "b").problems
    assert problem.startswith("selector='best_three': expected one of nucleus, ")


@pytest.mark.parametrize(
    "own",
    ["SELECTORS.update(mine=f)", "for f in (mine,):\n    SELECTORS[f.__name__] = f", "SELECTORS |= found"],
)
def test_a_function_that_code_may_register_is_a_note(tmp_path, own):
    training_template(tmp_path, f"from tdlib.method.selection import SELECTORS\n{own}")
    plan = plan_batch({"template": "own.ipynb", "parameters": {"selector": "mine"}}, "b", tmp_path)
    assert not plan.problems and {run.notes[0].partition(": nothing")[0] for run in plan.runs} == {
        "selector='mine'"
    }
    assert plan_batch({"template": "own.ipynb", "parameters": {"prior": "mine"}}, "b", tmp_path).problems


def test_an_arm_that_the_template_registers_may_be_named(tmp_path):
    training_template(
        tmp_path, 'from tdlib.arms import ARMS\nARMS["mine"] = {"selector": "first", "mass": 2.0}'
    )
    problems = plan_batch({"template": "own.ipynb", "parameters": {"arm": "mine"}}, "b", tmp_path).problems
    assert len(problems) == 1 and problems[0].startswith("mass=2.0"), "its settings are checked"


@pytest.mark.parametrize(
    "settings", ['{**ARMS["clip_td"], "selector": "all"}', 'ARMS["base"] | {"mass": 0.5}']
)
def test_an_arm_may_be_made_of_other_arms(tmp_path, settings):
    base = 'ARMS["base"] = ARMS["clip_td"] | {"selector": "all"}\n'
    training_template(tmp_path, f'from tdlib.arms import ARMS\n{base}ARMS["mine"] = {settings}\n')
    template = read_template(tmp_path / "own.ipynb")
    mine = template.arms["mine"]
    assert mine == ARMS["clip_td"] | {"selector": "all"} | ({"mass": 0.5} if "base" in settings else {})
    description = {"template": "own.ipynb", "parameters": {"arm": "mine"}}
    grid = {"grid": {"selector": ["first", "nucleus"]}}
    (problem,) = plan_batch(description | grid, "b", tmp_path).problems
    assert problem.startswith("selector='first', 'nucleus': arm='mine' sets it"), "two runs would be equal"


def test_an_arm_may_name_a_function_that_a_cell_registers(tmp_path):
    own = OWN_SELECTOR + 'from tdlib.arms import ARMS\nARMS["mine"] = {"selector": "above_mean"}\n'
    training_template(tmp_path, own)
    description = {"template": "own.ipynb", "grid": {"arm": ["finetune", "mine"]}}
    plan = plan_batch(description, "b", tmp_path)
    assert not plan.problems and len(plan.runs) == 2
    training_template(tmp_path, own.replace('"above_mean"}', '"above"}'))
    (problem,) = plan_batch(description, "b", tmp_path).problems
    assert problem.startswith("selector='above': ") and "what a cell registers: SELECTORS[NAME]" in problem


def test_what_an_arm_of_the_template_sets_is_checked_together(tmp_path):
    for name in ("mine", "finetune"):
        training_template(
            tmp_path, f'from tdlib.arms import ARMS\nARMS["{name}"] = {{"repair_weight": 3.0}}\n'
        )
        alone = {"template": "own.ipynb", "parameters": {"arm": name, "batch_size": 1}}
        (problem,) = plan_batch(alone, "b", tmp_path).problems
        assert "each example is alone in its batch" in problem, name


def test_a_module_beside_notebooks_may_register_too(tmp_path, monkeypatch):
    monkeypatch.setattr("tdlib.runs.template.NOTEBOOKS", tmp_path)
    (tmp_path / "kit.py").write_text(OWN_SELECTOR)
    training_template(tmp_path, "import kit")
    description = {"template": "own.ipynb", "parameters": {"selector": "above_mean"}}
    assert not plan_batch(description, "b", tmp_path).problems


@pytest.mark.parametrize("line", ["x = (3\n    % 2)", "files = !ls", "%time x = 3", "print?", "x, y = %who"])
def test_lines_of_ipython_hide_no_other_line(tmp_path, line):
    training_template(tmp_path, f"{line}\n{OWN_SELECTOR}")
    description = {"template": "own.ipynb", "parameters": {"selector": "above_mean"}}
    assert not plan_batch(description, "b", tmp_path).problems


def test_a_cell_that_overrides_what_is_planned_is_found_before_anything_starts(tmp_path):
    training_template(tmp_path, OWN_SELECTOR + 'selector = "above_mean"\n')
    description = {"template": "own.ipynb", "grid": {"selector": ["nucleus", "above_mean"]}}
    (problem,) = plan_batch(description, "b", tmp_path).problems
    assert problem.startswith("selector='nucleus': a cell of own.ipynb sets selector = 'above_mean'")
    assert "(1 of 2 runs)" in problem
    description |= {"grid": {"selector": ["above_mean"]}}
    assert not plan_batch(description, "b", tmp_path).problems


def test_a_parameter_that_nothing_reads_is_found(tmp_path):
    path = training_template(tmp_path, "")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source += "\nlr: float = 1e-3  # of nothing"
    nbformat.write(notebook, path)
    (problem,) = plan_batch({"template": "own.ipynb", "parameters": {"lr": 0.1}}, "b", tmp_path).problems
    assert problem.startswith("lr=0.1: nothing in own.ipynb reads this parameter")


# What a run would have written: selector and mass as a cell has set them, whatever was planned.
CONFIG = """\
from tdlib.config import RunConfig, apply_arm
import json
from pathlib import Path
{own}
config = apply_arm(RunConfig.from_notebook(globals()))
folder = Path(runs_dir) / "run"
folder.mkdir(parents=True)
(folder / "config.json").write_text(json.dumps(config.model_dump()))
(folder / "metrics.json").write_text("{{}}")
(folder / "student").mkdir()
(folder / "student" / "config.json").write_text('{{"hidden_size": 3, "selector": "none"}}')
"""
SETTINGS = """\
arm: str = "clip_td"  # an arm
selector: str = "nucleus"  # a selector
mass: float = 0.6  # of the nucleus
shots: float = 48  # examples
runs_dir: str = ""  # results go here
"""


def config_template(folder: Path, own: str) -> Path:
    return write_notebook(folder / "template.ipynb", SETTINGS, CONFIG.format(own=own))


def test_a_run_that_was_not_run_as_planned_has_failed(tmp_path):
    config_template(tmp_path, 'if selector == "nucleus":\n    selector, mass = "top_k", mass + 0.1')
    batch = make_batch(tmp_path, grid={"selector": ["nucleus", "first"]}, parameters={"shots": 24.0})
    batch.run()
    (changed, state), (kept, other) = by_run(batch)
    assert (changed.overrides["selector"], kept.overrides["selector"]) == ("nucleus", "first")
    assert (state["state"], other["state"]) == ("failed", "done"), state
    assert "selector: planned 'nucleus', run with 'top_k'" in state["reason"]
    assert "mass: planned 0.6, run with 0.7" in state["reason"] and "arm:" not in state["reason"]


def test_settings_of_an_arm_are_as_planned(tmp_path):
    template = read_template(config_template(tmp_path, ""))
    planned = template.defaults | {"arm": "naive"}
    for arm, selector, expected in (
        ("naive", "all", []),
        ("naive", "nucleus", ["selector: planned 'all', run with 'nucleus'"]),
        ("clip_td", "nucleus", ["arm: planned 'naive', run with 'clip_td'"]),
    ):
        ran = RunConfig(arm=arm).model_dump() | ARMS[arm] | {"selector": selector}
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.json").write_text(json.dumps(ran))
        found = differences(template, planned, tmp_path / "run")
        assert [line.partition(" (")[0] for line in found] == expected
    assert differences(template, planned, tmp_path / "run", since=time.time() + 60) == []
    (tmp_path / "run" / "config.json").write_text('{"arm": ')
    assert "is not whole JSON" in differences(template, planned, tmp_path / "run")[0]


def test_a_variable_that_has_a_parameter_s_name_is_not_a_setting(tmp_path):
    """05_tokens calls the modality of its views so, whose values a run's modality does not have."""
    tokens = read_template(ROOT / "notebooks" / "05_tokens.ipynb")
    assert tokens.builds_config and "modality" not in tokens.settings
    check_parameters(tokens, {"modality": "visual", "example": "1500000", "runs": ["reports/runs/tok*"]})
    assert "modality" in read_template(ROOT / "notebooks" / "04_distill.ipynb").settings


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("00_start_here", {"arms": ["finetune", "clip_dt"]}, "arm='clip_dt': expected one of"),
        ("00_start_here", {"seeds": [0, -1]}, "seed=-1"),
        ("02_data", {"tasks": ["vcr", "snli"]}, "did you mean 'snli_ve'?"),
        ("03_students", {"students": ["data/models/mini-vlt"]}, "did you mean 'data/models/mini-vilt'?"),
        ("04_distill", {"arm": "clip_dt"}, "did you mean 'clip_td'?"),
        ("04_distill", {"task": "vcr_q"}, "did you mean 'vcr_qa'?"),
        ("04_distill", {"student": "data/models/mini-vlt"}, "there is no"),
        ("04_distill", {"student": "mini-vilt"}, "did you mean 'data/models/mini-vilt'?"),
        ("04_distill", {"student": "reports/runs/nothing/student"}, "there is no"),
        ("04_distill", {"teacher": "ViT-B16"}, "open_clip knows no model of that name; did you mean 'ViT-B"),
        ("04_distill", {"teacher": "data/models/mini-clip"}, "'local-dir:data/models/mini-clip'"),
        ("04_distill", {"teacher": "local-dir:data/models/mini-clp"}, "did you mean 'local-dir:data/models/"),
        ("04_distill", {"regions": "boxes:data/models/mini-detectr"}, "did you mean 'boxes:data/models/"),
        ("04_distill", {"data_dir": "nowhere"}, "there is no"),
        ("04_distill", {"shift": "prior"}, "does not apply to task='vcr_qa'"),
        ("04_distill", {"shots": 1.0}, "Write 1 for one, 0 for all"),
        ("06_targeting", {"relevances": ["valu"]}, "did you mean 'value'?"),
    ],
)
def test_what_only_a_kernel_used_to_find_is_found_before_it_starts(name, given, expected):
    template = read_template(ROOT / "notebooks" / f"{name}.ipynb")
    with pytest.raises(ConfigError) as error:
        check_parameters(template, given)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"teacher": "ViT-B-16", "teacher_pretrained": "openai"}, {"teacher": "ViT-B/32"},
        {"teacher": "hf-hub:laion/CLIP-ViT-B-32"}, {"student": "dandelin/vilt-b32-mlm"},
        {"student": "teacher"}, {"regions": "clip"}, {"shots": 0.1}, {"shots": 24.0},
        {"relevance": "entropy"}, {"eval_splits": ["val", "val_style"]},
    ],
)  # fmt: skip
def test_what_is_right_passes(given):
    assert check_parameters(read_template(ROOT / "notebooks" / "04_distill.ipynb"), given) == []


def test_regions_in_several_files_are_there_or_named(tmp_path):
    template = read_template(ROOT / "notebooks" / "04_distill.ipynb")
    (tmp_path / "b").mkdir()
    (tmp_path / "r.pth").touch()
    for there in (f"npz:{tmp_path},{tmp_path}/b", f"boxes:resnet50@{tmp_path}/r.pth"):
        assert check_parameters(template, {"regions": there}) == []
    for missing in (f"npz:{tmp_path},{tmp_path}/c", f"grid:resnet50@{tmp_path}/c"):
        with pytest.raises(ConfigError, match=f"there is no {tmp_path}/c"):
            check_parameters(template, {"regions": missing})


def test_parameters_may_be_arithmetic_unannotated_and_beside_other_code():
    declared = declared_in(
        "import os\n%load_ext autoreload\n!ls\n"
        'a: int = 2 * 3  # of a\nhome = os.environ["HOME"]\nseed = 3\nrates = [1e-3, 2 ** -10]\n'
        'where: str = os.environ["DATA"]  # a folder\nnothing: int\nbad = 1 / 0\n'
    )
    assert list(declared) == ["a", "home", "seed", "rates", "where", "bad"]
    assert declared["a"].default == 6 and declared["a"].comment == "of a"
    assert declared["seed"].kind == "int" and declared["rates"].default == [1e-3, 2**-10]
    assert declared["home"].default is declared["where"].default is declared["bad"].default is UNKNOWN
    assert (
        declared["where"].problem(3)
        and not declared["where"].problem("x")
        and not declared["home"].problem(3)
    )


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("mode", "1500000", "1500000"), ("mode", "null", "null"), ("mode", '"x"', "x"),
        ("mode", "1e3", "1e3"),
        ("mode", "[1]", "[1]"), ("a", "3", 3), ("seconds", "5e-1", 0.5), ("a", "010", "010"), ("a", "x", "x"),
        ("other", "3", 3),
        ("other", "[finetune, clip_td]", ["finetune", "clip_td"]), ("other", "[a, 2]", ["a", 2]),
        ("other", "[a, [b]]", "[a, [b]]"),
    ],
)  # fmt: skip
def test_values_of_the_command_line_have_the_parameter_s_type(tmp_path, name, text, value):
    found = read_template(write_template(tmp_path)).from_text(name, text)
    assert found == value and type(found) is type(value)


def test_truth_may_be_spelt_as_python_does():
    template = read_template(ROOT / "notebooks" / "04_distill.ipynb")
    assert [template.from_text("submission", text) for text in ("true", "True", "no")] == [True, True, "no"]
    with pytest.raises(ConfigError, match="eval_splits: 'a' stands 2 times in one object"):
        template.from_text("eval_splits", '[{"a": 1, "a": 2}]')


def test_types_of_parameters(tmp_path):
    template = read_template(write_template(tmp_path))
    check_parameters(template, {"a": 2, "seconds": 1, "mode": "x"})
    for wrong in ({"a": 1.5}, {"a": True}, {"mode": 3}, {"seconds": "1"}, {"modus": "x"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            check_parameters(template, wrong)
