"""What stands in for ground truth of relevance where real data have none, always marked as such.

Each stand-in replaces an example's relevant spans and boxes and names itself in ``Example.truth``,
which records, tables and legends carry on. Does not own any file format: ``snli_ve`` reads highlights,
``vcr`` knows what references are.
"""

from collections.abc import Sequence

from tdlib.config import RunConfig

from tdlib.core.paths import ConfigError
from tdlib.data.examples import Example
from tdlib.data import snli_ve
from tdlib.data import vcr
from tdlib.data.tasks import data_folder, task_of

OWN = "own"  # the data's own ground truth, as the MiniWorld's side files hold it

# By name: the data set, and what decides according to it.
STAND_INS = {
    "highlights": ("snli_ve", snli_ve.HIGHLIGHTS),
    "referred": ("vcr", vcr.REFERRED_OBJECTS),
}


def with_truth(config: RunConfig, examples: Sequence[Example], truth: str = OWN) -> list[Example]:
    """Those of the examples whose relevant words or places are known, from one kind of truth.

    Args:
        config: names the task and its folder.
        examples: of the task.
        truth: "own": as the data state them; "highlights": words that e-SNLI's annotators marked, read
            from its ``esnli_*.csv`` beside SNLI-VE's files; "referred": boxes of the objects that VCR's
            question and right answer refer to, a proxy.

    Raises:
        ConfigError: an unknown name, or one that does not apply to the task.
        DataError: the files that hold the highlights are missing or malformed.
    """
    if truth == OWN:
        found = list(examples)
    elif truth not in STAND_INS:
        raise ConfigError(f"truth={truth!r}: expected one of {', '.join((OWN, *STAND_INS))}")
    elif task_of(config).data_set != STAND_INS[truth][0]:
        raise ConfigError(
            f"truth={truth!r} is for {STAND_INS[truth][0]}, not task={config.task!r}; use truth='own'"
        )
    elif truth == "highlights":
        found = snli_ve.with_highlights(examples, data_folder(config))
    else:
        found = [vcr.with_referred_objects(example) for example in examples]
    return [example for example in found if _known(example)]


def _known(example: Example) -> bool:
    return bool(example.relevant_boxes) or any(part.relevant for part in example.statements())
