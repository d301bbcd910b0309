"""Prompts and answers as tokens.

Shapes: B images, S tokens of the longest sequence, T tokens of an answer and its end token.
"""

from __future__ import annotations

from typing import Any

import torch

from train_fn.model.base import Base

TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # [B, S] each


def prompt_text(processor: Any, question: str) -> str:
    """The rendered user turn with its image placeholder, up to the beginning of the answer."""
    return processor.apply_chat_template(messages(question), tokenize=False, add_generation_prompt=True)


def messages(question: str) -> list[dict[str, Any]]:
    """One user turn: the image, then the question."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def answer_ids(base: Base, question: str, answer: str) -> list[int]:
    """Token ids [T] of an answer and its end token. The loss is the mean over these."""
    return answer_tail(base, question, answer)[0]


def answer_tail(base: Base, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of an answer and its end token, and of the text that the template writes after that."""
    if (question, answer) not in base.tokens:
        base.tokens[question, answer] = tokenize_answer(base.processor, question, answer)
    return base.tokens[question, answer]


def tokenize_answer(processor: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Compute `answer_tail`.

    The end of an answer follows from the chat template: it is the text after the answer in a rendered conversation, up
    to and including the first special token. If the template writes none, or rewrites the turn (some add an empty
    thinking block), the tokenizer's end-of-sequence token is used instead.
    """
    tokenizer = processor.tokenizer
    prompt = prompt_text(processor, question)
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    whole = processor.apply_chat_template([*messages(question), turn], tokenize=False)
    rest = whole[len(prompt) :].rstrip(" ")  # a space that separates turns is not part of the answer
    if not (whole.startswith(prompt) and rest.lstrip().startswith(answer)):
        rest = answer + tokenizer.eos_token
    # Tokenized after the prompt: tokenizers may treat the beginning of a text unlike its middle.
    head, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + rest))
    ids = ids[len(head) :] if ids[: len(head)] == head else tokenizer(rest, add_special_tokens=False)["input_ids"]
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = added | {*tokenizer.all_special_ids, tokenizer.eos_token_id}
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    return (ids[: end + 1], ids[end + 1 :]) if end is not None else ([*ids, tokenizer.eos_token_id], [])


def special_tokens(processor: Any, text: str) -> dict[str, bool]:
    """Options that keep the tokenizer from repeating a first token that the chat template has written."""
    first = processor.tokenizer.bos_token
    return {"add_special_tokens": not (first and text.startswith(first))}


def prompt_tokens(base: Base, question: str, patches: int) -> dict[str, torch.Tensor]:
    """Token ids and mask [1, S] of a prompt with an image of that many patches, equal to the processor's."""
    key = ("prompt", question, patches)
    if key not in base.tokens:
        token = base.processor.image_token
        text = prompt_text(base.processor, question).replace(token, token * patches)
        begins = special_tokens(base.processor, text)
        base.tokens[key] = dict(base.processor.tokenizer([text], return_tensors="pt", **begins))
    return base.tokens[key]
