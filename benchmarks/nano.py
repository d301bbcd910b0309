"""Train the nano base from phantoms: `python benchmarks/nano.py [--output DIR] [--seed 0] [--width 128] [--layers 4]`.

The result is a base model that can see and talk a little and has never met a diagnosis: its images show attributes
drawn uniformly and independently (`draw_attributes(rng, None)`), its questions are about these attributes. Two stages:

1. Vision. Answer text alone teaches a fresh vision tower nothing, so it is first trained through auxiliary heads,
   thrown away afterwards: a fine segmentation of the mass from each patch, the attributes from pooled patches.
2. Joint. Question and answer in the chat format, auxiliary losses kept on, plus an echo task: "Please answer 'X'.",
   or any of three listed words. Embeddings are tied and LoRA freezes them: the rows of words that
   were never an answer would collapse together, and the three diagnoses could then not be told apart. The echo task
   gives every word a life of its own and keeps answers to the listed ones; it says nothing about what a diagnosis
   looks like.

The checkpoint in train_fn/nano/: seed 0, one thread, about 20 minutes; mean accuracy 0.710 over the nine attributes on
400 new phantoms, where the commonest answer of each has 0.470. Its answers on shape and margin are no better than that;
size, depth, location, posterior features and echo pattern (0.78 to 0.83) carry the mean.

A smaller or larger sibling, as `benchmarks/sibling.py` needs one: `--width` and `--layers`, of tower and text alike.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil
from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor

from train_fn.data.phantoms import CLASSES, MASS_ATTRIBUTES, QUESTION, draw_attributes, render
from train_fn.nano import CHECKPOINT

NUM_PHANTOMS, NUM_TEST_PHANTOMS = 6000, 400
VISION_STEPS, VISION_BATCH_SIZE, VISION_LEARNING_RATE = 2000, 32, 1e-3
JOINT_STEPS, JOINT_BATCH_SIZE, JOINT_LEARNING_RATE = 2400, 16, 1e-3
PATCH = 14  # pixels
GRIDS = ((8, 8), (8, 8), (7, 8), (7, 9), (6, 9), (6, 10), (9, 7))  # patches, rows x columns; all about 64
CELLS = 7  # the segmentation head resolves CELLS x CELLS cells a patch
IMAGE_INPUTS = ("pixel_values", "image_grid_thw", "image_merge_sizes")
NUM_TURNS = 3  # questions about one image in a row
VOCAB_SIZE = 256
HEAD_DIM = 32

# attribute -> possible answers. Those that flips and crops change are read off the mask, see `augment`.
ANSWERS: dict[str, list[str]] = {
    "lesion": ["no", "yes"],
    **{name: list(values) for name, values in MASS_ATTRIBUTES.items()},
    "location": ["left", "middle", "right"],
    "depth": ["superficial", "deep"],
}
SUBJECTS = {
    "lesion": "whether there is a lesion",
    "echo": "the echo pattern of the lesion",
    "posterior": "the posterior features of the lesion",
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<unk>"]
# Words that a user's own question may need; with the space before them and without, as far as rows last.
EXTRA_WORDS = (
    ". , : ; ? ! ' \" ( ) - / Is Are this there a an the What Which Does of or and in show mass cancer diagnosis "
    "breast ultrasound image normal benign malignant tissue if it is with please answer Answer only one word You "
    "assistant helpful medical doctor describe finding findings suspicious BI-RADS category A B C D 0 1 2 3 4 5 6 "
    "are on you based see most likely Classify classify into following class label Question Answer Look at patient "
    "right Choose Based not has scan Diagnosis"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<|image_pad|>\n' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


# ---------------------------------------------------------------------------------------------------------- words


def listed(words: list[str]) -> str:
    """'A' or 'A' or 'B' or 'A', 'B', or 'C', as the diagnostic question lists its answers."""
    quoted = [f"'{word}'" for word in words]
    return " or ".join(quoted) if len(quoted) < 3 else ", ".join(quoted[:-1]) + f", or {quoted[-1]}"


def question(attribute: str) -> str:
    """The question about one attribute, in the form of the diagnostic question."""
    subject = SUBJECTS.get(attribute, f"the {attribute} of the lesion")
    return f"Carefully examine the image to determine {subject}. Please answer {listed(ANSWERS[attribute])}."


def echo(words: list[str]) -> str:
    return f"Please answer {listed(words)}."


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of at most `VOCAB_SIZE` rows; words carry the space before them, so text survives."""
    splitter = pre_tokenizers.Split(Regex(r"\n| ?[A-Za-z]+(-[A-Za-z]+)*| ?[^\sA-Za-z]| "), "isolated")
    texts = ["user\nassistant\nsystem\n", QUESTION, *CLASSES, echo(["", "", ""]), *map(question, ANSWERS)]
    texts += [answer for answers in ANSWERS.values() for answer in answers]
    extra = EXTRA_WORDS.split()
    texts += [*(f" {word}" for word in (*CLASSES, *extra)), *extra]
    words = [piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)]
    vocabulary = list(dict.fromkeys(SPECIAL_TOKENS + words))[:VOCAB_SIZE]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|image_pad|>", "<|video_pad|>"],
        model_max_length=2048,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> VideoLlama3Processor:
    class ImageOnly(VideoLlama3Processor):
        """Without its video part, which needs torchvision."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    ImageOnly.__name__ = VideoLlama3Processor.__name__  # is saved as `processor_class`
    pixels = (8 * PATCH) ** 2
    image_processor = VideoLlama3ImageProcessorPil(
        patch_size=PATCH,
        merge_size=1,
        size={"shortest_edge": pixels, "longest_edge": pixels},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return ImageOnly(image_processor=image_processor, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)


# --------------------------------------------------------------------------------------------------------- images


def draw_phantoms(seed: int, num_images: int) -> dict[str, torch.Tensor]:
    """Phantoms without classes: images and masks uint8 [N, H, W], attributes long [N, A], -100 = does not apply."""
    images, masks, attributes = [], [], []
    for index in range(num_images):
        rng = np.random.default_rng([seed, index])
        drawn = draw_attributes(rng, None)
        image, mask = render(rng, drawn)
        images.append(image)
        masks.append(mask.astype(np.uint8))
        attributes.append([values.index(drawn[name]) if name in drawn else -100 for name, values in ANSWERS.items()])
    pool = {"images": np.stack(images), "masks": np.stack(masks), "attributes": np.array(attributes)}
    return {name: torch.from_numpy(part) for name, part in pool.items()}


def augment(pool: dict[str, torch.Tensor], rows: np.ndarray, rng: np.random.Generator, plain: bool) -> dict[str, Any]:
    """Make one batch as the image processor would see it, `plain` or disturbed as real images are.

    Returns pixel_values [B*P, 3*14*14], image_grid_thw and image_merge_sizes (one grid for the batch), the share of
    mass in each cell [B, P, CELLS*CELLS] and attributes [B, A].
    """
    images, masks = pool["images"][rows, None].float() / 255, pool["masks"][rows, None].float()  # [B, 1, H, W]
    attributes = pool["attributes"][rows].clone()
    grid_h, grid_w = (8, 8) if plain else GRIDS[rng.integers(len(GRIDS))]
    if not plain:
        if rng.random() < 0.5:
            images, masks = images.flip(-1), masks.flip(-1)
        height, width = (int(side * rng.uniform(0.8, 1)) for side in images.shape[-2:])
        y, x = rng.integers(images.shape[-2] - height + 1), rng.integers(images.shape[-1] - width + 1)
        images, masks = (part[..., y : y + height, x : x + width] for part in (images, masks))
        if rng.random() < 0.5:  # a coarser scan
            scale = rng.uniform(0.5, 0.9)
            images = F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
        gain, gamma, offset = (
            torch.from_numpy(rng.uniform(*limits, (len(rows), 1, 1, 1))).float()
            for limits in ((0.7, 1.3), (0.6, 1.6), (-0.08, 0.08))
        )
        images = (images.clamp(0, 1) ** gamma * gain + offset).clamp(0, 1)
    images = F.interpolate(images, (grid_h * PATCH, grid_w * PATCH), mode="bicubic", antialias=True).clamp(0, 1)
    masks = F.interpolate(masks, (grid_h * CELLS, grid_w * CELLS), mode="bilinear", antialias=True)

    mass = masks.mean((1, 2, 3))  # [B]
    centres = []
    for axis in (-1, -2):  # x, y of the mass's centre as a share of the image
        ruler = torch.linspace(0, 1, masks.shape[axis])
        centres.append((masks.mean((1, -3 - axis)) * ruler).mean(-1) / mass.clamp(min=1e-6))
    names = list(ANSWERS)
    attributes[:, names.index("size")] = (mass > 0.036).long() + (mass > 0.078).long()
    attributes[:, names.index("location")] = (centres[0] * 3).long().clamp(0, 2)
    attributes[:, names.index("depth")] = (centres[1] > 0.47).long()
    gone = mass < 0.003
    attributes[gone, 1:] = -100
    attributes[gone, 0] = 0

    def patches(part: torch.Tensor, side: int) -> torch.Tensor:  # [B, C, H, W] -> [B, P, C*side*side]
        return F.unfold(part, side, stride=side).transpose(1, 2)

    return {
        "pixel_values": patches(((images - 0.5) / 0.5).expand(-1, 3, -1, -1), PATCH).flatten(0, 1),
        "image_grid_thw": torch.tensor([[1, grid_h, grid_w]] * len(rows)),
        "image_merge_sizes": torch.ones(len(rows), dtype=torch.long),
        "cells": patches(masks, CELLS),
        "attributes": attributes,
    }


# ---------------------------------------------------------------------------------------------------------- model


def make_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> VideoLlama3ForConditionalGeneration:
    heads = width // HEAD_DIM
    shared = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    vision = {**shared, "intermediate_size": 4 * width}
    text = {**shared, "intermediate_size": 3 * width, "num_key_value_heads": heads // 2, "head_dim": HEAD_DIM}
    text |= {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 2048}
    initial = {"initializer_range": 0.06}  # three times the usual: the text model is narrow
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    rows = tokenizer.get_vocab()
    config = VideoLlama3Config(
        text_config={"model_type": "qwen3", "tie_word_embeddings": True, **text, **initial, **tokens},
        vision_config={"patch_size": PATCH, **vision},
        image_token_id=rows["<|image_pad|>"],
        video_token_id=rows["<|video_pad|>"],
        tie_word_embeddings=True,
        **tokens,
    )
    model = VideoLlama3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=8, **tokens)
    return model


class AuxiliaryHeads(torch.nn.Module):
    """What teaches the vision tower: segmentation of cells, and attributes from two poolings of the patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cells = torch.nn.Linear(width, CELLS * CELLS)
        num_answers = sum(map(len, ANSWERS.values()))
        self.image = torch.nn.Linear(width, num_answers)  # from the mean of all patches
        self.mass = torch.nn.Linear(width, num_answers)  # from the patches of the mass: they should know their mass

    def loss(self, features: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """`features` [B, P, D] -> scalar."""
        cells, attributes = batch["cells"], batch["attributes"]
        loss = 4 * F.binary_cross_entropy_with_logits(self.cells(features), cells)
        weight = cells.mean(-1, keepdim=True) + 1e-6  # [B, P, 1]
        in_mass = (features * weight).sum(1) / weight.sum(1)
        for scores in (self.image(features.mean(1)), self.mass(in_mass)):
            parts = scores.split([len(answers) for answers in ANSWERS.values()], dim=-1)
            for part, target in zip(parts, attributes.T, strict=True):
                loss = loss + F.cross_entropy(part, target) / len(ANSWERS)
        return loss


def chat_batch(processor, batch: dict[str, Any], turns: list[list[tuple[str, str]]]) -> dict[str, torch.Tensor]:
    """Questions and answers in the chat format: input_ids and labels [B, S], labels -100 outside answers.

    There is no attention mask: causal attention never looks at the padding on the right.
    """
    tokenizer, num_patches = processor.tokenizer, int(batch["image_grid_thw"][0].prod())
    ids, labels = [], []
    for conversation in turns:
        row: list[int] = []
        mask: list[int] = []
        for number, (asked, answer) in enumerate(conversation):
            image = "<|image_pad|>" * num_patches + "\n" if number == 0 else ""
            prompt = f"<|im_start|>user\n{image}{asked}<|im_end|>\n<|im_start|>assistant\n"
            for text, is_answer in ((prompt, 0), (f"{answer}<|im_end|>", 1), ("\n", 0)):
                piece = tokenizer(text, add_special_tokens=False).input_ids
                row += piece
                mask += [is_answer] * len(piece)
        ids.append(torch.tensor(row))
        labels.append(torch.where(torch.tensor(mask) == 1, ids[-1], -100))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, True, tokenizer.pad_token_id),
        "labels": pad(labels, True, -100),
    }


