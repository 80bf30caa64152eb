"""Tokenizes texts for the teacher as open_clip does, and finds the characters of the raw text in each token.

open_clip's tokenizers clean a text first (ftfy repairs characters and composes marks, white space is
collapsed, some lower-case it or strip punctuation) and do not report where a token came from. So spans are
found in the cleaned text and mapped back to the raw one by matching both letter by letter, in a normal form
that does not depend on composition, order of marks, width or case.
"""

import difflib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import open_clip
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from tdlib.core.paths import resolve
from tdlib.core.provenance import digest, tokenizer_digest
from tdlib.teacher.towers import TeacherError

Span = tuple[int, int]  # characters, first and one behind the last


class TeacherText(NamedTuple):
    """A text as the teacher reads it."""

    ids: list[int]  # with start and end token, at most the context length
    spans: list[Span]  # of each id in the raw text; (0, 0) for special tokens
    cut: int  # tokens that did not fit into the context length


def _letters(text: str) -> tuple[list[str], list[Span], list[Span]]:
    """Splits a text into letters in a form that survives cleaning.

    Returns the letters (compatibility decomposition, case folded; UAX 15), for each the span of its
    character with all combining marks on it, and for each character of the text the run of its letters.
    Marks belong to the character before them: normalisation may reorder them, so a single mark has no
    certain place.
    """
    letters: list[str] = []
    spans: list[Span] = []
    runs: list[Span] = []
    start = 0
    while start < len(text):
        end = start + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        folded = unicodedata.normalize("NFKD", text[start:end].casefold()).casefold()
        runs += [(len(letters), len(letters) + len(folded))] * (end - start)
        letters += folded
        spans += [(start, end)] * len(folded)
        start = end
    return letters, spans, runs


def spans_in_raw(raw: str, cleaned: str, spans: Sequence[Span]) -> list[Span]:
    """Maps character spans of a cleaned text to spans of the raw text.

    Letters without a counterpart get the unmatched stretch at their place or, if cleaning has added them,
    the letter before. A character's span includes its combining marks.
    """
    if len(raw) == len(cleaned) and raw.casefold() == cleaned.casefold():
        return list(spans)
    raw_letters, raw_spans, _ = _letters(raw)
    letters, _, runs = _letters(cleaned)
    places: list[Span] = [(0, 0)] * len(letters)
    matcher = difflib.SequenceMatcher(None, raw_letters, letters, autojunk=False)
    for _, raw_from, raw_to, start, end in matcher.get_opcodes():
        if raw_to - raw_from == end - start:
            places[start:end] = raw_spans[raw_from:raw_to]
        elif end > start and raw_spans:
            if raw_from == raw_to:
                raw_from = max(0, raw_from - 1)
                raw_to = raw_from + 1
            places[start:end] = [(raw_spans[raw_from][0], raw_spans[raw_to - 1][1])] * (end - start)

    def in_raw(start: int, end: int) -> Span:
        within = places[runs[start][0] : runs[end - 1][1]] if end > start else []
        return (within[0][0], within[-1][1]) if within else (0, 0)

    return [in_raw(*span) for span in spans]


