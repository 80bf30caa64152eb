"""The one maker of the mini students: UNITER, ViLT, VL-BERT and VisualBERT on the curated corpus.

``pretraining`` defines what they learn, ``kinds`` the models; this module writes the finished folders.
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import ViltImageProcessor

from tdlib.core.files import refuse_foreign, write_folder, write_json
from tdlib.data.examples import DataError, Example, TextPart
from tdlib.make import corpus
from tdlib.make.kinds import KINDS, Kind, PatchSight
from tdlib.make.loop import Position, provenance, train
from tdlib.make.pretraining import StudentJob
from tdlib.students.base import StudentEncoder
from tdlib.students.registry import ARCHITECTURES


class _NoRegions:
    """Stands for region features in an encoder that reads texts alone; their width does not matter."""

    foreign = True
    fingerprint = ""
    dim = 0

    def __call__(self, example: Example) -> Any:
        raise DataError(f"{example.id}: no regions here")


def check_reader(job: StudentJob, folder: Path, number: int = 64) -> None:
    """Refuses a folder whose encoder makes other ids or token types from captions than training uses."""
    kind = ARCHITECTURES[job.kind.architecture]
    regions = (_NoRegions(),) if kind.reads_regions else ()
    encoder: StudentEncoder = kind.encoder(str(folder), corpus.LONGEST, *regions)
    for index in range(min(number, job.scenes)):
        for row, text in enumerate(corpus.curated_texts(job.seed, index)):
            asked, told = corpus.two_parts(text)
            choices = (TextPart(told),) if told else ()
            example = Example(f"curated {index}", Path(), (), (), TextPart(asked), choices, 0, "")
            encoded, trained = (
                encoder.text(example),
                job.text(job.as_read(job.curated.ids[index, row])[None, None]),
            )
            for name in ("input_ids", "token_type_ids"):
                if getattr(encoded, name)[0].tolist() != trained[name][0, 0].tolist():
                    raise DataError(
                        f"{folder}: reads {name} of {text!r} as {getattr(encoded, name)[0].tolist()}, but "
                        f"training as {trained[name][0, 0].tolist()}; the maker and the reader disagree"
                    )


def start_folder(kind: Kind, folder: Path, tokenizer: Path) -> None:
    """Writes all files of a model folder that an encoder needs: tokenizer and image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in tokenizer.iterdir():
        shutil.copy(path, folder)
    if kind.sight is PatchSight:
        ViltImageProcessor(  # type: ignore[call-arg]
            size={"shortest_edge": corpus.SIZE}, size_divisor=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(folder)


def write_weights(job: StudentJob, folder: Path) -> None:
    """Writes configuration and weights, in half precision.

    Token types that captions do not have become copies of types that they have, as at the start of the
    authors' finetuning on VCR (see ``students.convert``).
    """
    kind, weights = job.kind, dict(job.model.state_dict())
    if kind.types:
        weights[kind.types] = weights[kind.types][list(kind.met)]
    if kind.transform:
        found = job.heads.transform.state_dict()
        weights |= {f"{kind.transform}{name}": value for name, value in found.items()}
    job.model.config.save_pretrained(folder)
    halves = {name: value.half().contiguous() for name, value in weights.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})


def make_student(
    kind: str, folder: Path, work: Path, detector: Path, *, steps: int | None = None,
    minutes: float | None = None, seed: int = 0, scenes: int = 48_000, peak: float = 1e-3,
    **options: Any,
) -> Position:  # fmt: skip
    """Trains a mini student and writes its folder.

    Args:
        kind: a key of ``KINDS``.
        folder: where to write; an earlier one of a maker is replaced when the student is finished.
        work: where corpora and the checkpoint lie; a later call with the same arguments continues there.
        detector: folder of the detector behind region features.
        steps: of the whole run, or
        minutes: that it may take; see ``train``.
        seed: of the corpora and of all random numbers.
        scenes: of both corpora.
        peak: highest learning rate.
        options: of ``StudentJob`` (batch, pairs, hard, device) and of ``train`` (save_every, log_every,
            stop_after).

    Raises:
        ConfigError: the folder holds files of somebody else.
    """
    of_job = {name: options.pop(name) for name in ("batch", "pairs", "hard", "device") if name in options}
    refuse_foreign(folder, "provenance.json")
    home = work / "corpus"
    draft = work / f"{kind}-{seed}"
    start_folder(KINDS[kind], draft / "model", corpus.texts("curated", home, seed, scenes).tokenizer)
    job = StudentJob(kind, draft / "model", home, detector, scenes, seed, **of_job)
    job.model.config.save_pretrained(draft / "model")
    check_reader(job, draft / "model")
    position = train(
        job, draft / "checkpoint.safetensors", steps=steps, minutes=minutes, peak=peak, **options
    )

    def fill(partial: Path) -> None:
        start_folder(job.kind, partial, draft / "model")
        write_weights(job, partial)
        made = provenance(make_student, "curated; web for texts alone", job, peak, position)
        write_json(partial / "provenance.json", made)

    if options.get("stop_after") is None or position.step != options["stop_after"]:
        write_folder(folder, fill)
    return position
