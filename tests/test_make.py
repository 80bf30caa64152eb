"""The makers of the mini models: what they read is what readers read, and they continue where they ended."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tdlib.analysis import knowledge
from tdlib.core.paths import ConfigError
from tdlib.core.provenance import tokenizer_digest
from tdlib.data.examples import DataError, Example, Reference, TextPart
from tdlib.make import corpus, kinds, loop, measure, pretraining
from tdlib.make.clip import MINI_CLIP, ClipJob, fast_clip, make_clip
from tdlib.make.detector import train_mini_detector
from tdlib.make.kinds import KINDS
from tdlib.make.pretraining import PHASES, StudentJob, contrastive_loss, matching_loss
from tdlib.make.students import make_student
from tdlib.make.vocabulary import train_clip_tokenizer, train_wordpiece_tokenizer
from tdlib.miniworld.worlds import Size, scene_at
from tdlib.regions.sources import open_regions
from tdlib.students.base import StudentError, check_tokenizer
from tdlib.students.registry import load_student

SCENES = 24
BATCH = {"text": 4, "words": 4, "contrast": 4, "fusion": 4}
TINY = {"scenes": SCENES, "batch": BATCH, "pairs": 2}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def work(tmp_path_factory, captions_texts) -> Path:
    """Where corpora and checkpoints lie, with a vocabulary of few texts."""
    corpus._tokenizer.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "vocabulary_texts", lambda seed: captions_texts)
        yield tmp_path_factory.mktemp("make")
    corpus._tokenizer.cache_clear()


@pytest.fixture(scope="module")
def detector(work, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    train_mini_detector(folder, work, scenes=8, steps=1, batch=4)
    return folder


@pytest.fixture(scope="module")
def made(work, detector, tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind of student after six steps, two of them fusion or more."""
    home = tmp_path_factory.mktemp("made")
    for kind in KINDS:
        make_student(kind, home / kind, work, detector, steps=6, **TINY)
    return {kind: home / kind for kind in KINDS}


def job_of(kind: str, work: Path, detector: Path) -> StudentJob:
    return StudentJob(kind, work / "corpus", detector, SCENES, 0, BATCH, 2)


# The corpora


@pytest.mark.parametrize("train", [train_clip_tokenizer, train_wordpiece_tokenizer])
def test_a_tokenizer_is_a_function_of_its_texts(train, captions_texts):
    digests = {tokenizer_digest(train(captions_texts, 300)) for _ in range(3)}
    assert len(digests) == 1


def test_ids_are_of_a_question_and_what_follows_it(work):
    texts = corpus.texts("curated", work / "corpus", 0, SCENES)
    tokenizer = corpus._tokenizer(False, 0)
    assert corpus.two_parts("Where is Riley? On a farm.") == ("Where is Riley?", "On a farm.")
    assert corpus.two_parts("Is it? Yes. No?") == ("Is it?", "Yes. No?")
    ids, named = corpus.tokenize(tokenizer, ["Where is Riley? Near Casey.", "A man and Casey wave."])
    words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    ends = [place for place, word in enumerate(words) if word == "[SEP]"]
    assert words[0] == "[CLS]" and len(ends) == 2 and set(words[ends[1] + 1 :]) == {"[PAD]"}
    assert tokenizer.convert_ids_to_tokens(ids[1].tolist()).count("[SEP]") == 1
    parts = [tokenizer.decode(ids[0, 1 : ends[0]]), tokenizer.decode(ids[0, ends[0] + 1 : ends[1]])]
    assert [part.replace(" ", "") for part in parts] == ["whereisriley?", "nearcasey."]
    riley, casey = ({place for place, person in enumerate(named[0]) if person == index} for index in (1, 0))
    assert tokenizer.decode(ids[0, sorted(riley)]).replace(" ", "") == "riley"
    assert tokenizer.decode(ids[0, sorted(casey)]).replace(" ", "") == "casey"
    assert set(named[0].tolist()) == {-1, 0, 1}
    assert texts.ids.shape == (SCENES, 6, corpus.LONGEST) == texts.named.shape == texts.replaced.shape


