"""Scoring the candidate answers of every image: deterministic, no sampling, and it gives probabilities.

Shapes: N images, B of a batch, C candidates, T tokens of the longest candidate, H width of the language model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from train_fn.data import Sample
from train_fn.model import Base, answer_ids, answer_losses, collate, forward_hidden, prompt_size


@torch.no_grad()
def score_candidates(base: Base, samples: Sequence[Sample], candidates: Sequence[str]) -> torch.Tensor:
    """Log-likelihood [B, C] of every candidate answer and its end token, given image and question.

    All samples must share one prompt length. Image and question are run once; the candidates, padded on the right,
    then continue from the cached keys and values.
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


def prompt_length_batches(base: Base, samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Indices in batches of equal prompt length, so that no padding stands between a prompt and its answer."""
    by_length: dict[Any, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        # Question and image size decide the length; where patches are known, they join images of several sizes.
        by_length[prompt_size(base, sample), sample.text].append(index)
    return [
        indices[start : start + batch_size]
        for indices in by_length.values()
        for start in range(0, len(indices), batch_size)
    ]


@torch.no_grad()
def predict(
    base: Base, samples: Sequence[Sample], candidates: Sequence[str], batch_size: int, rank: int, world_size: int
) -> dict[str, np.ndarray]:
    """Scores of all samples, each computed by exactly one worker and known to all of them afterwards.

    Returns `losses` [N], the mean loss over the true answer's tokens, and, with candidates, `scores` [N, C], their
    log-likelihoods. Each worker takes every world_size-th sample; results travel with their index, so uneven shares
    neither repeat nor drop one.
    """
    base.model.eval()
    mine = list(range(rank, len(samples), world_size))
    shard = [samples[index] for index in mine]
    found: list[tuple[int, float, list[float]]] = []
    for batch in prompt_length_batches(base, shard, batch_size):
        chosen = [shard[index] for index in batch]
        if candidates:
            scores = score_candidates(base, chosen, candidates).cpu()
            lengths = [len(answer_ids(base, sample.text, sample.answer)) for sample in chosen]
            losses = [-scores[row, s.label].item() / lengths[row] for row, s in enumerate(chosen)]
            rows = scores.tolist()
        else:
            losses = answer_losses(base, collate(base, chosen, with_answers=True)).tolist()
            rows = [[] for _ in chosen]
        found += zip((mine[index] for index in batch), losses, rows, strict=True)
    if world_size > 1:
        shares: list[Any] = [None] * world_size
        dist.all_gather_object(shares, found)
        found = [one for share in shares for one in share]
    found.sort()
    assert [index for index, _, _ in found] == list(range(len(samples)))
    return {"losses": np.array([loss for _, loss, _ in found]), "scores": np.array([row for _, _, row in found])}
