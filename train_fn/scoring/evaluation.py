"""Scores of the candidate answers of every image: deterministic, without sampling, and a basis for probabilities.

Shapes: N images, B images of a batch, C candidates, T tokens of the longest candidate, H width of the language model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from train_fn.data.samples import Sample
from train_fn.model.base import Base
from train_fn.model.batches import answer_losses, collate, forward_hidden, prompt_length
from train_fn.model.memory import is_out_of_memory
from train_fn.model.prompts import answer_ids
from train_fn.support.profile import count_work
from train_fn.support.ranks import gather, world


@torch.no_grad()
def predict(base: Base, samples: Sequence[Sample], candidates: Sequence[str], batch_size: int) -> dict[str, np.ndarray]:
    """Score all samples, divided among the workers.

    Each worker scores every world_size-th sample. Results carry their index, so uneven shares neither repeat nor drop a
    sample. If a batch does not fit the memory, it and all later ones are halved.

    Returns:
        On every worker: `losses` [N], the mean loss over the true answer's tokens; and `scores` [N, C], the
        log-likelihoods of the candidates.
    """
    base.model.eval()
    rank, world_size = world()
    results: list[tuple[int, float, list[float]]] = []  # index, loss, scores
    batches = prompt_length_batches(base, samples, range(rank, len(samples), world_size), batch_size)
    while batches:
        count_work()
        chosen = [samples[index] for index in batches[0]]
        try:
            if candidates:
                scores = score_candidates(base, chosen, candidates).cpu()
                lengths = [len(answer_ids(base, sample.text, sample.answer)) for sample in chosen]
                losses = [-scores[row, s.label].item() / lengths[row] for row, s in enumerate(chosen)]
                rows = scores.tolist()
            else:
                losses = answer_losses(base, collate(base, chosen, with_answers=True)).tolist()
                rows = [[] for _ in chosen]
        except (RuntimeError, MemoryError) as error:
            if len(chosen) == 1 or not is_out_of_memory(error):
                raise
            batches = in_parts(batches, (len(chosen) + 1) // 2)
            continue
        results += zip(batches.pop(0), losses, rows, strict=True)
    results = sorted(result for share in gather(results) for result in share)
    assert [index for index, _, _ in results] == list(range(len(samples)))
    return {"losses": np.array([loss for _, loss, _ in results]), "scores": np.array([row for _, _, row in results])}


@torch.no_grad()
def score_candidates(base: Base, samples: Sequence[Sample], candidates: Sequence[str]) -> torch.Tensor:
    """Log-likelihood [B, C] of every candidate answer and its end token after image and question.

    All samples must have the same prompt length. Image and question are computed once; the candidates, padded on the
    right, continue from the cached keys and values.
    """
    prompt = forward_hidden(base, collate(base, samples, with_answers=False), use_cache=True)
    ids = [answer_ids(base, sample.text, answer) for sample in samples for answer in candidates]
    longest = max(map(len, ids))
    targets = torch.tensor([row + [-100] * (longest - len(row)) for row in ids], device=base.device)  # [B*C, T]
    hidden = prompt.last_hidden_state[:, -1:].repeat_interleave(len(candidates), 0)  # predicts the first token
    if longest > 1:
        cache = prompt.past_key_values
        cache.batch_repeat_interleave(len(candidates))
        inputs = {"input_ids": targets[:, :-1].clamp(min=0)}
        continued = forward_hidden(base, inputs, past_key_values=cache, use_cache=True).last_hidden_state
        hidden = torch.cat([hidden, continued], 1)  # [B*C, T, H]
    logits = base.model.get_output_embeddings()(hidden).float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return -losses.sum(1).view(len(samples), len(candidates))


def prompt_length_batches(
    base: Base, samples: Sequence[Sample], indices: Iterable[int], batch_size: int
) -> list[list[int]]:
    """Indices in batches of equal prompt length, so that there is no padding between a prompt and its answer."""
    by_length: dict[Any, list[int]] = defaultdict(list)
    for index in indices:
        by_length[prompt_length(base, samples[index])].append(index)
    return in_parts(by_length.values(), batch_size)


def in_parts(batches: Iterable[list[int]], size: int) -> list[list[int]]:
    """Batches divided into batches of at most `size`."""
    return [batch[start : start + size] for batch in batches for start in range(0, len(batch), size)]