def test_long_texts_lose_the_end_of_their_longest_part(work):
    tokenizer = corpus._tokenizer(False, 0)
    ids, _ = corpus.tokenize(tokenizer, ["Where? " + "a " * 80], longest=12)
    assert (ids[0] != tokenizer.pad_token_id).all() and ids[0, -1] == tokenizer.sep_token_id
    assert (ids[0] == tokenizer.sep_token_id).sum() == 2


def test_only_false_captions_have_replaced_words(work):
    texts = corpus.texts("curated", work / "corpus", 0, SCENES)
    assert not texts.replaced[:, :3].any() and texts.replaced[:, 3:].any(-1).mean() > 0.8
    for true, false, changed in zip(texts.ids[0, :3], texts.ids[0, 3:], texts.replaced[0, 3:], strict=True):
        assert set(false[~changed].tolist()) <= set(true.tolist())


def test_arrays_are_made_once_and_anew_for_another_detector(work, detector, tmp_path):
    home = work / "corpus"
    corpus.regions(home, 0, SCENES, detector)
    path = next(home.glob("curated-regions-*")) / "features.npy"
    before = path.stat().st_mtime_ns
    corpus.regions(home, 0, SCENES, detector)
    assert path.stat().st_mtime_ns == before
    train_mini_detector(tmp_path, work, scenes=8, steps=2, batch=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "corpus_code", lambda: "another")
        corpus.regions(home, 0, SCENES, detector)
    assert path.stat().st_mtime_ns != before, "arrays of other code are made anew"
    corpus.regions(home, 0, SCENES, detector)
    other = corpus.regions(home, 0, SCENES, tmp_path)["features"]
    assert len(list(home.glob("curated-regions-*"))) == 2
    assert not np.array_equal(other, np.load(path))


def test_regions_are_those_of_the_source(work, detector, tmp_path):
    """As a set: only the order of things may differ."""
    seen = corpus.regions(work / "corpus", 0, SCENES, detector)
    source = open_regions(f"boxes+grid:{detector}")
    examples = knowledge.curated_pictures(tmp_path, 0, 6)
    for index, example in enumerate(examples):
        real = np.concatenate([[True], seen["real"][index], np.ones(36, bool)])
        expected = source(example)
        assert seen["people"][index] == example.names.count("person")
        own, theirs = (
            sorted((1e4 * np.asarray(boxes)).round().tolist())
            for boxes in (seen["boxes"][index][real], expected.boxes)
        )
        assert own == theirs
        distances = torch.cdist(
            torch.from_numpy(seen["features"][index][real]).double(), expected.features.double()
        )
        size = expected.features.norm(dim=1).mean()  # pictures on disk are JPEG: not to the last digit
        assert distances.min(0).values.mean() < 0.1 * size
        assert not seen["features"][index][~real].any()


def test_batches_have_every_row_once_an_epoch():
    batches = [corpus.batch_at(20, 6, 1, place) for place in range(6)]
    assert len(set(np.concatenate(batches[:3]).tolist())) == 18
    assert not np.array_equal(np.concatenate(batches[:3]), np.concatenate(batches[3:]))
    assert all(len(set(batch.tolist())) == 6 for batch in batches)


# What students read


@each_kind
def test_training_reads_captions_as_readers_do(kind, made, work, detector, tmp_path):
    job = job_of(kind, work, detector)
    _, encoder = measure.open_student(made[kind], detector, tmp_path)
    for index in range(SCENES):
        for row, text in enumerate(corpus.curated_texts(0, index)):
            asked, told = corpus.two_parts(text)
            choices = (TextPart(told),) if told else ()
            read = encoder.text(Example("", Path(), (), (), TextPart(asked), choices, 0, ""))
            trained = job.text(job.as_read(job.curated.ids[index, row])[None, None])
            assert read.input_ids[0].tolist() == trained["input_ids"][0, 0].tolist(), text
            assert read.token_type_ids[0].tolist() == trained["token_type_ids"][0, 0].tolist(), text


