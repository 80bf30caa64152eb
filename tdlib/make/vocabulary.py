"""Tokenizers of the mini models: CLIP's byte pairs and BERT's word pieces, both learned from web texts."""

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tdlib.miniworld.writers import captioned_scene


def train_clip_tokenizer(texts: list[str], vocabulary: int = 900) -> PreTrainedTokenizerFast:
    """Trains a lower-cased byte-pair tokenizer; its end token has the highest id, as CLIP's pooling expects.

    The same for the same texts; see ``_numbered``.
    """

    def empty(model: models.BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
        return tokenizer

    settings: dict[str, Any] = {"unk_token": "<unk>", "end_of_word_suffix": "</w>"}
    learner = empty(models.BPE(**settings))
    special = _numbered(learner, texts, ["<pad>", "<unk>"], "{}</w>")
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = empty(models.BPE(learned["vocab"], merges, **settings))
    tokenizer.add_special_tokens(["<pad>", "<unk>", "<start_of_text>", "<end_of_text>"])
    start, end = tokenizer.token_to_id("<start_of_text>"), tokenizer.token_to_id("<end_of_text>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start_of_text> $A <end_of_text>",
        special_tokens=[("<start_of_text>", start), ("<end_of_text>", end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<start_of_text>",
        eos_token="<end_of_text>",
    )  # fmt: skip


def train_wordpiece_tokenizer(texts: list[str], vocabulary: int = 900) -> PreTrainedTokenizerFast:
    """Trains a BERT tokenizer (lower case, WordPiece), the same for the same texts; see ``_numbered``."""

    def empty(model: models.WordPiece) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    learner = empty(models.WordPiece(unk_token="[UNK]"))
    numbered = _numbered(learner, texts, special, "##{}")
    learner.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=numbered, show_progress=False)
    )
    tokenizer = empty(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    cls, sep = special.index("[CLS]"), special.index("[SEP]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def _numbered(learner: Tokenizer, texts: list[str], special: list[str], affixed: str) -> list[str]:
    """Lists special tokens, then every letter alone and with its affix, sorted.

    A trainer numbers pieces such as "##a" in the order of a hash table, which differs between runs, and
    breaks ties by these numbers. So all letters get their numbers beforehand.
    """
    letters = sorted(set("".join(map(learner.normalizer.normalize_str, texts)).replace(" ", "")))
    return [*special, *letters, *map(affixed.format, letters)]


def vocabulary_texts(seed: int, number: int = 6_000) -> list[str]:
    """Writes the web texts from which vocabularies are learned, of another seed than the corpora's."""
    return [captioned_scene("web", seed + 1, index)[1] for index in range(number)]
