"""Set-up shared by all tests: one thread, no network, no screen, and shapes checked at run time."""

import os

# Figures of a GPU are not those of the processor, so it is seen by tests/test_gpu.py alone (`make gpu`).
if "TDLIB_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Before torch, transformers or matplotlib are imported, here and in the kernels that tests start.
os.environ.update(
    OMP_NUM_THREADS="1",  # the same sums with and without xdist, and no fight over cores
    MKL_NUM_THREADS="1",
    MPLBACKEND="Agg",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from jaxtyping import install_import_hook

# nbformat's schemas import it to check addresses, which no notebook has; it takes two seconds of processor
# time in every process that starts: in this one, and (``quick_start``) in those that tests start.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

# Must precede the first import of tdlib: a module imported earlier stays unchecked.
install_import_hook("tdlib.method", "beartype.beartype")


@pytest.fixture(autouse=True, scope="session")
def quick_start(tmp_path_factory) -> Iterator[Path]:
    """A folder of modules that every process which tests start finds first."""
    folder = tmp_path_factory.mktemp("custom")
    (folder / "rfc3987_syntax.py").write_text("raise ImportError\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A VCR folder of 100 MiniWorld pictures."""
    from tdlib.miniworld.writers import Size, write_vcr

    size = Size(train=40, val=30, test=30, shifted=30)
    return write_vcr(tmp_path_factory.mktemp("world") / "vcr", seed=7, size=size)


@pytest.fixture(scope="session")
def worlds(world, tmp_path_factory) -> dict[str, Path]:
    """A folder per data set."""
    from tdlib.miniworld import writers

    home, small = tmp_path_factory.mktemp("worlds"), {"train": 30, "test": 30, "shifted": 30}
    writers.write_snli_ve(home / "snli_ve", 7, writers.Size(**small, val=30))
    writers.write_vqa(home / "vqa_v2", 7, writers.Size(**small, val=30))
    writers.write_vqa_cp(home / "vqa_cp_v2", 7, writers.Size(**small, val=30))
    return {"vcr": world} | {name: home / name for name in ("snli_ve", "vqa_v2", "vqa_cp_v2")}


@pytest.fixture(scope="session")
def examples(world) -> list:
    """Five questions of the VCR folder."""
    from tdlib.data.vcr import VcrReader

    return VcrReader(world, "train").read()[:5]


@pytest.fixture(scope="session")
def image(tmp_path_factory) -> Path:
    """A picture of one colour, 60 x 40 pixels."""
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    Image.new("RGB", (60, 40), "#88aaff").save(path)
    return path


@pytest.fixture(scope="session")
def captions_texts() -> list[str]:
    from tdlib.miniworld.writers import captioned_scene

    return [captioned_scene("web", 7, index)[1] for index in range(200)]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, captions_texts) -> Path:
    """A BERT tokenizer of 300 words."""
    from tdlib.make.vocabulary import train_wordpiece_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "wordpiece"
    train_wordpiece_tokenizer(captions_texts, 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, captions_texts) -> Path:
    """An open_clip model folder: a CLIP of two layers with random weights."""
    import open_clip
    from safetensors.torch import save_file

    from tdlib.make.vocabulary import train_clip_tokenizer

    folder = tmp_path_factory.mktemp("models") / "clip"
    tokenizer = train_clip_tokenizer(captions_texts, 300)
    tokenizer.save_pretrained(folder)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 48, "vocab_size": len(tokenizer), "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    text["hf_tokenizer_name"] = "clip"
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


@pytest.fixture(scope="session")
def teacher(teacher_folder):
    from tdlib.teacher.model import Teacher

    return Teacher(f"local-dir:{teacher_folder}")


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory, captions_texts) -> Path:
    """A transformers model folder: a ViLT of two layers with random weights."""
    from transformers import ViltConfig, ViltImageProcessor

    from tdlib.make.vocabulary import train_wordpiece_tokenizer
    from tdlib.students.vilt import ViltForMultipleChoice

    folder = tmp_path_factory.mktemp("models") / "vilt"
    tokenizer = train_wordpiece_tokenizer(captions_texts, 300)
    torch.manual_seed(0)
    config = ViltConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=48,
        patch_size=16, max_position_embeddings=64, vocab_size=len(tokenizer), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ViltForMultipleChoice(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 48}
    ViltImageProcessor(size=size, size_divisor=16, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory) -> Iterator[Path]:
    """The folder of the teachers' caches: a temporary one, for as long as the tests of a file run."""
    from tdlib.training import prepare as experiments

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "CACHE_ROOT", folder)
        experiments.open_cache.cache_clear()
        yield folder
        experiments.open_cache.cache_clear()


@pytest.fixture(scope="module")
def base(world, student_folder, teacher_folder, own_cache):
    """Settings of a run of a few seconds; a file of tests may have a ``base`` that changes some of them."""
    from tdlib.config import RunConfig

    return RunConfig.from_parameters(
        data_dir=str(world), student=str(student_folder), teacher=f"local-dir:{teacher_folder}",
        learning_rate=5e-4, head_learning_rate=1e-3,  # so that a few updates show
        shots=0.2, epochs=1, batch_size=4, eval_splits=["val", "test"], probe_examples=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(base):
    """What runs with ``base`` share, of seeds 0 and 1."""
    from tdlib.training.prepare import prepare

    return prepare(base, seeds=[0, 1], whole_splits=False)


@pytest.fixture
def no_orphans(tmp_path) -> Iterator[None]:
    """No process of a batch's run in this test's folder outlives the test."""
    yield
    own, left = str(tmp_path.resolve()), []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get("TDLIB_RUN", "").startswith(own):
                left.append(process)
    assert not left, "processes of a run outlived the test"


@pytest.fixture(scope="session")
def reports(tmp_path_factory) -> Path:
    """Two batches with seven seeds: three tasks and arms, a size each; one has more shifted tests."""
    from batch_folders import SHARES, TESTS, write_run

    home = tmp_path_factory.mktemp("batches")
    for seed, task, arm in product(range(7), TESTS, SHARES):
        if arm == "naive" and task != "vcr_qa":
            continue
        write_run(home / "low", task, arm, seed, 12, SHARES[arm] + 0.06, TESTS[task][:2])
        write_run(home / "wide", task, arm, seed, 24, SHARES[arm], TESTS[task])
    return home


@pytest.fixture(scope="session")
def compared(reports) -> pd.DataFrame:
    """Every arm of them in every cell."""
    from tdlib.analysis.compare import compare_arms
    from tdlib.analysis.scores import collect

    runs, scores, missing = collect(reports, ["low", "wide"])
    assert not missing
    return compare_arms(runs, scores, resamples=100)


@pytest.fixture
def history(image) -> list:
    """Records of two statements of two examples at four steps, the end first."""
    from records import drawn_record

    from tdlib.core.records import END

    return [
        drawn_record(image, seed=10 * place + example, step=step, example_id=f"val-{example}")
        for place, step in enumerate((END, 0, 10, 20))
        for example in (3, 4)
    ]
