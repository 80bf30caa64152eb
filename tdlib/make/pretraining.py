"""How the committed mini models were made: a CLIP on the web corpus, a ViLT on the curated one.

Both are plain loops over pictures held in memory. Run ``python -m tdlib.make.pretraining teacher`` or
``student`` (``figures`` only measures what is there); each writes its weights
with parameters, seed, checksum and held-out figures beside them.
"""

import argparse
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, ViltConfig, ViltImageProcessor

from tdlib.core.files import file_digest, write_json
from tdlib.core.paths import ROOT
from tdlib.data.vcr import VcrReader
from tdlib.miniworld.drawing import draw
from tdlib.miniworld.writers import VERSION, captioned_scene, captions, false_caption, write_vcr
from tdlib.students.vilt import ViltEncoder, ViltForMultipleChoice, embed_patches, load_vilt, pad_pictures
from tdlib.teacher.cache import TeacherCache
from tdlib.teacher.model import Teacher, encode_text_tokens
from tdlib.training.prepare import add_to_cache
from tdlib.training.reference import zero_shot

log = logging.getLogger("tdlib.make.pretraining")

MINI_CLIP = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 96, "layers": 4, "width": 128, "head_width": 32, "patch_size": 12},
    "text_cfg": {"context_length": 48, "vocab_size": 0, "width": 128, "heads": 4, "layers": 3,
                 "hf_tokenizer_name": "mini-clip"},
}  # fmt: skip


# Whether the CPU multiplies bfloat16; where it is emulated, it is many times slower than float32.
HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def mixed_precision() -> torch.autocast:
    """bfloat16 where that is faster, else float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=HAS_BFLOAT16)


def _render(job: tuple[str, int, int, int, int, int]) -> tuple[np.ndarray, list[list[str]]]:
    kind, seed, start, stop, size, readings = job
    pictures, texts = [], []
    for index in range(start, stop):
        scenes, captions = zip(*(captioned_scene(kind, seed, index, r) for r in range(readings)), strict=True)
        image = draw(scenes[0]).image.resize((size, size), Image.Resampling.BICUBIC)
        pictures.append(np.asarray(image))
        false = [false_caption(seed, index, r) for r in range(readings)] if kind == "curated" else []
        texts.append([*captions, *false])
    return np.stack(pictures), texts


def corpus(
    kind: str, seed: int, number: int, size: int, first: int = 0, readings: int = 1, workers: int = 2
) -> tuple[Tensor, list[list[str]]]:
    """Pictures (number, 3, size, size) uint8 from scene ``first`` on, with ``readings`` captions each.

    The curated corpus has as many false captions behind the true ones.
    """
    step = max(1, min(500, number // workers))
    last = first + number
    jobs = [
        (kind, seed, start, min(start + step, last), size, readings) for start in range(first, last, step)
    ]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_render, jobs))
    pictures = (
        torch.from_numpy(np.concatenate([pictures for pictures, _ in parts])).permute(0, 3, 1, 2).contiguous()
    )
    return pictures, [text for _, texts in parts for text in texts]


def words_of_pictures(captions: list[list[str]], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Which tokens some caption of each picture has, (pictures, vocabulary) bool."""
    present = torch.zeros(len(captions), len(tokenizer), dtype=torch.bool)
    for reading in zip(*captions, strict=True):
        ids = tokenizer(list(reading), padding=True, truncation=True, max_length=48, return_tensors="pt")
        present.scatter_(1, ids["input_ids"], True)
    return present