def test_views_hide_objects_or_cells(work, detector):
    job = job_of("uniter", work, detector)
    rows, rng = np.arange(8), np.random.default_rng(0)
    whole, few, bare = (job.sight.view(rows, view, rng) for view in ("all", "few", "bare"))
    objects = int(job.sight.real[rows].sum(1).max())
    lengths = [view["region_features"].shape[1] for view in (whole, few, bare)]
    assert lengths == [1 + objects + 36, 1 + objects + kinds.CELLS, 1 + 36]
    real = torch.from_numpy(job.sight.real[rows]).sum(1)
    for view in (whole, few):
        assert torch.equal((view["region_objects"] >= 0).sum(1), real)
        assert torch.equal(view["region_mask"].sum(1), real + view["region_mask"].shape[1] - objects)
    assert bare["region_objects"].eq(-1).all() and bare["region_mask"].all()
    assert not job.sight.people(rows, bare).any()
    assert job.sight.people(rows, few).tolist() == [len(scene_at(0, "curated", i).people) for i in rows]
    cells = [set(map(tuple, boxes.tolist())) for boxes in few["region_boxes"][:, 1 + objects :]]
    assert all(len(found) == kinds.CELLS for found in cells) and cells[0] != cells[1]
    assert_close(bare["region_features"][:, 1:], whole["region_features"][:, 1 + objects :])


def test_distortion_changes_tones_and_edges_of_each_picture_and_no_place(work):
    pictures = corpus.pictures("curated", work / "corpus", 0, SCENES)["pictures"]
    shown = torch.from_numpy(np.array(pictures[:1])).expand(12, -1, -1, -1) / 255
    found = corpus.distorted(shown, np.random.default_rng(0))
    assert found.min() >= 0 and found.max() <= 1
    assert len({tuple(picture.flatten().tolist()) for picture in found}) == 12
    assert_close(found, corpus.distorted(shown, np.random.default_rng(0)), rtol=0, atol=0)

    def outlines(images):  # of the tones, smoothed
        grey = torch.nn.functional.avg_pool2d(images.mean(1), 4)
        return torch.stack(torch.gradient(grey, dim=(1, 2))).flatten(2).transpose(0, 1).flatten(1)

    assert torch.nn.functional.cosine_similarity(outlines(shown), outlines(found)).min() > 0.7


@each_kind
def test_training_shows_a_quarter_of_the_pictures_as_they_are(kind, work, detector):
    sight = job_of(kind, work, detector).sight
    seen = sight(np.zeros(200, int), np.random.default_rng(0), 0.5)
    whole = seen["pixel_values"] if kind == "vilt" else seen["region_features"][:, 0]
    _, numbers = torch.unique(whole.flatten(1), dim=0, return_counts=True)
    assert any(30 <= number <= 70 for number in numbers.tolist())


