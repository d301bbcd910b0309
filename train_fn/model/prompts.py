"""Prompts and answers as tokens."""

from __future__ import annotations

from typing import Any

import torch

from train_fn.model.base import Base

TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # [B, S] each


def prompt_text(processor: Any, question: str) -> str:
    """The rendered user turn with its image placeholder, up to where the answer begins."""
    return processor.apply_chat_template(messages(question), tokenize=False, add_generation_prompt=True)


def messages(question: str) -> list[dict[str, Any]]:
    """One user turn: the image, then the question."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def answer_ids(base: Base, question: str, answer: str) -> list[int]:
    """Token ids [T] of an answer and its end token: what the loss is taken over."""
    return answer_tail(base, question, answer)[0]


def answer_tail(base: Base, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of an answer and its end token, and of what the template writes after that."""
    if (question, answer) not in base.tokens:
        base.tokens[question, answer] = tokenize_answer(base.processor, question, answer)
    return base.tokens[question, answer]


def tokenize_answer(processor: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """See `answer_tail`.

    What ends an answer is read off the chat template: the text that follows the answer in a rendered conversation,
    up to and including the first special token. A template that has none, or that rewrites the turn (such as one that
    adds an empty thinking block), is completed with the tokenizer's end-of-sequence token instead.
    """
    tokenizer = processor.tokenizer
    prompt = prompt_text(processor, question)
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    whole = processor.apply_chat_template([*messages(question), turn], tokenize=False)
    rest = whole[len(prompt) :].rstrip(" ")  # that is where the next turn would begin
    if not (whole.startswith(prompt) and rest.lstrip().startswith(answer)):
        rest = answer + tokenizer.eos_token
    # Behind the prompt: tokenizers may treat the beginning of a text unlike its middle.
    head, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + rest))
    ids = ids[len(head) :] if ids[: len(head)] == head else tokenizer(rest, add_special_tokens=False)["input_ids"]
    added = {token for token, told in tokenizer.added_tokens_decoder.items() if told.special}
    ends = added | {*tokenizer.all_special_ids, tokenizer.eos_token_id}
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    return (ids[: end + 1], ids[end + 1 :]) if end is not None else ([*ids, tokenizer.eos_token_id], [])


def special_tokens(processor: Any, text: str) -> dict[str, bool]:
    """Tell the tokenizer not to begin with a token that the chat template has written already."""
    first = processor.tokenizer.bos_token
    return {"add_special_tokens": not (first and text.startswith(first))}


def prompt_tokens(base: Base, question: str, patches: int) -> dict[str, torch.Tensor]:
    """Token ids and mask [1, S] of a prompt, as the processor makes them, for an image of that many patches."""
    key = ("prompt", question, patches)
    if key not in base.tokens:
        token = base.processor.image_token
        text = prompt_text(base.processor, question).replace(token, token * patches)
        begins = special_tokens(base.processor, text)
        base.tokens[key] = dict(base.processor.tokenizer([text], return_tensors="pt", **begins))
    return base.tokens[key]
