"""Validates data sets, and files for a benchmark, before hours of work depend on them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tdlib.config import RunConfig
from tdlib.core.paths import ConfigError
from tdlib.data.examples import DataError, Example
from tdlib.data.reading import Examined
from tdlib.data.tasks import TASKS, reader

# Questions (or pairs) of the published splits: Zellers et al. 2019; Xie et al. 2019; Kayser et al. 2021 as
# counted in their files; Goyal et al. 2017.
PUBLISHED: dict[str, dict[str, int]] = {
    "vcr": {"train": 212_923, "val": 26_534, "test": 25_263},
    "snli_ve": {"train": 529_527, "dev": 17_858, "test": 17_901},
    "e_snli_ve": {"dev": 14_339, "test": 14_740},
    "vqa_v2": {"train2014": 443_757, "val2014": 214_354, "test2015": 447_793},
}


class SplitReport(NamedTuple):
    """Findings of ``check_folder`` about one split; ``notes`` are worth knowing but are no faults."""

    task: str
    split: str
    examples: int
    problems: list[str]
    notes: list[str]


def check_folder(
    folder: Path, decode: bool = False, look: Callable[[Sequence[Example]], list[str]] | None = None
) -> Iterator[SplitReport]:
    """Validates every split in a folder, and compares those of one task with each other.

    Args:
        folder: a data set, or a folder of data sets.
        decode: also decode every picture.
        look: returns further notes on the examples of a split without problems.

    Raises:
        DataError: no split of any task is there.
    """
    empty = True
    for place in _places(Path(folder)):
        for name, task in TASKS.items():
            earlier: dict[str, Examined] = {}
            for path in sorted(place.iterdir()):
                split = task.files and task.files.fullmatch(path.name)
                if split:
                    empty = False
                    report, seen = _check_split(name, place, split[1], decode, earlier)
                    earlier[split[1]] = seen
                    if look is not None and not report.problems:
                        config = RunConfig.from_parameters(task=name, data_dir=str(place.resolve()))
                        report.notes.extend(look(reader(config, split[1]).open(lambda _: None)))
                    yield report
    if empty:
        wanted = "train.jsonl (VCR), snli_ve_train.jsonl, esnlive_train.csv, "
        raise DataError(
            f"{folder}: no data set there or one folder below; expected files such as {wanted}"
            "v2_OpenEnded_mscoco_train2014_questions.json (VQA) or vqacp_v2_train_questions.json"
        )


def _places(folder: Path) -> list[Path]:
    return [folder, *sorted(path for path in folder.glob("*") if path.is_dir())] if folder.is_dir() else []


def _check_split(
    task: str, place: Path, split: str, decode: bool, earlier: dict[str, Examined]
) -> tuple[SplitReport, Examined]:
    config = RunConfig.from_parameters(task=task, data_dir=str(place.resolve()))
    try:
        seen = reader(config, split).examine(decode)
    except DataError as error:
        seen = Examined(0, [str(error)], set(), set())
    report = SplitReport(task, split, seen.examples, list(seen.problems), [])
    asked, published = len(seen.questions), PUBLISHED.get(task, {}).get(split, 0)
    # A file that was cut off between two lines looks whole; one with far fewer is a subset, or other data.
    if asked != published and asked > 0.8 * published > 0:
        report.notes.append(f"{asked:,} different questions, {published:,} in the published file")
    for other, before in earlier.items():
        if _source(split) == _source(other):
            continue  # a shifted set asks the questions of its source, so shared ids are expected
        if both := seen.questions & before.questions:
            report.problems.append(
                f"{split}: {len(both)} of {len(seen.questions)} ids are those of questions in {other!r} too "
                f"(first: {min(both)!r}); what is tested must not be trained on, remove them from one"
            )
        if shared := len(seen.pictures & before.pictures):
            report.notes.append(f"{shared} of {len(seen.pictures)} pictures are in {other!r} too")
    return report, seen


def _source(split: str) -> str:
    """Names the split that a set rewords or is part of: val of val_shortcut, test2015 of test-dev2015."""
    return split.partition("_")[0].replace("test-dev", "test")


def check_submission(path: Path, folder: Path, split: str = "") -> list[str]:
    """Lists all faults of a file for a benchmark, given the data set whose test split it answers.

    Where the folder holds the tests of several benchmarks (SNLI-VE's and e-SNLI-VE's), it is the one that the
    file answers best.

    Raises:
        ConfigError: the file is of no known kind, or the folder holds no such test split.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    found_in: list[list[str]] = []
    tasks = {name: task for name, task in TASKS.items() if task.submitted and task.files}
    for name, task in tasks.items():
        asked = split or task.submitted
        there = [found[1] for file in _files(folder) if (found := task.files.fullmatch(file))]  # type: ignore
        if path.suffix == Path(task.submission).suffix and asked in there:
            config = RunConfig.from_parameters(task=name, data_dir=str(folder.resolve()))
            found_in.append(task.check_submission(path, reader(config, asked).open()))
    if found_in:
        return min(found_in, key=len)
    kinds = ", ".join(sorted({f"{task.submission} ({task.benchmark})" for task in tasks.values()}))
    raise ConfigError(
        f"{path}: expected a file as {kinds}, and in {folder} the split {split or 'that it answers'!r}"
    )


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