def train_clip_tokenizer(texts: list[str], vocabulary: int = 900) -> PreTrainedTokenizerFast:
    """A lower-cased byte-pair tokenizer whose end token has the highest id, as CLIP's pooling expects."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    special = ["<pad>", "<unk>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, end_of_word_suffix="</w>")
    )
    tokenizer.add_special_tokens(["<start_of_text>", "<end_of_text>"])
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
    """A BERT tokenizer (lower case, WordPiece), the same for the same texts.

    The trainer numbers pieces such as "##a" in the order of a hash table, another one in every run, and
    breaks ties by these numbers. So all letters get theirs beforehand.
    """

    def empty(model: models.WordPiece) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    learner = empty(models.WordPiece(unk_token="[UNK]"))
    letters = sorted(set("".join(map(learner.normalizer.normalize_str, texts)).replace(" ", "")))
    numbered = [*special, *letters, *(f"##{letter}" for letter in letters)]
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


def batches(number: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of shuffled batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(number, generator=generator)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(number, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


def patch_words(visual: VisionTransformer, pixels: Tensor, word_head: nn.Linear) -> tuple[Tensor, Tensor]:
    """Picture features (batch, dim), and log-odds of words (batch, vocabulary) of the surest patch."""
    output = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")
    votes = word_head(output["image_intermediates"][-1] @ visual.proj)
    return output["image_features"], votes.float().amax(dim=1)


def pretrain_teacher(
    folder: Path, first: int = 40_000, scenes: int = 40_000, word_steps: int = 1_400, steps: int = 1_500,
    batch: int = 128, peak: float = 1e-3, seed: int = 0,
) -> None:  # fmt: skip
    """Trains the mini CLIP and writes an open_clip model folder.

    First the image tower alone learns to recognise the words of a picture's captions (as in CatLIP,
    Mehta et al. 2024), each from the surest patch (multiple-instance learning, Fang et al. 2015).
    Then both towers learn CLIP's contrastive loss (Radford et al. 2021) beside it. Contrast alone
    taught so small a model places and weather within 300,000 pictures, but nothing small: held
    things, moods and hats stayed near chance. The words' head is dropped. (The first
    phase sits on a plateau for some 400 steps before it breaks through.)
    """
    torch.manual_seed(seed)
    size = int(MINI_CLIP["vision_cfg"]["image_size"])  # type: ignore[index]
    started = time.time()
    pictures, captions_of = corpus("web", seed, scenes, size, first, readings=5)
    log.info("corpus: %d scenes in %.0f s", scenes, time.time() - started)
    texts = [captions[0] for captions in captions_of]
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    tokenizer = train_clip_tokenizer(texts)
    config = json.loads(json.dumps(MINI_CLIP))
    config["text_cfg"]["vocab_size"] = len(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    model = open_clip.CLIP(**config)
    word_head = nn.Linear(config["embed_dim"], len(tokenizer))
    log.info("%d parameters", sum(p.numel() for p in model.parameters()))
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")["input_ids"]
    lengths = (encoded != tokenizer.pad_token_id).sum(1)
    words = words_of_pictures(captions_of, tokenizer)
    share = words.float().mean(0)
    asked = ((share > 0.01) & (share < 0.3)).nonzero()[:, 0]  # mostly nouns; function words are frequent
    offset, scale = (torch.tensor(v).view(3, 1, 1) * 255 for v in (mean, std))
    target = torch.arange(batch)
    losses = {}
    for phase, phase_steps in (("words", word_steps), ("contrast", steps)):
        trained = nn.ModuleList([model if phase == "contrast" else model.visual, word_head])
        optimizer = make_optimizer(trained, 0.05)
        history = []
        for step, index in enumerate(batches(scenes, batch, phase_steps, seed)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, phase_steps, peak, 50)
            pixels = (pictures[index] - offset) / scale
            with mixed_precision():
                image, votes = patch_words(model.visual, pixels, word_head)
                guesses = word_head(image).float()
            present = words[index][:, asked].float()
            loss = F.binary_cross_entropy_with_logits(votes[:, asked], present)
            values = [float(loss.detach())]
            if phase == "contrast":
                ids = encoded[index, : int(lengths[index].max())]
                with mixed_precision():
                    text = encode_text_tokens(model, ids)[0]
                image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
                logits = model.logit_scale.exp() * image @ text.T
                contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
                pooled = F.binary_cross_entropy_with_logits(guesses[:, asked], present)
                loss = contrast + 10 * (loss + pooled)
                values.append(float(contrast.detach()))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            history.append(values)
            losses[phase] = [round(float(value), 3) for value in np.mean(history[-50:], axis=0)]
            if (step + 1) % 50 == 0:
                log.info("%s step %d: %s (%.0f s)", phase, step + 1, losses[phase], time.time() - started)
            if (step + 1) % 100 == 0 or step + 1 == phase_steps:
                weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
                save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "provenance.json", {
        "made_by": "tdlib.make.pretraining.pretrain_teacher", "corpus": "web", "world": VERSION,
        "scenes": [first, first + scenes], "word_steps": word_steps, "steps": steps, "batch": batch,
        "peak_learning_rate": peak, "seed": seed,
        "minutes": round((time.time() - started) / 60, 1), "final_losses": losses,
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    })  # fmt: skip


MINI_VILT: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
    "image_size": 96, "patch_size": 16, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def mask_words(
    ids: Tensor, tokenizer: PreTrainedTokenizerFast, share: float, generator: torch.Generator
) -> tuple:
    """Ids with [MASK] at random places, and labels there (-100 elsewhere), as Devlin et al. 2019."""
    special = torch.tensor(tokenizer.all_special_ids)
    chosen = (torch.rand(ids.shape, generator=generator) < share) & ~torch.isin(ids, special)
    return ids.masked_fill(chosen, tokenizer.mask_token_id), ids.masked_fill(~chosen, -100)


def see_words(
    model: ViltForMultipleChoice, pictures: Tensor, captions_of: list[list[str]], readings: int,
    tokenizer: PreTrainedTokenizerFast, steps: int, batch: int, peak: float, seed: int,
) -> None:  # fmt: skip
    """Teaches a ViLT which words of its captions a picture shows, each by its surest patch, without text.

    Asked of the middle layer and of the last: what only the last one knows comes too late for a text.
    A word's score is the product with its own embedding, so that what a patch shows and what a text
    says lie near each other before they meet (align before fuse, Li et al. 2021).
    """
    words = words_of_pictures([captions[:readings] for captions in captions_of], tokenizer)
    share = words.float().mean(0)
    asked = ((share > 0.01) & (share < 0.3)).nonzero()[:, 0]
    width = model.config.hidden_size
    heads = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
    offsets = nn.ParameterList(nn.Parameter(torch.zeros(len(asked))) for _ in heads)
    optimizer = make_optimizer(nn.ModuleList([model, heads, offsets]), 0.05)
    table = model.vilt.embeddings.text_embeddings.word_embeddings.weight
    middle = model.config.num_hidden_layers // 2
    pixel_mask = torch.ones(batch, *pictures.shape[-2:], dtype=torch.long)
    start = torch.full((batch, 1), tokenizer.cls_token_id)
    losses, began = [], time.time()
    for step, index in enumerate(batches(len(pictures), batch, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, 50)
        with mixed_precision():
            patches, mask, _ = embed_patches(model.vilt, pictures[index] / 127.5 - 1, pixel_mask)
            output = model.vilt(
                input_ids=start, attention_mask=torch.ones_like(start),
                token_type_ids=torch.zeros_like(start), image_embeds=patches, pixel_mask=mask,
                output_hidden_states=True,
            )  # fmt: skip
            states = output.hidden_states[middle], output.last_hidden_state
            votes = [
                (head(state[:, 2:]) @ table[asked].T).amax(dim=1) + offset  # behind both [CLS]
                for head, offset, state in zip(heads, offsets, states, strict=True)
            ]
        present = words[index][:, asked].float()
        terms = [F.binary_cross_entropy_with_logits(vote.float(), present) for vote in votes]
        loss = torch.stack(terms).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append([float(term.detach()) for term in terms])
        if (step + 1) % 50 == 0:
            means = np.mean(losses[-50:], axis=0).round(4).tolist()
            log.info("words step %d: %s (%.0f s)", step + 1, means, time.time() - began)


def replaced_words(encoded: Tensor) -> Tensor:
    """Which tokens of false captions are not in their true ones: (scenes, 2, readings, tokens), bool.

    ``encoded`` holds ids of true [:, 0] and false [:, 1] captions, which differ in one place.
    """
    replaced = torch.zeros_like(encoded, dtype=torch.bool)
    for scene, pair in enumerate(encoded.tolist()):
        for reading, (true, false) in enumerate(zip(*pair, strict=True)):
            steps = SequenceMatcher(None, true, false, autojunk=False).get_opcodes()
            for kind, _, _, start, end in steps:
                if kind in ("replace", "insert"):
                    replaced[scene, 1, reading, start:end] = True
    return replaced


def pretrain_student(
    folder: Path,
    scenes: int = 24_000,
    word_steps: int = 700,
    steps: int = 2_600,
    batch: int = 128,
    peak: float = 1e-3,
    seed: int = 0,
    readings: int = 3,
    hard: float = 0.6,
) -> None:
    """Trains the mini ViLT on the curated corpus and writes a transformers model folder.

    First the picture alone, as the teacher's (``see_words``): it stands in for what the paper's
    students know from their detector. Then masked words given the picture, and image-text matching,
    as in Kim et al. 2021: half of the captions do not match. At first these belong to another picture;
    once 0.7 of the last 50 steps' answers are right, the share ``hard`` of them comes, over 300 steps,
    to differ from the picture's own in one thing only (found by the generator, where Li et al. 2021,
    ALBEF, mine them). With such pairs from the first step, matching stayed on its plateau of 0.693 for
    the 1,400 steps that were tried.
    Every word of one's own captions is also judged true or false of the picture (as in ELECTRA, Clark
    et al. 2020, but given the picture), without which [CLS] hardly learned to find the one that is
    false. The matching head is kept as the multiple-choice head.
    The vocabulary is made from web texts (as BERT's is), the weights see the curated corpus only.
    """
    torch.manual_seed(seed)
    started = time.time()
    size = int(MINI_VILT["image_size"])
    web_texts = [captioned_scene("web", seed + 1, index)[1] for index in range(6_000)]
    tokenizer = train_wordpiece_tokenizer(web_texts)
    pictures, captions_of = corpus("curated", seed, scenes, size, readings=readings)
    texts = [caption for captions in captions_of for caption in captions]  # true ones, then false ones
    log.info("corpus: %d scenes in %.0f s", scenes, time.time() - started)
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")["input_ids"]
    lengths = (encoded != tokenizer.pad_token_id).sum(1)
    replaced = replaced_words(encoded.view(scenes, 2, readings, -1)).view(len(texts), -1)
    config = ViltConfig(**MINI_VILT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model = ViltForMultipleChoice(config)
    word_head = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128))
    log.info("%d parameters", sum(p.numel() for p in model.parameters()))
    truth_head = nn.Linear(128, 1)
    both = nn.ModuleList([model, word_head, truth_head])
    optimizer = make_optimizer(both, 0.05)
    see_words(model, pictures, captions_of, readings, tokenizer, word_steps, batch, peak, seed)
    generator = torch.Generator().manual_seed(seed)
    history: dict[str, list[float]] = {"words": [], "truth": [], "matching": [], "matched": []}
    pixel_mask = torch.ones(batch, size, size, dtype=torch.long)
    hardened = 0  # steps since matching left its plateau
    for step, index in enumerate(batches(scenes, batch, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, 100)
        if hardened or np.mean(history["matched"][-50:] or 0) > 0.7:
            hardened += 1
        share = hard * min(1, hardened / 300)
        match = torch.rand(batch, generator=generator) < 0.5
        false = ~match & (torch.rand(batch, generator=generator) < share)
        shown = torch.where(match | false, index, torch.roll(index, 1))
        reading = torch.randint(readings, (batch,), generator=generator)
        chosen = shown * 2 * readings + false * readings + reading
        ids = encoded[chosen, : int(lengths[chosen].max())]
        words, labels = mask_words(ids, tokenizer, 0.15, generator)  # of both kinds: [MASK] must not tell
        with mixed_precision():
            output = model(
                words[:, None],
                (words != tokenizer.pad_token_id).long()[:, None],
                torch.zeros_like(words)[:, None],
                pictures[index] / 127.5 - 1,
                pixel_mask,
                output_hidden_states=True,
            )
            hidden = output.hidden_states[-1][:, 0, : ids.shape[1]]
            asked = (labels != -100) & match[:, None]
            guesses = (
                word_head(hidden[asked]) @ model.vilt.embeddings.text_embeddings.word_embeddings.weight.T
            )
            judged = (words != tokenizer.pad_token_id) & (match | false)[:, None]
            below = output.hidden_states[-2][:, 0, : ids.shape[1]]  # what [CLS] reads in the last layer
            truths = truth_head(below[judged])[:, 0].float()
        truth_loss = F.binary_cross_entropy_with_logits(
            truths, replaced[chosen, : ids.shape[1]][judged].float()
        )
        word_loss = F.cross_entropy(guesses.float(), labels[asked])
        logits = output.logits[:, 0].float()
        match_loss = F.binary_cross_entropy_with_logits(logits, match.float())
        optimizer.zero_grad(set_to_none=True)
        (word_loss + match_loss + 4 * truth_loss).backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        values = (word_loss, truth_loss, match_loss, ((logits > 0) == match).float().mean())
        for name, value in zip(history, values, strict=True):
            history[name].append(float(value.detach()))
        if (step + 1) % 50 == 0:
            means = {name: round(float(np.mean(values[-50:])), 3) for name, values in history.items()}
            log.info("step %d %s (%.0f s)", step + 1, means, time.time() - started)
        if (step + 1) % 300 == 0 or step + 1 == steps:
            copy = ViltForMultipleChoice(config)
            copy.load_state_dict(model.state_dict())
            copy.half().save_pretrained(folder)
    processor = ViltImageProcessor(  # type: ignore[call-arg]
        size={"shortest_edge": size}, size_divisor=config.patch_size, image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    made = {
        "made_by": "tdlib.make.pretraining.pretrain_student", "corpus": "curated", "world": VERSION,
        "scenes": scenes, "word_steps": word_steps, "readings": readings, "hard_negatives": hard,
        "steps": steps, "batch": batch, "peak_learning_rate": peak, "seed": seed,
        "minutes": round((time.time() - started) / 60, 1),
        "final": {name: round(float(np.mean(values[-50:])), 3) for name, values in history.items()},
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    write_json(folder / "provenance.json", made)


@torch.inference_mode()
def evaluate_teacher(folder: Path, scenes: int = 256, world_seed: int = 500) -> dict[str, float]:
    """Held-out figures of a CLIP: retrieval among web scenes it never saw, and zero-shot four-choice VCR.

    Retrieval: share of captions whose picture is the nearest of ``scenes`` (and the reverse), noise-free
    captions. VCR: accuracy on the val split of the MiniWorld ``world_seed`` (no reported world) and on
    its shortcut-reversed twin.
    """
    teacher = Teacher(f"local-dir:{folder}")
    pairs = list(captions("held_out", world_seed, scenes))
    pictures = torch.stack(
        [r.pooled for r in teacher.encode_pictures([picture.image for picture, _ in pairs])]
    )
    texts = torch.stack([r.pooled for r in teacher.encode_texts([text for _, text in pairs])])
    cosines, target = texts @ pictures.T, torch.arange(scenes)
    figures = {
        f"picture_of_{scenes}": float((cosines.argmax(1) == target).float().mean()),
        f"caption_of_{scenes}": float((cosines.argmax(0) == target).float().mean()),
    }
    with tempfile.TemporaryDirectory() as temporary:
        world = write_vcr(Path(temporary) / "vcr", world_seed)
        cache = TeacherCache(Path(temporary) / "cache", teacher)
        for split in ("val", "val_shortcut"):
            examples = VcrReader(world, split).read()
            add_to_cache(cache, examples)
            hits = zero_shot(cache, examples).argmax(1) == np.array([example.label for example in examples])
            figures[f"vcr_{split}"] = float(hits.mean())
    return {name: round(value, 3) for name, value in figures.items()}


@torch.inference_mode()
def evaluate_student(folder: Path, scenes: int = 512, seed: int = 500) -> dict[str, float]:
    """Held-out image-text matching of a ViLT on curated scenes it never saw (chance 0.5).

    ``matching``: the caption against that of another picture; ``matching_hard``: against one that
    differs in one thing. Each is the share of pairs in which the true one scores higher.
    """
    model, encoder = load_vilt(str(folder)).eval(), ViltEncoder(str(folder))
    pairs = list(captions("curated", seed, scenes))
    pictures, mask = pad_pictures([encoder.picture(picture.image) for picture, _ in pairs])
    true = [text for _, text in pairs]
    false = [false_caption(seed, index) for index in range(scenes)]

    def scores(texts: list[str]) -> Tensor:
        encoded = encoder.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        ids, attention = encoded["input_ids"], encoded["attention_mask"]
        inputs = (ids[:, None], attention[:, None], torch.zeros_like(ids)[:, None], pictures, mask)
        parts = zip(*(tensor.split(64) for tensor in inputs), strict=True)
        return torch.cat([model(*part).logits[:, 0] for part in parts])

    own = scores(true)
    others = {"matching": scores(true[1:] + true[:1]), "matching_hard": scores(false)}
    return {name: round(float((own > other).float().mean()), 3) for name, other in others.items()}


def note_figures(folder: Path, figures: dict[str, float]) -> None:
    """Adds held-out figures and the weights' checksum to a model folder's provenance."""
    path = folder / "provenance.json"
    made = json.loads(path.read_text(encoding="utf-8"))
    weights = next(folder.glob("*.safetensors"))
    write_json(path, made | {"held_out": figures, "weights": weights.name, "sha256": file_digest(weights)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["teacher", "student", "figures"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--scenes", type=int)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given = {k: v for k, v in vars(options).items() if k in ("scenes", "steps") and v}
    teacher, student = ROOT / "data/models/mini-clip", ROOT / "data/models/mini-vilt"
    if options.model == "teacher":
        pretrain_teacher(options.folder or teacher, **given)
    elif options.model == "student":
        pretrain_student(options.folder or student, **given)
    if not options.folder:
        note_figures(teacher, evaluate_teacher(teacher))
        note_figures(student, evaluate_student(student))


if __name__ == "__main__":
    main()
