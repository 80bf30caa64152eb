"""Proxies for ground truth of relevance, which real data lack; always marked as such.

Each proxy replaces an example's relevant spans and boxes and names itself in ``Example.truth``, which
records, tables and legends repeat. ``snli_ve`` reads the files of highlights, ``vcr`` the references.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from tdlib.config import RunConfig
from tdlib.core.paths import ConfigError
from tdlib.data import snli_ve, vcr
from tdlib.data.examples import Example
from tdlib.data.tasks import data_folder, task_of

OWN = "own"  # ground truth that comes with the data, as in the MiniWorld's side files

# By name: the data set, and what marks its examples, given the data set's folder.
Marker = Callable[[Sequence[Example], Path], list[Example]]
PROXIES: dict[str, tuple[str, Marker]] = {
    "highlights": ("snli_ve", snli_ve.with_highlights),
    "referred": ("vcr", lambda examples, _: [vcr.with_referred_objects(example) for example in examples]),
}


def with_truth(config: RunConfig, examples: Sequence[Example], truth: str = OWN) -> list[Example]:
    """Selects the examples whose relevant words or boxes are known from one kind of truth.

    Args:
        config: names the task and its folder.
        examples: of the task.
        truth: "own" is what the data state; "highlights": words that e-SNLI's annotators marked, read
            from its ``esnli_*.csv`` beside SNLI-VE's files; "referred": boxes of the objects that VCR's
            question and right answer refer to, a proxy.

    Raises:
        ConfigError: an unknown name, or one that does not apply to the task.
        DataError: the files that hold the highlights are missing or malformed.
    """
    if truth != OWN:
        if truth not in PROXIES:
            raise ConfigError(f"truth={truth!r}: expected one of {', '.join((OWN, *PROXIES))}")
        data_set, mark = PROXIES[truth]
        if task_of(config).data_set != data_set:
            raise ConfigError(f"truth={truth!r} is for {data_set}, not task={config.task!r}; use truth='own'")
        examples = mark(examples, data_folder(config))
    return [example for example in examples if _is_known(example)]


def _is_known(example: Example) -> bool:
    return bool(example.relevant_boxes) or any(part.relevant for part in example.statements())
