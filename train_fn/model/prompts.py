"""Prompts and answers as tokens.

Shapes: B samples, S tokens of the longest sequence, T tokens of an answer and its end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from train_fn.data.samples import PLACEHOLDER, Prompt
from train_fn.model.base import Base

TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # [B, S] each


def prompt_text(processor: Any, prompt: Prompt) -> str:
    """The rendered conversation with its image placeholders, up to the beginning of the answer."""
    return processor.apply_chat_template(messages(prompt), tokenize=False, add_generation_prompt=True)


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    """The turns up to the question. An image stands where its placeholder is, or else before the first question."""
    turns: list[dict[str, Any]] = []
    if prompt.system:
        turns.append({"role": "system", "content": text_parts(prompt.system)})
    questions = [*(question for question, _ in prompt.turns), prompt.question]
    placed = any(PLACEHOLDER in question for question in questions)
    for number, question in enumerate(questions):
        first, *rest = question.split(PLACEHOLDER) if placed else [question]
        content = [] if placed or number else [{"type": "image"}] * prompt.num_images
        content = [*content, *text_parts(first.strip() if rest else first)]
        for text in rest:
            content += [{"type": "image"}, *text_parts(text.strip())]
        turns.append({"role": "user", "content": content})
        if number < len(prompt.turns):
            turns.append({"role": "assistant", "content": text_parts(prompt.turns[number][1])})
    return turns


def text_parts(text: str) -> list[dict[str, str]]:
    """A text as content of a turn; none for an empty one."""
    return [{"type": "text", "text": text}] if text else []


def answer_ids(base: Base, prompt: Prompt, answer: str) -> list[int]:
    """Token ids [T] of an answer and its end token. The loss is the mean over these."""
    return answer_tail(base, prompt, answer)[0]


def answer_tail(base: Base, prompt: Prompt, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of an answer and its end token, and of the text that the template writes after that."""
    if (prompt, answer) not in base.tokens:
        base.tokens[prompt, answer] = tokenize_answer(base.processor, prompt, answer)
    return base.tokens[prompt, answer]


def tokenize_answer(processor: Any, prompt: Prompt, answer: str) -> tuple[list[int], list[int]]:
    """Compute `answer_tail`.

    The end of an answer follows from the chat template: it is the text after the answer in a rendered conversation, up
    to and including the first special token. If the template writes none, or rewrites the turn (some add an empty
    thinking block), the tokenizer's end-of-sequence token is used instead.
    """
    tokenizer = processor.tokenizer
    before = prompt_text(processor, prompt)
    turn = {"role": "assistant", "content": text_parts(answer)}
    whole = processor.apply_chat_template([*messages(prompt), turn], tokenize=False)
    rest = whole[len(before) :].rstrip(" ")  # a space that separates turns is not part of the answer
    if not (whole.startswith(before) and rest.lstrip().startswith(answer)):
        rest = answer + tokenizer.eos_token
    # Tokenized after the prompt: tokenizers may treat the beginning of a text unlike its middle.
    head, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, before + rest))
    ids = ids[len(head) :] if ids[: len(head)] == head else tokenizer(rest, add_special_tokens=False)["input_ids"]
    ends = end_tokens(tokenizer)
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    return (ids[: end + 1], ids[end + 1 :]) if end is not None else ([*ids, tokenizer.eos_token_id], [])


def end_tokens(tokenizer: Any) -> set[int]:
    """The tokens that end an answer: all special ones."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {*tokenizer.all_special_ids, tokenizer.eos_token_id}


def special_tokens(processor: Any, text: str) -> dict[str, bool]:
    """Options that keep the tokenizer from repeating a first token that the chat template has written."""
    first = processor.tokenizer.bos_token
    return {"add_special_tokens": not (first and text.startswith(first))}


def prompt_tokens(base: Base, prompt: Prompt, patches: Sequence[int]) -> dict[str, torch.Tensor]:
    """Token ids and mask [1, S] of a prompt with images of so many patches, equal to the processor's."""
    key = ("prompt", prompt, tuple(patches))
    if key not in base.tokens:
        token = base.processor.image_token
        first, *rest = prompt_text(base.processor, prompt).split(token)
        assert len(rest) == len(patches), "the study's questions are checked for this before it starts"
        text = first + "".join(token * count + part for count, part in zip(patches, rest, strict=True))
        begins = special_tokens(base.processor, text)
        base.tokens[key] = dict(base.processor.tokenizer([text], return_tensors="pt", **begins))
    return base.tokens[key]