def test_texts_of_a_batch_are_of_like_length(work, detector):
    job = job_of("vilt", work, detector)
    parts = [job.rows("fusion", place) for place in range(6)]
    assert sorted(np.concatenate([rows for rows, _ in parts]).tolist()) == list(range(SCENES))
    spans = []
    for rows, reading in parts:
        both = np.stack([job.curated.ids[rows, reading], job.curated.ids[rows, reading + 3]])
        lengths = (both != job.pad).sum(-1).max(0)
        spans.append((lengths.min(), lengths.max()))
    for (_, high), (low, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        assert high <= low
    again = job_of("vilt", work, detector)
    assert np.array_equal(again.rows("fusion", 4)[0], parts[4][0])


# What is learned


def test_matching_asks_which_is_true_and_whether_each_is():
    right, wrong, shifted = (torch.tensor([pair]) for pair in ([3.0, -3.0], [-3.0, 3.0], [9.0, 3.0]))
    assert matching_loss(right) < 0.1 < 6 < matching_loss(wrong)
    assert matching_loss(shifted) > matching_loss(right) + 1  # both are called true
    expected = np.log1p(np.exp(-3.0)) + np.log1p(np.exp(-6.0))
    assert_close(float(matching_loss(right)), expected)


def test_contrast_is_least_where_pairs_agree():
    images = torch.eye(3)
    scale = torch.tensor(10.0)
    assert contrastive_loss(images, 5 * images, scale) < 0.01
    assert contrastive_loss(images, images.roll(1, 0), scale) > 5
    assert_close(contrastive_loss(torch.ones(3, 3), images, scale), torch.log(torch.tensor(3.0)))


@each_kind
@pytest.mark.parametrize("phase", [name for name, _ in PHASES])
def test_every_phase_teaches_what_it_is_about(kind, phase, work, detector):
    """A loss is finite, the same for the same place, and moves the parameters that it should."""
    job = job_of(kind, work, detector)
    job.memory["hardened"] = 300
    loss, figures = job.loss(phase, 0, 0.5)
    again, _ = job.loss(phase, 0, 0.5)
    other, _ = job.loss(phase, 1, 0.5)
    assert loss.isfinite() and all(value.isfinite() for name, value in figures.items() if name != "plain")
    assert float(loss.detach()) == float(again.detach()) != float(other.detach())
    loss.backward()
    moved = {name for name, value in job.module.named_parameters() if value.grad is not None}
    assert ("heads.truth.weight" in moved) == (phase == "fusion")
    assert ("heads.transform.dense.weight" in moved) == (phase in ("text", "fusion"))
    assert ("heads.votes.0.weight" in moved) == (phase != "text")
    assert ("heads.scale" in moved) == (phase in ("contrast", "fusion"))
    assert any("classifier" in name for name in moved) == (phase == "fusion")


def test_hard_captions_come_when_easy_ones_are_mastered(work, detector, monkeypatch):
    job = job_of("vilt", work, detector)
    assert "hard" in job.loss("fusion", 1, 0.5)[1]
    assert job.memory["hardened"] == 0 and job.loss("fusion", 1, 0.5)[1]["hard"].isnan()
    job.memory["matched"] = 0.9
    job.loss("fusion", 1, 0.5)
    assert job.memory["hardened"] == 1
    job.memory["hardened"] = 500
    monkeypatch.setattr(pretraining, "HARD", 1.0)
    assert job.loss("fusion", 1, 0.5)[1]["plain"].isnan()  # all are false in one point


# The loop


def test_phases_follow_their_shares():
    phases = (("a", 0.25), ("b", 0.75))
    assert [loop.phase_at(phases, share) for share in (0.0, 0.24, 0.25, 0.99, 1.0)] == [
        "a",
        "a",
        "b",
        "b",
        "b",
    ]
    assert loop.learning_rate(0, 0.0) == loop.PEAK / 100
    assert loop.learning_rate(500, 0.5) == pytest.approx(loop.PEAK / 2) and loop.learning_rate(500, 1.0) == 0


def ended_before(place: int, patch: pytest.MonkeyPatch, job: type, make: Callable[[], None]) -> None:
    """Ends a maker, whose checkpoints follow each step, as it begins step ``place``."""
    loss, places = job.loss, iter(range(place))
    patch.setattr(loop, "SAVE_EVERY", 0)
    patch.setattr(job, "loss", lambda *given: loss(*given) if next(places, None) is not None else sys.exit())
    with pytest.raises(SystemExit):
        make()
    patch.undo()


@pytest.mark.parametrize("kind", ["uniter", "vilt"])
def test_a_continued_run_equals_one_that_never_ended(kind, made, work, detector, tmp_path):
    partly, new = tmp_path / "work", tmp_path / "new"
    partly.mkdir()
    (partly / "corpus").symlink_to(work / "corpus")
    make = partial(make_student, kind, new, partly, detector, steps=6, **TINY)
    with pytest.MonkeyPatch.context() as patch:
        ended_before(3, patch, StudentJob, make)
    assert not new.exists()
    make()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (new / name).read_bytes() == (made[kind] / name).read_bytes()


def test_a_checkpoint_of_other_settings_is_refused(made, work, detector):
    with pytest.raises(DataError, match=r"checkpoint of a run with other pairs \(2; asked for 3\)"):
        make_student("vilt", work / "no", work, detector, steps=6, **TINY | {"pairs": 3})


def test_a_checkpoint_of_other_code_is_neither_continued_nor_published(made, work, detector, monkeypatch):
    """Its training is complete: without the refusal the old weights would be written as the new code's."""
    monkeypatch.setattr(loop, "maker_code", lambda: "another")
    with pytest.raises(DataError, match="checkpoint of a run with other code"):
        make_student("vilt", work / "no", work, detector, steps=6, **TINY)


class Runaway:
    """A job whose loss is not finite from its third step on."""

    phases = (("only", 1.0),)

    def __init__(self):
        self.module = torch.nn.Linear(1, 1)
        self.settings, self.memory = {}, {}

    def loss(self, phase, place, progress):
        return self.module.weight.sum() * (float("nan") if place == 2 else 1.0), {}


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 2 \(only\)"):
        loop.train(Runaway(), tmp_path / "c.safetensors", 5, 1)


def test_a_gradient_that_is_not_finite_ends_the_run_before_its_weights_are_kept(tmp_path):
    class Steep(Runaway):
        def loss(self, phase, place, progress):
            return (self.module.weight * (0.0 if place == 4 else 1.0)).abs().sum().sqrt(), {}

    job = Steep()
    with pytest.raises(FloatingPointError, match=r"step 4 \(only\): the gradient is nan"):
        loop.train(job, tmp_path / "c.safetensors", 5, 1)
    assert torch.isfinite(job.module.weight) and not (tmp_path / "c.safetensors").exists()


def test_a_length_is_above_zero_and_no_shorter_than_what_is_done(tmp_path):
    class Flat(Runaway):
        def loss(self, phase, place, progress):
            return self.module.weight.sum(), {}

    path = tmp_path / "c.safetensors"
    for steps, minutes in ((0, 1), (-3, 1), (None, 0), (None, float("nan"))):
        with pytest.raises(ValueError, match="expected a length above 0"):
            loop.train(Flat(), path, steps, minutes)
    loop.train(Flat(), path, 4, 1)
    with pytest.raises(DataError, match="at step 4, beyond steps=3"):
        loop.train(Flat(), path, 3, 1)
    for length, planned in ((4, {}), (6, {"planned": ["4 steps", "6 steps"]})):
        position = loop.train(Flat(), path, length, 1)
        made = loop.provenance(loop.train, "none", Flat(), position)
        assert {name: made[name] for name in made if name == "planned"} == planned


# What is written


@each_kind
def test_the_folder_loads_and_is_measured_through_its_reader(kind, made, detector, tmp_path):
    folder = made[kind]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert sum(provenance["steps"].values()) == 6 and provenance["corpus"].startswith("curated")
    assert {"seed", "scenes", "tokenizer", "machine", "minutes", "final", "world"} <= set(provenance)
    weights = load_file(folder / "model.safetensors")
    assert all(value.dtype == torch.half for value in weights.values() if value.is_floating_point())
    student, encoder = measure.open_student(folder, detector, tmp_path / "regions")
    figures = knowledge.matching(student, encoder, scenes=6, bare=kind != "vilt")
    views = ("",) if kind == "vilt" else ("", "_bare")
    assert set(figures) == {f"matching{hard}{view}" for hard in ("", "_hard") for view in views}
    assert all(0 <= value <= 1 for value in figures.values())
    loop.note_figures(folder, figures)
    assert json.loads((folder / "provenance.json").read_text())["held_out"] == figures


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "vilt"])
def test_a_score_is_that_of_the_batch_in_training(kind, made, work, detector, tmp_path):
    """The reader that runs use and the maker's own batches give the same logit of the same statement."""
    job = job_of(kind, work, detector)
    seen, view = job.sight, job.sight.view(np.arange(3), "all", np.random.default_rng(0))
    student = load_student(str(made[kind])).eval()
    pictures = knowledge.curated_pictures(tmp_path, 0, 3)
    _, encoder = measure.open_student(made[kind], detector, tmp_path / "regions")
    examples = [
        knowledge.statement(picture, corpus.curated_texts(0, index)[0])
        for index, picture in enumerate(pictures)
    ]
    encoder.prepare(examples)
    found = knowledge.scores(student, encoder, examples)
    job.sight = lambda rows, rng, progress: view  # as evaluation shows pictures
    job.sight.people = seen.people
    visual, people = job.look(np.arange(3), np.random.default_rng(0), 0.5)
    with torch.no_grad():
        named = job.curated.named[:3, 0]
        named = np.where(named < people[:, None], named, -1)
        text = job.text(job.as_read(job.curated.ids[:3, 0])[:, None], named[:, None])
        own = kinds.read(student, text, visual).logits[:, 0]
    assert_close(found, own, rtol=0, atol=0.02)  # pictures on disk are JPEG
    assert found.std() > 0


