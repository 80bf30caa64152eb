"""The explorer: runs are found, examples pass filters, one example is read alone, views show the data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from html_page import problems
from records import drawn_record
from torch.nn.functional import normalize
from torch.testing import assert_close

from tdlib.config import RunConfig
from tdlib.core.records import END, read_records, write_records
from tdlib.data.examples import DataError
from tdlib.method.alignment import image_conditioned_targets
from tdlib.miniworld.worlds import read_concepts
from tdlib.training.data import EncodedExamples
from tdlib.training.evaluation import predict
from tdlib.training.prepare import teacher_cache
from tdlib.training.run import compare
from tdlib.views import explorer, index
from tdlib.views.alignment import tokens_of
from tdlib.views.attention import relevance_view
from tdlib.views.compare import values_view
from tdlib.views.explorer import VIEWS, ViewRequest, show
from tdlib.views.index import ExplorerError, Filter, Run, companion, find_runs

MANY = 2_600


def fake_run(folder: Path, records, **config) -> Path:
    """A run folder as far as records go."""
    (folder / "student").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(RunConfig(**config).model_dump()))
    labels = {"id2label": {"0": "entailment", "1": "neutral", "2": "contradiction"}}
    (folder / "student" / "config.json").write_text(json.dumps(labels | {"num_hidden_layers": 2}))
    write_records(records, folder / index.SELECTIONS)
    return folder


@pytest.fixture(scope="module")
def base(base):
    changes = {"eval_splits": ["val"], "shift": "", "probe_examples": 4, "probe_every": 2}
    return base.model_copy(update=changes)


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> list[Run]:
    """Three arms, trained for real; the baseline records nothing."""
    folder = tmp_path_factory.mktemp("runs")
    compare(base, ["finetune", "naive", "clip_td"], [0], folder)
    return find_runs([folder])


@pytest.fixture
def look(runs) -> ViewRequest:
    row = runs[0].index.iloc[1]
    return ViewRequest(runs[0], row["split"], row["example_id"], runs[1])


# Runs


def test_an_index_tells_what_the_data_say_of_its_examples(runs, world):
    lines = read_concepts(world, "val")
    names = {True: "known", False: "unknown"}
    for row in runs[0].index.itertuples():
        line = lines[row.example_id]
        assert (row.concept, row.style) == (names[line["right"]["known"]], line["style"])
    assert {"known", "unknown"} <= set(runs[0].index["concept"])


def test_a_folder_may_look_like_a_pattern(runs, tmp_path):
    for name in ("runs[v2]", "runsv"):  # the pattern fits the second, which must not be read
        shutil.copytree(runs[0].folder, tmp_path / name / "clip_td-seed0")
    (run,) = find_runs(["runs[v2]"], tmp_path)
    assert run.folder == (tmp_path / "runs[v2]" / "clip_td-seed0").resolve()
    assert len(run.index) == len(runs[0].index)
    shutil.rmtree(tmp_path / "runsv")
    assert find_runs(["runs[[]v2]/*"], tmp_path)[0].folder == run.folder
    assert find_runs([tmp_path / "runs[v2]"])[0].folder == run.folder
    assert find_runs(["*"], tmp_path / "runs[v2]")[0].folder == run.folder


def test_a_run_that_was_trained_again_is_read_again(runs, tmp_path):
    folder = tmp_path / "clip_td-seed0"
    shutil.copytree(runs[0].folder, folder)
    row = runs[0].index.iloc[1]
    (before,) = find_runs([folder])
    (record, *others) = before.records(row["split"], row["example_id"])
    write_records([replace(record, instance_weight=0.123), *others], folder / index.SELECTIONS)
    (after,) = find_runs([folder])
    assert after != before and after == find_runs([folder])[0]
    assert after.records(row["split"], row["example_id"])[0].instance_weight == pytest.approx(0.123)


def test_runs_are_found_by_folder_parent_and_glob(runs):
    home = runs[0].folder.parent
    assert [run.name for run in runs] == ["clip_td-seed0", "naive-seed0"]
    for patterns in ([home], [home / "clip*", home / "n*"], [home, home]):
        assert [run.folder for run in find_runs(patterns)] == [run.folder for run in runs], patterns
    assert [run.name for run in find_runs(["naive-seed0", "clip_*"], home)] == [
        "naive-seed0",
        "clip_td-seed0",
    ]
    assert runs[0].steps == (0, 2, *runs[0].steps[2:]) and runs[0].steps[-1] == END
    assert (runs[0].layers, runs[0].heads, runs[0].labels) == (2, 2, ())


@pytest.mark.parametrize(
    ("pattern", "said"), [("nowhere*", "no such folder"), ("finetune-seed0", "probe_examples")]
)
def test_what_holds_no_selections_is_refused(runs, pattern, said):
    with pytest.raises(ExplorerError, match=said):
        find_runs([pattern], runs[0].folder.parent)


def test_an_unfinished_run_is_no_run(image, tmp_path):
    fake_run(tmp_path / "a", [drawn_record(image)])
    fake_run(tmp_path / ".b-unfinished", [drawn_record(image)])
    assert [run.name for run in find_runs([tmp_path])] == ["a"]


def test_a_run_is_compared_with_another_arm_of_its_task(image, tmp_path):
    for name, config in {
        "a": {"seed": 0}, "b": {"seed": 1}, "c": {"arm": "naive", "seed": 1},
        "d": {"arm": "naive", "seed": 0}, "e": {"arm": "naive", "seed": 0, "task": "vqa_v2"},
    }.items():  # fmt: skip
        fake_run(tmp_path / name, [drawn_record(image)], **config)
    known = {run.name: run for run in find_runs([tmp_path])}
    assert companion(list(known.values()), known["a"]) is known["d"]
    assert companion([known["a"], known["b"], known["e"]], known["a"]) is known["b"]
    assert companion([known["a"], known["e"]], known["a"]) is None


def test_functions_of_a_notebook_do_not_hide_its_run(image, tmp_path):
    fake_run(tmp_path / "a", [drawn_record(image)])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"selector": "best_three", "gone": 1}))
    (run,) = find_runs([tmp_path])
    assert run.config.selector == "best_three" and run.config.task == "vcr_qa"


# Index and filters


def test_the_index_holds_each_example_once_as_it_was_at_the_end(runs):
    rows = runs[0].index
    records = read_records(runs[0].folder / index.SELECTIONS, [END])
    assert list(rows["example_id"]) == list(dict.fromkeys(r.example_id for r in records))
    for row in rows.to_dict("records"):
        own = [r for r in records if r.example_id == row["example_id"]]
        assert row["text"].split("\n") == [r.text for r in sorted(own, key=lambda r: r.choice)]
        assert row["answer"] == own[row["label"]].text and row["prediction"] == own[0].prediction
        assert (row["p_T"], row["p_S"], row["c"]) == (
            own[0].teacher_probability, own[0].student_probability, own[0].instance_weight
        )  # fmt: skip
        assert row["correct"] == (row["label"] == row["prediction"])
        assert row["disagreement"] == abs(row["p_T"] - row["p_S"])


def test_an_index_without_labels(image, tmp_path):
    nothing = dict.fromkeys(("label", "teacher_probability", "student_probability", "instance_weight"))
    records = [drawn_record(image, **nothing), drawn_record(image, example_id="e-2", choice=0, label=2)]
    write_records(records, tmp_path / "some.parquet")
    rows = index.read_index(tmp_path / "some.parquet", ("entailment", "neutral", "contradiction"))
    assert list(rows["answer"].isna()) == [True, False] and rows["answer"][1] == "contradiction"
    assert rows["correct"].isna()[0] and rows["c"].isna()[0]
    assert list(Filter(correct=False).choose(rows)["example_id"]) == ["e-2"]
    assert list(Filter(weight=(0.0, 5.0)).choose(rows)["example_id"]) == ["e-2"]
    assert len(Filter().choose(rows)) == 2


def test_a_label_that_is_named_like_the_number_of_another_is_found_by_its_name(table):
    counts = table.assign(answer=["2", "0", "red", None] * 2)  # VQA's answers
    assert list(Filter(label="2").choose(counts)["example_id"]) == ["val-0", "val-4"]
    assert list(Filter(label="1").choose(counts)["example_id"]) == ["val-1", "val-5"]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    numbers = np.linspace(0, 1, 8)
    frame = pd.DataFrame({
        "split": ["val", "shifted"] * 4, "example_id": [f"val-{i}" for i in range(8)],
        "label": pd.array([0, 1, 2, None] * 2, dtype="Int64"),
        "prediction": pd.array([0, 0, 2, 1] * 2, dtype="Int64"),
        "answer": ["A red (big) hat.", "No", "Yes", None] * 2,
        "text": ["Why? A red (big) hat.\nWhy? It rains.", "Is it?", "IS IT?", "Who?"] * 2,
        "p_T": numbers, "p_S": numbers[::-1], "c": [0.1, 0.2, 0.3, np.nan, 0.5, 0.6, 0.7, np.nan],
    })  # fmt: skip
    frame["correct"] = frame["label"] == frame["prediction"]
    frame["concept"], frame["style"] = ["known", "unknown", ""] * 2 + ["known"] * 2, ["flat", "noir"] * 4
    return frame.assign(disagreement=(frame["p_T"] - frame["p_S"]).abs())


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        (Filter(), range(8)),
        (Filter(text="  HAT red "), [0, 4]),
        (Filter(text="(big)"), [0, 4]),  # no pattern, a string
        (Filter(text="it? val-1"), [1]),
        (Filter(text="yes"), [2, 6]),  # the answer counts
        (Filter(label="2"), [2, 6]),
        (Filter(label="No"), [1, 5]),
        (Filter(label="Who"), []),
        (Filter(split="shifted"), [1, 3, 5, 7]),
        (Filter(concept="known"), [0, 3, 6, 7]),
        (Filter(concept="unknown", style="flat"), [4]),
        (Filter(correct=True), [0, 2, 4, 6]),
        (Filter(correct=False), [1, 5]),
        (Filter(weight=(0.2, 0.5)), [1, 2, 4]),
        (Filter(weight=(0.65, float("inf"))), [6]),
        (Filter(disagreement=0.9), [0, 7]),
        (Filter(text="hat", split="val", correct=True, weight=(0.3, 1)), [4]),
        (Filter(text="nothing"), []),
        (Filter(order="highest c"), [6, 5, 4, 2, 1, 0, 3, 7]),
        (Filter(order="lowest c", split="val"), [0, 2, 4, 6]),
        (Filter(order="largest disagreement"), [0, 7, 1, 6, 2, 5, 3, 4]),
        (Filter(order="wrong first"), [1, 5, 0, 2, 4, 6, 3, 7]),
    ],
)
def test_a_filter_keeps_what_it_says(table, filter, expected):
    found = filter.choose(table)
    assert list(found["example_id"]) == [f"val-{i}" for i in expected]
    assert list(found.index) == list(range(len(found)))


@pytest.fixture(scope="module")
def large(image, tmp_path_factory) -> Run:
    """A run that recorded more examples than are drawn together."""
    one = drawn_record(image)
    records = [
        replace(one, example_id=f"val-{i:04}", text=f"{one.text} w{i % 100}w", instance_weight=i / MANY)
        for i in range(MANY)
    ]
    (run,) = find_runs([fake_run(tmp_path_factory.mktemp("large") / "run", records)])
    return run


def test_examples_are_one_index_and_read_one_by_one(large, monkeypatch):
    assert len(large.index) == MANY and large.index["example_id"].iloc[-1] == f"val-{MANY - 1}"
    found = Filter(text="unbearable w42w", weight=(0.5, 1.0)).choose(large.index)
    assert len(found) == MANY // 200 and found["text"].str.endswith(" w42w").all()
    asked, real = [], pq.read_table

    def read(path, **options):
        asked.append(str(options["filters"]))
        return real(path, **options)

    monkeypatch.setattr(pq, "read_table", read)
    (record,) = large.records("val", "val-1234")
    assert record.instance_weight == 1234 / MANY
    assert len(asked) == 1 and "val-1234" in asked[0], "other row groups are not decoded"
    with pytest.raises(ExplorerError, match="nothing of 'val-20000'"):
        large.records("val", "val-20000")


def test_instance_weights_of_many_are_drawn_around_the_example(large):
    data = show(ViewRequest(large, "val", f"val-{MANY - 1}"), "instance weights").table()
    assert len(data) == explorer.DRAWN_EXAMPLES
    assert data.set_index("example_id").loc[f"val-{MANY - 1}", "c"] == (MANY - 1) / MANY


# Views


@pytest.mark.parametrize("name", sorted({*VIEWS} - {"re-paired lesson", "conditioned targets"}))
def test_every_view_of_a_trained_run(look, name):
    view = show(look, name)
    assert problems(view.to_html()) == []
    assert look.example_id in repr(view) and look.example_id in view.to_html()
    assert len(view.table())
    assert view.figure().get_size_inches().min() > 1


def test_a_run_that_re_pairs_nothing_has_no_lesson(look):
    with pytest.raises(ValueError, match="no record has a re-paired lesson"):
        show(look, "re-paired lesson")


@pytest.mark.parametrize("view", ["student: attention", "student: gradient"])
def test_tokens_without_a_place_have_their_names(look, view):
    tokens = list(show(look, view).table()["token"])
    assert (
        tokens[0] == "[CLS]" and "[SEP]" in tokens and not any(name.startswith("token ") for name in tokens)
    )


@pytest.mark.parametrize(("modality", "picture", "words"), [("text", False, True), ("visual", True, False)])
def test_a_modality_alone(look, modality, picture, words):
    html = show(replace(look, modality=modality), "statement and picture").to_html()
    assert ("<img" in html) == picture
    assert (look.record().text.split()[-2] in html) == words


def test_choice_step_layer_and_head_decide_what_is_shown(look):
    other = replace(look, choice=(look.record().label + 1) % 4)
    assert other.record().choice != look.record().choice == look.record().label
    assert replace(look, step=0).record().step == 0 and look.record().step == END
    heads = [show(replace(look, layers=(1,), head=h), "student: attention").table()["value"] for h in (0, 1)]
    assert not np.allclose(*heads)
    assert "layer 1, head 0" in show(replace(look, layers=(-1,), head=0), "student: attention").to_html()
    tower = show(replace(look, modality="text"), "teacher: attention").to_html()
    assert "teacher, text tower" in tower


def test_two_steps_of_one_run_are_compared(look):
    same = replace(look, second=look.run, step=0)
    view = show(same, "two runs")
    assert "clip_td-seed0 − clip_td-seed0, step 0" in view.to_html()
    first, second = (replace(same, step=step).record() for step in (0, END))
    expected = second.weight * second.selected - first.weight * first.selected
    np.testing.assert_allclose(view.table()["difference"], expected)


def test_students_with_other_tokens_stand_side_by_side(image, tmp_path):
    whole = drawn_record(image)
    fewer = replace(whole, boxes=np.concatenate([whole.boxes[:-1], [[0.0, 0.0, 1.0, 1.0]]]))
    for name, record in {"a": whole, "b": fewer}.items():
        fake_run(tmp_path / name, [record])
    one, two = find_runs([tmp_path])
    html = show(ViewRequest(one, "val", "val-3", two), "two runs").to_html()
    assert ">a<" in html and ">b<" in html and "−" not in html
    fake_run(tmp_path / "c", [replace(whole, text=whole.text.replace("Casey", "Jodie"))])
    with pytest.raises(ExplorerError, match="different data"):
        show(ViewRequest(one, "val", "val-3", find_runs([tmp_path / "c"])[0]), "two runs")


@pytest.mark.parametrize(
    ("view", "change", "said"),
    [
        ("two runs", {"second": None}, "second run"),
        ("nonsense", {}, "expected one of"),
        ("evolution", {"modality": "sound"}, "expected one of both"),
        ("evolution", {"step": 77}, r"no step 77; it recorded 0, .*-1 \(end\)"),
        ("two runs", {"example_id": "val-99"}, "recorded nothing of 'val-99'"),
        ("statement and picture", {"choice": 9}, "choice 9"),
    ],
)
def test_what_cannot_be_shown_is_said(look, view, change, said):
    with pytest.raises(ValueError, match=said):
        show(replace(look, **change), view)
    note = explorer.shown(replace(look, **change), view)
    assert problems(note.to_html()) == [] and view in repr(note)


def test_a_run_without_steps_or_weights_says_so(image, tmp_path):
    fake_run(tmp_path / "a", [drawn_record(image, instance_weight=None)])
    (run,) = find_runs([tmp_path])
    for view, said in (
        ("evolution", "probe_every"),
        ("instance weights", "no record has an instance weight"),
    ):
        with pytest.raises(ValueError, match=said):
            show(ViewRequest(run, "val", "val-3"), view)


def test_an_example_that_left_the_data_is_named(runs):
    with pytest.raises(ExplorerError, match=r"'val-999' is not in 'val' of .*are the data those of clip_td"):
        explorer.example_of(runs[0], "val", "val-999")


def test_an_example_whose_text_has_changed_since_is_not_mixed_with_its_record(look, monkeypatch):
    whole = explorer.example_of(look.run, look.split, look.example_id)
    other = replace(whole, prompt=replace(whole.prompt, text="Really? " + whole.prompt.text))
    monkeypatch.setattr(explorer, "example_of", lambda *_: other)
    with pytest.raises(ExplorerError, match="the data have changed since"):
        show(look, "student: attention")


def test_an_error_of_the_example_itself_is_not_hidden(runs, monkeypatch):
    class Broken:
        ids = ("val-0",)

        def __getitem__(self, place):
            raise DataError("val-0: its picture is missing")

    monkeypatch.setattr(explorer, "read_split", lambda *_: Broken())
    with pytest.raises(DataError, match="its picture is missing"):
        explorer.example_of(runs[0], "val", "val-0")


def test_titles_of_a_task_with_a_label_set_name_the_label(image, tmp_path):
    record = replace(drawn_record(image), choice=0, label=0)
    values = np.ones(len(record.tokens)) / len(record.tokens)
    labels = ("contradiction", "neutral", "entailment")
    for view in (
        values_view(record, values, "m", labels=labels), relevance_view(record, values, "m", labels),
    ):  # fmt: skip
        assert "(contradiction)" in repr(view) and "(true)" not in repr(view)


def test_runs_with_other_answers_are_not_compared(look, monkeypatch):
    monkeypatch.setitem(vars(look.run), "labels", ("yes", "no"))
    monkeypatch.setitem(vars(look.second), "labels", ("yes",))
    with pytest.raises(ExplorerError, match="other answers to choose from"):
        show(look, "two runs")


@pytest.mark.parametrize("name", ["statement and picture", "all choices", "two runs"])
def test_views_of_records_stand_without_pictures_and_data(look, name, monkeypatch):
    """The data have moved: texts and numbers are those of the record."""
    moved = [
        replace(r, image=Path("/gone") / r.image.name) for r in look.run.records(look.split, look.example_id)
    ]
    monkeypatch.setattr(Run, "records", lambda self, split, example_id, steps=None: [
        r for r in moved if steps is None or r.step in steps
    ])  # fmt: skip
    view = show(replace(look, second=look.run), name)
    html = view.to_html()
    assert problems(html) == [] and "/gone/" in html and "missing" in html and "<img" not in html
    record = replace(look, second=None).record()
    for i in np.flatnonzero(record.selected & record.is_text):
        assert f"{100 * record.weight[i]:.1f}" in html
    assert view.to_png(dpi=30).startswith(b"\x89PNG")


def test_views_that_need_the_data_say_what_is_gone(look, monkeypatch):
    config = look.run.config.model_copy(update={"data_dir": "/gone"})
    monkeypatch.setitem(vars(look.run), "config", config)
    for name in ("student: attention", "student: gradient"):
        note = explorer.shown(look, name)
        assert problems(note.to_html()) == [] and "/gone" in repr(note)
    own = explorer.attempted(
        "your example", lambda: explorer.own_view(look.run, explorer.own_example("/gone/x", "A."))
    )
    assert "/gone/x" in repr(own)


def test_the_runs_own_mass_and_temperature_select_what_it_selected(look):
    record = look.record()
    config = look.run.config
    again = explorer.reselected(look.run, record, config.mass, config.temperature)
    np.testing.assert_array_equal(again.selected, record.selected)
    np.testing.assert_allclose(again.weight, record.weight, atol=1e-5)
    np.testing.assert_allclose(again.score, record.score, atol=1e-5)
    assert explorer.reselected(look.run, record) is record
    everything = explorer.reselected(look.run, record, mass=1.0)
    assert everything.selected.sum() > record.selected.sum()
    flat = explorer.reselected(look.run, record, temperature=100.0)
    assert flat.score[record.is_text].std() < record.score[record.is_text].std()
    other = Run(look.run.name, look.run.folder)
    vars(other)["config"] = config.model_copy(update={"selector": "of a notebook"})
    with pytest.raises(ExplorerError, match="of a notebook"):
        explorer.reselected(other, record, mass=0.5)


def test_agreement_is_the_cosine_of_the_aligned_targets(look):
    record = look.record()
    cosines = explorer.agreement(look.run, record)
    assert cosines.shape == (len(record.tokens),) * 2
    np.testing.assert_allclose(np.diag(cosines)[record.distilled], 1, atol=1e-5)
    assert not cosines[~record.distilled].any() and np.abs(cosines).max() <= 1 + 1e-5
    cache = teacher_cache(look.run.config)
    cell = int(np.flatnonzero(record.is_region & record.distilled)[0])
    word = int(np.flatnonzero(record.is_text & record.distilled)[0])
    spans, boxes = cache.text(record.text).positions.numpy(), cache.picture(record.image).positions.numpy()
    name = "value" if look.run.config.relevance == "value" else "projected"
    text, patches = (
        getattr(part, name).numpy() for part in (cache.text(record.text), cache.picture(record.image))
    )
    start, end = record.spans[word]
    share = np.clip(np.minimum(spans[:, 1], end) - np.maximum(spans[:, 0], start), 0, None)
    left, top, right, bottom = record.boxes[cell]
    wide = np.clip(np.minimum(boxes[:, 2], right) - np.maximum(boxes[:, 0], left), 0, None)
    high = np.clip(np.minimum(boxes[:, 3], bottom) - np.maximum(boxes[:, 1], top), 0, None)
    one, other = share @ text, (wide * high) @ patches
    expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert cosines[word, cell] == pytest.approx(expected, abs=1e-4)


def test_conditioned_words_are_mixed_from_the_patches_that_are_shown(look):
    with pytest.raises(ExplorerError, match="conditioned_targets=True"):
        show(look, "conditioned targets")
    run, record = Run(look.run.name, look.run.folder), look.record()
    vars(run)["config"] = look.run.config.model_copy(update={"conditioned_targets": True})
    tokens = tokens_of(record)
    for centred in (False, True):
        vars(run)["config"] = run.config.model_copy(update={"centred_targets": centred})
        shares = torch.as_tensor(explorer.conditioned_shares(run, record))
        vectors = explorer._targets(run, record, "projected", explorer._centres(run) if centred else None)
        words = torch.as_tensor(record.is_text & record.distilled)
        mixed = normalize(shares.float() @ vectors, dim=-1)[words]
        assert_close(mixed, image_conditioned_targets(vectors, tokens, run.config.temperature)[words])
    view = show(replace(look, run=run), "conditioned targets")
    assert problems(view.to_html()) == [] and view.figure().get_size_inches().min() > 1
    np.testing.assert_allclose(view.table().groupby("position")["share"].sum(), 1, atol=1e-5)
    word = record.tokens[int(np.flatnonzero(words)[-1])]
    (sheet, *_) = show(replace(look, run=run, word=word.upper()), "conditioned targets").sheets
    assert word in sheet.name and sheet.record.is_region[np.argmax(sheet.values)]
    with pytest.raises(ExplorerError, match="contains 'zebra'"):
        show(replace(look, run=run, word="zebra"), "conditioned targets")


# A picture and a text of the user


def test_a_picture_and_a_text_of_ones_own(runs, image, monkeypatch):
    """Selected and answered by the run's trained student, not by another."""
    view = explorer.own_view(runs[0], explorer.own_example(image, " A red umbrella. "))
    (sheet,) = view.sheets
    record = sheet.record
    assert record.text == "A red umbrella." and record.selected.any() and record.label is None
    assert problems(view.to_html()) == [] and "trained student" in repr(view)
    own = explorer.own_example(image, "Why is it wet?", ["It rains.", "It snows."])
    records = [sheet.record for sheet in explorer.own_view(runs[0], own).sheets]
    assert [record.text for record in records] == ["Why is it wet? It rains.", "Why is it wet? It snows."]
    student, encoder = explorer._open_student(runs[0])
    encoder.prepare([own])
    data = EncodedExamples([own], encoder)
    assert records[0].prediction == predict(student, data)[0].argmax()
    changed = Run(runs[0].name, runs[0].folder)
    vars(changed)["config"] = runs[0].config.model_copy(update={"relevance": "disagreement"})
    with pytest.raises(ExplorerError, match="maps of its student, which were dropped"):
        explorer.own_view(changed, own)
    assert explorer.prepared_data_of(runs[0]).config.student == str(runs[0].folder / "student")
    prepared = replace(explorer.prepared_data_of(runs[0]), labels=("yes",))
    monkeypatch.setattr(explorer, "prepared_data_of", lambda run: prepared)
    with pytest.raises(ExplorerError, match="chooses from 1 labels"):
        explorer.own_view(runs[0], own)


def test_bad_input_of_ones_own_is_named(image, tmp_path):
    for text, answers in ((" ", []), ("Why?", ["a", " "])):
        with pytest.raises(ExplorerError):
            explorer.own_example(image, text, answers)
    with pytest.raises(DataError, match="missing"):
        explorer.own_example(tmp_path / "no.png", "A hat.")
    (tmp_path / "bad.png").write_bytes(b"GIF")
    with pytest.raises(DataError, match="does not decode"):
        explorer.own_example(tmp_path / "bad.png", "A hat.")