def draw_turns(rng: np.random.Generator, attributes: torch.Tensor, words: list[str]) -> list[list[tuple[str, str]]]:
    """Per image `NUM_TURNS` questions: two of three about an attribute that applies, else the echo task."""
    answers = [*CLASSES, *(word for values in ANSWERS.values() for word in values)]
    conversations = []
    for row in attributes.tolist():
        possible = [name for name, value in zip(ANSWERS, row, strict=True) if value >= 0]
        turns = []
        for _ in range(NUM_TURNS):
            if rng.random() < 2 / 3:
                name = str(rng.choice(possible))
                turns.append((question(name), ANSWERS[name][row[list(ANSWERS).index(name)]]))
            else:
                num_words = 1 if rng.random() < 0.7 else 3
                among = words if num_words == 1 and rng.random() < 0.5 else answers
                choices = [str(word) for word in rng.choice(among, size=num_words, replace=False)]
                turns.append((echo(choices), str(rng.choice(choices))))
        conversations.append(turns)
    return conversations


# ------------------------------------------------------------------------------------------------------- training


def train(model, heads: AuxiliaryHeads, processor, pool: dict[str, torch.Tensor], seed: int, joint: bool) -> None:
    """One stage: the vision tower with its heads, or (`joint`) everything in question/answer form."""
    rng = np.random.default_rng([seed, int(joint)])
    num_steps, batch_size, peak = VISION_STEPS, VISION_BATCH_SIZE, VISION_LEARNING_RATE
    if joint:
        num_steps, batch_size, peak = JOINT_STEPS, JOINT_BATCH_SIZE, JOINT_LEARNING_RATE
    vision = [*model.model.vision_model.parameters(), *heads.parameters()]
    talk = [*model.model.projector.parameters(), *model.model.language_model.parameters()] if joint else []
    groups = [{"params": vision, "lr": peak * (0.3 if joint else 1)}, {"params": talk, "lr": peak}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(  # a linear rise, then a cosine
        optimizer, lambda step: min((step + 1) / (0.1 * num_steps), 0.5 + 0.5 * math.cos(math.pi * step / num_steps))
    )
    words = [word for word in sorted(processor.tokenizer.get_vocab()) if word not in SPECIAL_TOKENS and word.strip()]
    started = time.perf_counter()
    for step in range(num_steps):
        batch = augment(pool, rng.integers(len(pool["images"]), size=batch_size), rng, plain=False)
        images = {name: batch[name] for name in IMAGE_INPUTS}
        if joint:
            seen = model.model.get_image_features(**images)
            text = chat_batch(processor, batch, draw_turns(rng, batch["attributes"], words))
            output = model(**text, mm_encoder_outputs={"image": seen})
            loss = heads.loss(seen.last_hidden_state.unflatten(0, (batch_size, -1)), batch) / 4 + output.loss
        else:
            features = model.model.vision_model(*images.values())
            loss = heads.loss(features.last_hidden_state.unflatten(0, (batch_size, -1)), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vision + talk, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == num_steps - 1:
            losses = f"loss {loss.item():.3f}" + (f", answers {output.loss.item():.3f}" if joint else "")
            seconds = time.perf_counter() - started
            print(f"{'joint' if joint else 'vision'} step {step}: {losses}, {seconds:.0f} s", flush=True)


@torch.no_grad()
def score(model, processor, pool: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Per attribute: accuracy of the answer's first token on plain phantoms, and that of the commonest answer."""
    rng, results = np.random.default_rng(0), {}
    for column, (name, answers) in enumerate(ANSWERS.items()):
        right: list[bool] = []
        targets: list[int] = []
        for rows in np.array_split(np.arange(len(pool["images"])), 8):
            batch = augment(pool, rows, rng, plain=True)
            target = batch["attributes"][:, column].tolist()
            turns = [[(question(name), answers[max(value, 0)])] for value in target]
            text = chat_batch(processor, batch, turns)
            labels = text.pop("labels")
            images = {key: batch[key] for key in IMAGE_INPUTS}
            guesses = model(**text, **images).logits[:, :-1].argmax(-1)
            first = (labels[:, 1:] != -100).int().argmax(1)[:, None]
            hit = (guesses.gather(1, first) == labels[:, 1:].gather(1, first))[:, 0].tolist()
            right += [ok for ok, value in zip(hit, target, strict=True) if value >= 0]
            targets += [value for value in target if value >= 0]
        results[name] = (float(np.mean(right)), max(np.bincount(targets)) / len(targets))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the nano base from phantoms.")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="directory of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128, choices=(64, 128, 192, 256), help="of tower and text")
    parser.add_argument("--layers", type=int, default=4, help="of tower and text, each")
    options = parser.parse_args()
    torch.set_num_threads(1)  # two makers side by side beat one with two threads; and sums keep their order
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    processor = make_processor(make_tokenizer())
    model = make_model(processor.tokenizer, options.width, options.layers)
    heads = AuxiliaryHeads(width=model.model.projector.readout[0].in_features)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} words")
    pool = draw_phantoms(options.seed, NUM_PHANTOMS)
    print(f"{NUM_PHANTOMS} phantoms, {time.perf_counter() - started:.0f} s", flush=True)
    model.train()
    for joint in (False, True):
        train(model, heads, processor, pool, options.seed, joint)

    model.eval().to(torch.bfloat16).save_pretrained(options.output)
    processor.save_pretrained(options.output)
    (options.output / "model.safetensors").chmod(0o644)  # is saved readable by its owner alone
    model.float()  # scored with the weights as saved
    results = score(model, processor, draw_phantoms(options.seed + 1, NUM_TEST_PHANTOMS))
    for name, (accuracy, majority) in results.items():
        print(f"{name:12s} accuracy {accuracy:.3f}, majority {majority:.3f}")
    accuracy, majority = np.mean(list(results.values()), axis=0)
    seconds = time.perf_counter() - started
    print(f"mean attribute accuracy {accuracy:.3f}, majority {majority:.3f}, {seconds:.0f} s in all")


if __name__ == "__main__":
    main()
