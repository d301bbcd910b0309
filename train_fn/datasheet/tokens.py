"""Tokens of prompts and answers, with those of the images, against the model's limit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from train_fn.data.samples import PLACEHOLDER, Prompt, Sample

MAX_SIZES = 100  # sizes of images that are processed; the others have the tokens of the nearest of these
BATCH = 1000  # texts that are tokenized together


@dataclass(frozen=True)
class TokenLengths:
    """Numbers of tokens."""

    prompts: list[int]
    """Of each sample's prompt, images included."""
    answers: list[int]
    """Of each sample's answer and its end."""
    images: list[int]
    """Of each different image."""
    limit: int
    """The most tokens of a sequence (`max_position_embeddings` of the language model); 0: not known."""

    @property
    def totals(self) -> list[int]:
        """Of each sample."""
        return [prompt + answer for prompt, answer in zip(self.prompts, self.answers, strict=True)]

    @property
    def beyond(self) -> list[int]:
        """Indices of the samples that exceed the limit."""
        return [index for index, total in enumerate(self.totals) if self.limit and total > self.limit]


def position_limit(directory: Path) -> int:
    """The most tokens of a sequence, by a model's configuration; 0: it does not say."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for part in (config.get("text_config"), config.get("llm_config"), config):
        limit = part.get("max_position_embeddings") if isinstance(part, dict) else None
        if isinstance(limit, int) and limit > 0:
            return limit
    return 0


def token_lengths(
    processor: Any, directory: Path, samples: Sequence[Sample], sizes: Mapping[str, tuple[int, int]]
) -> TokenLengths:
    """Count the tokens of samples.

    Args:
        directory: the model's folder.
        sizes: width and height of each image, by path.
    """
    from train_fn.model.prompts import end_tokens, prompt_text, special_tokens
    from train_fn.model.words import token_ids

    tokenizer = processor.tokenizer
    prompts = dict.fromkeys(sample.prompt for sample in samples)
    answers = dict.fromkeys(sample.answer for sample in samples)
    rendered = [prompt_text(processor, prompt) for prompt in prompts]
    begins = special_tokens(processor, rendered[0])
    length_of_prompt = dict(zip(prompts, lengths(tokenizer, rendered, begins), strict=True))
    ends = end_tokens(tokenizer)
    length_of_answer = {
        answer: 1 + next((at for at, token in enumerate(ids) if token in ends), len(ids))
        for answer, ids in zip(answers, token_ids(tokenizer, answers), strict=True)
    }
    by_size = image_tokens(processor, samples[0].prompt.question, sorted(set(sizes.values())))
    # The placeholder of an image is one token of the prompt's text.
    return TokenLengths(
        prompts=[length_of_prompt[s.prompt] + sum(by_size[sizes[i]] - 1 for i in s.images) for s in samples],
        answers=[length_of_answer[sample.answer] for sample in samples],
        images=[by_size[size] for size in sizes.values()],
        limit=position_limit(directory),
    )


def lengths(tokenizer: Any, texts: Sequence[str], begins: Mapping[str, bool]) -> list[int]:
    """Number of tokens of each rendered prompt; begins: of `special_tokens`."""
    found: list[int] = []
    for start in range(0, len(texts), BATCH):
        found += map(len, tokenizer(list(texts[start : start + BATCH]), **begins)["input_ids"])
    return found


def image_tokens(processor: Any, question: str, sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Tokens of an image of each size (width, height) in a prompt.

    The processor counts them itself: it gets blank images of up to `MAX_SIZES` sizes, the extreme ones among them.
    """
    from train_fn.model.prompts import prompt_text, special_tokens

    text = prompt_text(processor, Prompt(question.replace(PLACEHOLDER, " ").strip()))
    begins = special_tokens(processor, text)
    alone = lengths(processor.tokenizer, [text], begins)[0]
    by_pixels = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    step = max(1, -(-len(by_pixels) // MAX_SIZES))
    counted: dict[tuple[int, int], int] = {}
    for size in dict.fromkeys([*by_pixels[::step], *by_pixels[-1:]]):
        images = [[Image.new("RGB", size, "gray")]]
        try:
            encoded = processor(images=images, text=[text], return_tensors="pt", **begins)
        except Exception:  # processors raise anything for images that they refuse; the preflight reports those
            continue
        counted[size] = encoded["input_ids"].shape[1] - alone + 1
    nearest = sorted(counted)
    return {
        size: counted[size]
        if size in counted
        else counted[min(nearest, key=lambda other: abs(other[0] - size[0]) + abs(other[1] - size[1]))]
        for size in sizes
    }
