"""Finds out before the expensive step whether data are as they must be."""

from collections.abc import Sequence

from tdlib.data.examples import DataError, Example
from tdlib.data.pictures import check_picture

_SHOWN = 5  # problems that an error lists; the rest is counted


def verify_pictures(examples: Sequence[Example], decode: bool = False) -> None:
    """Refuses examples whose pictures are missing, are no pictures, or are cut short.

    Reads the header and the end of each distinct file (about 0.1 ms each from a local disk), so that a
    run learns of a bad picture of any split before it trains, not when it is first evaluated.

    Args:
        examples: of one or several splits.
        decode: also decode every picture (5 to 10 ms each), which finds damage inside of a file too.

    Raises:
        DataError: names the pictures, and for each the first example that shows it.
    """
    first_shown = {}
    for example in examples:
        first_shown.setdefault(example.image, example.id)
    problems = []
    for path, identifier in first_shown.items():
        try:
            check_picture(path, decode)
        except DataError as error:
            problems.append(f"{error} (example {identifier})")
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise DataError(
            f"{len(problems)} of {len(first_shown)} pictures cannot be used:\n"
            + "\n".join(f"- {line}" for line in [*problems[:_SHOWN], *more])
        )
