"""Opens what a run uses beside its labelled examples: other pictures, and examples without their labels."""

from tdlib.config import RunConfig
from tdlib.core.paths import ConfigError
from tdlib.data.examples import Examples
from tdlib.teacher.posterior import AnswerPosterior
from tdlib.training.data import EncodedExamples, UnlabelledExamples
from tdlib.training.judging import PicturePool
from tdlib.training.pipeline import TeacherFeatureReader
from tdlib.training.prepare import PreparedData


def picture_pool(
    config: RunConfig, prepared: PreparedData, subset: Examples, feature_reader: TeacherFeatureReader | None
) -> PicturePool | None:
    """Opens the pictures that a run re-pairs texts with; None if it takes those of the batch, or none."""
    if feature_reader is None or config.repair_weight == 0 or config.repair_pool in ("batch", "own"):
        return None
    examples = prepared.train if config.repair_pool == "train" else subset
    pool = PicturePool(examples, prepared.encoder, feature_reader.cache, config.seed, feature_reader.seen_as)
    prepared.encoder.prepare(pool.examples)
    return pool


def unlabelled_examples(
    config: RunConfig, prepared: PreparedData, subset: Examples, feature_reader: TeacherFeatureReader | None
) -> UnlabelledExamples | None:
    """Opens the training examples whose tokens are distilled without their labels; None if the run has none.

    Raises:
        ConfigError: the labelled subset is already the whole training split.
    """
    if feature_reader is None or not config.distils_unlabelled:
        return None
    labelled = set(subset.ids)
    others = prepared.train.at([row for row, name in enumerate(prepared.train.ids) if name not in labelled])
    if not len(others):
        raise ConfigError(
            f"feature_pool='train': shots={config.shots} leaves no training example unlabelled; set "
            "feature_pool='subset', or fewer shots"
        )
    prepared.encoder.prepare(others)
    judge = feature_reader.judge
    for posterior in {feature_reader.class_logits, judge.answers if judge else None}:  # mostly the same one
        if isinstance(posterior, AnswerPosterior):
            posterior.prepare(others)
    encoded = EncodedExamples(others, prepared.encoder, feature_reader, num_labels=len(prepared.labels))
    return UnlabelledExamples(encoded, config.seed, config.feature_share)