class TextTokenizer:
    """Tokenizes with an open_clip tokenizer and finds the characters of each token."""

    def __init__(self, tokenizer: SimpleTokenizer | HFTokenizer, name: str):
        kind = type(tokenizer).__name__
        if isinstance(tokenizer, HFTokenizer) and not tokenizer.tokenizer.is_fast:
            kind = f"{type(tokenizer.tokenizer).__name__} (without a fast version)"
        elif getattr(tokenizer, "tokenizer_mode", ""):
            kind = f"with tokenizer_mode {tokenizer.tokenizer_mode!r}"
        elif isinstance(tokenizer, SimpleTokenizer | HFTokenizer):
            kind = ""
        if kind:
            raise TeacherError(
                f"{name}: tokenizer {kind} has no character offsets here; supported are open_clip's own and "
                "the fast ones of transformers"
            )
        self.tokenizer = tokenizer
        self.padding = 0 if isinstance(tokenizer, SimpleTokenizer) else tokenizer.tokenizer.pad_token_id or 0

    def __call__(self, text: str) -> tuple[list[int], list[Span]]:
        """Returns ids with start and end token, and their spans in ``text`` ((0, 0) for special tokens)."""
        ids, spans, _ = self.read(text)
        return ids, spans

    def digest(self) -> str:
        """Identifies the tokenizer: SHA-256 over its pieces, their ids and the rules that cut texts."""
        tokenizer = self.tokenizer
        simple = isinstance(tokenizer, SimpleTokenizer)
        pieces = tokenizer.encoder if simple else tokenizer_digest(tokenizer.tokenizer)
        return digest([type(tokenizer).__name__, tokenizer.context_length, pieces])

    def read(self, text: str) -> TeacherText:
        """Tokenizes a text; see ``TeacherText``."""
        clean = " ".join(self.tokenizer.clean_fn(text).split())
        simple = isinstance(self.tokenizer, SimpleTokenizer)
        ids, spans, cut = self._simple(clean) if simple else self._fast(clean)
        return TeacherText(ids, spans_in_raw(text, clean, spans), cut)

    def _simple(self, clean: str) -> TeacherText:
        tokenizer = self.tokenizer
        ids: list[int] = [tokenizer.sot_token_id]
        spans = [(0, 0)]
        for match in tokenizer.pat.finditer(clean):
            word = match.group()
            mapped = "".join(tokenizer.byte_encoder[byte] for byte in word.encode("utf-8"))
            # Pieces are made of bytes; this is the character of each one.
            places = [place for place, letter in enumerate(word, match.start()) for _ in letter.encode()]
            start = 0
            for piece in tokenizer.bpe(mapped).split(" "):
                end = start + len(piece.removesuffix("</w>"))
                ids.append(tokenizer.encoder[piece])
                spans.append((places[start], places[end - 1] + 1))
                start = end
        limit = tokenizer.context_length - 1
        return TeacherText(
            [*ids[:limit], tokenizer.eot_token_id], [*spans[:limit], (0, 0)], max(0, len(ids) - limit)
        )

    def _fast(self, clean: str) -> TeacherText:
        tokenizer = self.tokenizer.tokenizer
        encoded = tokenizer(
            clean, truncation=True, max_length=self.tokenizer.context_length, return_offsets_mapping=True
        )
        ids = list(encoded["input_ids"])
        if self.tokenizer.strip_sep_token:
            ids = [0 if token == tokenizer.sep_token_id else token for token in ids]
        spans = [_without_space(clean, start, end) for start, end in encoded["offset_mapping"]]
        cut = sum(part.special_tokens_mask.count(0) for part in encoded.encodings[0].overflowing)
        return TeacherText(ids, spans, cut)


def _without_space(text: str, start: int, end: int) -> Span:
    """Removes the leading white space that some tokenizers include in a word's span."""
    while start < end and text[start].isspace():
        start += 1
    return start, end


def open_tokenizer(name: str) -> TextTokenizer:
    """Opens the tokenizer of a teacher without loading its weights.

    Raises:
        TeacherError: the teacher is unknown, its files are missing, or it gives no offsets.
    """
    try:
        # For an unknown name open_clip would return its default tokenizer.
        if ":" not in name and open_clip.get_model_config(name) is None:
            raise ValueError("open_clip knows no architecture of this name")
        tokenizer = open_clip.get_tokenizer(resolve(name, prefix="local-dir:"))
    except Exception as error:  # open_clip lets through what json and transformers raise
        raise TeacherError(
            f"teacher {name!r}: its tokenizer cannot be loaded: {error}. Expected an open_clip name, "
            "'local-dir:FOLDER', or 'hf-hub:ORG/REPO'"
        ) from error
    return TextTokenizer(tokenizer, name)