def test_types_without_captions_start_as_those_of_answers(made):
    rows = load_file(made["uniter"] / "model.safetensors")[KINDS["uniter"].types]
    assert torch.equal(rows[3], rows[2]) and len(rows.unique(dim=0)) == 3


def test_a_classifier_of_vlbert_starts_from_the_word_predictor(made):
    kept = load_file(made["vl-bert"] / "model.safetensors")["classifier.0.dense.weight"]
    labelled = [load_student(str(made["vl-bert"]), seed, labels=("no", "yes")) for seed in (0, 1)]
    for model in labelled:
        assert torch.equal(model.classifier[0].dense.weight, kept.float())
    assert not torch.equal(labelled[0].classifier[2].weight, labelled[1].classifier[2].weight)


def test_names_refer_to_people_that_the_picture_shows():
    assert knowledge._named("A man and Riley, near Casey.", 2).references == (
        Reference(10, 15, (1,)),
        Reference(22, 27, (0,)),
    )
    assert knowledge._named("Riley waves.", 1).references == ()


def test_figures_are_split_by_what_the_curated_corpus_knows(made, detector):
    size = Size(train=0, val=30, test=0, shifted=0)
    figures = measure.measure_student(made["vilt"], detector, 6, 3, size)
    for name in ("vcr_val_balanced", "vcr_val_shortcut", "snli_ve_dev_balanced"):
        assert {name, f"{name}_known", f"{name}_unknown"} <= set(figures)
    assert all(0 <= value <= 1 for value in figures.values())


