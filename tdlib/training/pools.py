"""What a run learns from beside its labelled examples: other pictures, and examples without their labels."""

from tdlib.config import RunConfig
from tdlib.core.paths import ConfigError
from tdlib.data.examples import Examples
from tdlib.training.data import EncodedExamples, UnlabelledExamples
from tdlib.training.judging import PicturePool
from tdlib.training.pipeline import TargetBuilder
from tdlib.training.prepare import Materials


def picture_pool(
    config: RunConfig, materials: Materials, subset: Examples, builder: TargetBuilder | None
) -> PicturePool | None:
    """The pictures without labels that a run re-pairs with; None where those of the batch will do."""
    if builder is None or config.repair_weight == 0 or config.repair_pool in ("batch", "own"):
        return None
    examples = materials.train if config.repair_pool == "train" else subset
    pool = PicturePool([*examples], materials.encoder, builder.cache, config.seed, builder.seen_as)
    materials.encoder.prepare(pool.examples)
    return pool


def unlabelled_examples(
    config: RunConfig, materials: Materials, subset: Examples, builder: TargetBuilder | None
) -> UnlabelledExamples | None:
    """The training examples whose tokens are distilled without their labels; None where there are none.

    Raises:
        ConfigError: the subset is all there is.
    """
    if builder is None or not config.distils_unlabelled:
        return None
    labelled = set(subset.ids)
    others = materials.train.at([row for row, name in enumerate(materials.train.ids) if name not in labelled])
    if not len(others):
        raise ConfigError(
            f"feature_pool='train': shots={config.shots} leaves no training example unlabelled; set "
            "feature_pool='subset', or fewer shots"
        )
    materials.encoder.prepare(others)
    if builder.judge is not None:
        builder.judge.prepare(others)
    encoded = EncodedExamples(others, materials.encoder, builder, num_labels=len(materials.labels))
    return UnlabelledExamples(encoded, config.seed, config.feature_share)
