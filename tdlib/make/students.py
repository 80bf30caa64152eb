"""The one maker of the mini students: UNITER, ViLT, VL-BERT and VisualBERT on the curated corpus.

``pretraining`` defines what they learn, ``kinds`` the models; this module writes the finished folders.
"""

import shutil
from pathlib import Path

from safetensors.torch import save_file
from transformers import ViltImageProcessor

from tdlib.core.files import refuse_foreign, write_folder, write_json
from tdlib.make import corpus
from tdlib.make.kinds import PatchSight
from tdlib.make.loop import provenance, train
from tdlib.make.pretraining import PAIRS, StudentJob


def write_model(job: StudentJob, folder: Path) -> None:
    """Writes all files of a model folder; weights in half precision.

    Token types that captions do not have become copies of types that they have, as at the start of the
    authors' finetuning on VCR (see ``students.convert``).
    """
    kind, weights = job.kind, dict(job.model.state_dict())
    shutil.copytree(job.curated.tokenizer, folder, dirs_exist_ok=True)
    if kind.sight is PatchSight:
        ViltImageProcessor(  # type: ignore[call-arg]
            size={"shortest_edge": corpus.SIZE}, size_divisor=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(folder)
    if kind.types:
        weights[kind.types] = weights[kind.types][list(kind.met)]
    if kind.transform:
        found = job.heads.transform.state_dict()
        weights |= {f"{kind.transform}{name}": value for name, value in found.items()}
    job.model.config.save_pretrained(folder)
    halves = {name: value.half().contiguous() for name, value in weights.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})


def make_student(
    kind: str, folder: Path, work: Path, detector: Path, *, steps: int | None = None, minutes: float = 80,
    seed: int = 0, scenes: int = 48_000, batch: dict[str, int] | None = None, pairs: int = PAIRS,
    device: str = "cpu",
) -> None:  # fmt: skip
    """Trains a mini student and writes its folder.

    Args:
        kind: a key of ``KINDS``.
        folder: where to write; an earlier one of a maker is replaced when the student is finished.
        work: where corpora and the checkpoint lie; a later call with the same arguments continues there.
        detector: folder of the detector behind region features.
        steps: of the whole run, in place of
        minutes: that it takes; see ``train``.
        seed: of the corpora and of all random numbers.
        scenes: of both corpora.
        batch: pictures or texts per step, by phase.
        pairs: pictures of a "fusion" step with a true and a false caption.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: the folder holds files of somebody else.
    """
    refuse_foreign(folder, "provenance.json")
    job = StudentJob(kind, work / "corpus", detector, scenes, seed, batch, pairs, device)
    position = train(job, work / f"{kind}-{seed}" / "checkpoint.safetensors", steps, minutes)

    def fill(partial: Path) -> None:
        write_model(job, partial)
        made = provenance(make_student, "curated; web for texts alone", job, position)
        write_json(partial / "provenance.json", made)

    write_folder(folder, fill)