def test_the_fast_attention_is_open_clips():
    config = json.loads(json.dumps(MINI_CLIP))
    config["text_cfg"]["vocab_size"] = 50
    fast, usual = fast_clip(config), open_clip.CLIP(**config)
    usual.load_state_dict(fast.state_dict())
    pixels, ids = torch.randn(2, 3, 96, 96), torch.randint(1, 49, (2, 48))
    ids[:, -1] = 49
    for read in (lambda model: model.encode_image(pixels), lambda model: model.encode_text(ids)):
        results = []
        for model in (fast, usual):
            model.zero_grad()
            features = read(model)
            features.square().sum().backward()
            results.append([features, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(results[0]) > 20
        assert_close(*results, rtol=1e-3, atol=1e-4)


def test_a_model_with_another_tokenizer_is_neither_read_nor_measured(
    made, detector, captions_texts, tmp_path
):
    """Its training would look perfect, and it would be at chance."""
    folder = shutil.copytree(made["vilt"], tmp_path / "made")
    digest = check_tokenizer(folder, required=True)
    assert digest == json.loads((folder / "provenance.json").read_text())["tokenizer"]
    train_wordpiece_tokenizer(captions_texts, 280).save_pretrained(folder)
    for use in (
        lambda: measure.open_student(folder, detector, tmp_path / "regions"),
        lambda: measure.measure_student(folder, detector, 6, 3),
        lambda: measure.measure_clip(folder, 6, 3),
    ):
        with pytest.raises(StudentError, match="is not the one that its weights were trained with"):
            use()
    (folder / "provenance.json").write_text('{"made_by": "somebody"}')
    assert check_tokenizer(folder) == ""
    with pytest.raises(StudentError, match=r"does not say .*somebody"):
        measure.measure_student(folder, detector, 6, 3)


def test_the_teacher_continues_loads_and_is_measured(work, tmp_path):
    given = {"scenes": SCENES, "batch": {"words": 4, "contrast": 6}, "steps": 4}
    for name in ("whole", "parted"):
        home = tmp_path / f"work-{name}"
        home.mkdir()
        (home / "corpus").symlink_to(work / "corpus")
        make = partial(make_clip, tmp_path / name, home, **given)
        if name == "parted":
            with pytest.MonkeyPatch.context() as patch:
                ended_before(2, patch, ClipJob, make)
            assert not (tmp_path / name).exists()
        make()
    whole, parted = ((tmp_path / name / "open_clip_model.safetensors") for name in ("whole", "parted"))
    assert whole.read_bytes() == parted.read_bytes()
    size = Size(train=0, val=10, test=0, shifted=0)
    figures = measure.measure_clip(tmp_path / "whole", 8, 3, size)
    assert {"picture_of_8", "caption_of_8", "vcr_val", "vcr_val_shortcut"} == set(figures)


def test_makers_replace_their_own_folders_only(tmp_path):
    (tmp_path / "config.json").write_text("{}")  # a model of somebody else
    work = tmp_path / "work"
    for make in (
        lambda: make_student("vilt", tmp_path, work, tmp_path, steps=1),
        lambda: make_clip(tmp_path, work, steps=1),
        lambda: train_mini_detector(tmp_path, work, scenes=1, steps=1),
    ):
        with pytest.raises(ConfigError, match=r"provenance\.json.*choose another folder"):
            make()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_command_line_makes_measures_and_notes(monkeypatch, tmp_path):
    from tdlib.make import __main__ as command

    called = []

    def make(kind, folder, work, detector, **options):
        called.append((kind, options["minutes"], options["scenes"]))
        folder.mkdir()
        (folder / "provenance.json").write_text('{"steps": 3}')
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(command, "make_student", make)
    monkeypatch.setattr(command, "measure_student", lambda folder, detector: {"matching": len(called)})
    folder = tmp_path / "made"
    command.main(["vilt", "--minutes", "2", "--scenes", "50", "--out", str(folder)])
    assert called == [("vilt", 2.0, 50)]
    made = json.loads((folder / "provenance.json").read_text())
    assert made["held_out"] == {"matching": 1} and made["steps"] == 3 and len(made["sha256"]) == 64
    command_line = f"python -m tdlib.make vilt --minutes 2 --scenes 50 --out {folder}"
    assert made["command"] == command_line
    called.append("again")
    command.main(["vilt", "--measure", "--out", str(folder)])
    again = json.loads((folder / "provenance.json").read_text())
    assert again["held_out"] == {"matching": 2} and again["command"] == command_line
    (folder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(DataError, match=r"model\.safetensors: not the weights of provenance\.json"):
        command.main(["vilt", "--measure", "--out", str(folder)])
    for wrong in (
        ["vilt", "--minutes", "2", "--steps", "3"], ["detector", "--minutes", "2"], ["bert"],
        ["vilt", "--steps", "0"], ["vilt", "--minutes", "0"], ["vilt", "--minutes", "nan"],
        ["vilt", "--scenes", "0"], ["vilt", "--measure", "--steps", "5"], ["page", "--minutes", "5"],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            command.main(wrong)
