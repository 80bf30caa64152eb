"""The paper's sizes, with random weights: UNITER-base on a detector's features, ViT-B-16."""

import json

import numpy as np
import pytest
import torch

from tdlib.config import RunConfig
from tdlib.make.vocabulary import train_wordpiece_tokenizer
from tdlib.students.uniter import UniterConfig, UniterForMultipleChoice
from tdlib.training import prepare as experiments
from tdlib.training.prepare import prepare
from tdlib.training.run import train_run


@pytest.fixture
def uniter_base(tmp_path, captions_texts):
    folder = tmp_path / "uniter-base"
    with torch.device("meta"):
        shapes = UniterForMultipleChoice(UniterConfig(type_vocab_size=4))
    assert sum(p.numel() for p in shapes.parameters()) > 110e6
    torch.manual_seed(0)
    UniterForMultipleChoice(UniterConfig(type_vocab_size=4)).save_pretrained(folder)
    train_wordpiece_tokenizer(captions_texts, 300).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_one_cached_epoch_at_full_size(world, uniter_base, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "CACHE_ROOT", tmp_path / "cache")
    experiments.open_cache.cache_clear()
    small = tmp_path / "vcr"
    small.mkdir()
    (small / "vcr1images").symlink_to(world / "vcr1images")
    for split, number in (("train", 4), ("val", 2)):
        lines = (world / f"{split}.jsonl").read_text().splitlines()[:number]
        (small / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        for line in lines:
            name = json.loads(line)["img_fn"]
            rng = np.random.default_rng(0)
            corners = np.sort(rng.uniform(0, 256, (36, 2, 2)), axis=1).reshape(36, 4)
            (tmp_path / "regions").mkdir(exist_ok=True)
            np.savez(
                tmp_path / "regions" / f"{name.rsplit('/', 1)[-1]}.npz",
                x=rng.random((36, 2048), np.float32), bbox=corners, num_bbox=36, image_w=256, image_h=256,
            )  # fmt: skip
    config = RunConfig.from_parameters(
        data_dir=str(small), student=str(uniter_base), regions=f"npz:{tmp_path / 'regions'}",
        teacher="ViT-B-16", teacher_control="random_weights", shots=0, epochs=1, batch_size=2, shift="",
        probe_examples=1,
    )  # fmt: skip
    metrics = train_run(config, prepare(config), tmp_path / "run")
    assert metrics["updates"] == 2 and metrics["train_examples"] == 4
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert all(np.isfinite(value) for row in history for value in row.values())
    experiments.open_cache.cache_clear()
