"""What the model answers: scores of the candidate answers where a task has some, generated texts elsewhere.

Deterministic, without sampling.

Shapes: N samples, B samples of a batch, C candidates (of the task with the most), T tokens of the longest candidate,
H width of the language model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from train_fn.data.samples import Sample, Splits
from train_fn.model.base import Base
from train_fn.model.batches import answer_losses, collate, forward_hidden, prompt_length
from train_fn.model.memory import is_out_of_memory
from train_fn.model.prompts import answer_ids, end_tokens
from train_fn.support.profile import count_work
from train_fn.support.ranks import gather, world

MAX_NEW_TOKENS = 1024  # of an answer for which nobody has set a limit
SPARE = 1.5  # a generated answer may be so many times as long as the longest of the training part
Predictions = dict[str, np.ndarray]
"""`losses` [N]: mean loss over the tokens of each true answer. `scores` [N, C]: log-likelihoods of the candidates of
the sample's task, NaN behind the last one. `texts` [N]: the generated answer, None where there is none."""


@torch.no_grad()
def predict(
    base: Base, samples: Sequence[Sample], splits: Splits, batch_size: int, generated: Collection[int] | None = None
) -> Predictions:
    """Answer all samples, divided among the workers.

    Each worker answers every world_size-th sample. Results carry their index, so uneven shares neither repeat nor drop
    a sample. If a batch does not fit the memory, it and all later ones are halved.

    Args:
        splits: the study's tasks.
        generated: indices of the samples without candidates whose answer is generated. Not given: all of them.

    Returns: the predictions, on every worker.
    """
    base.model.eval()
    rank, world_size = world()
    results: list[tuple[int, float, list[float], str | None]] = []  # index, loss, scores, text
    batches = like_prompts(base, samples, range(rank, len(samples), world_size), batch_size)
    longest = max_new_tokens(base, splits)
    while batches:
        count_work()
        chosen = [samples[index] for index in batches[0]]
        candidates = splits.task_of(chosen[0]).candidates
        rows: list[list[float]] = [[] for _ in chosen]
        texts: list[str | None] = [None for _ in chosen]
        try:
            if candidates:
                scores = score_candidates(base, chosen, candidates).cpu()
                lengths = [len(answer_ids(base, sample.prompt, sample.answer)) for sample in chosen]
                losses = [-scores[row, int(s.label)].item() / lengths[row] for row, s in enumerate(chosen)]
                rows = scores.tolist()
            else:
                losses = answer_losses(base, collate(base, chosen, with_answers=True)).tolist()
                wanted = [row for row, index in enumerate(batches[0]) if generated is None or index in generated]
                for row, text in zip(wanted, generate(base, [chosen[r] for r in wanted], longest), strict=True):
                    texts[row] = text
        except (RuntimeError, MemoryError) as error:
            if len(chosen) == 1 or not is_out_of_memory(error):
                raise
            batches = in_parts(batches, (len(chosen) + 1) // 2)
            continue
        results += zip(batches.pop(0), losses, rows, texts, strict=True)
    results = sorted((result for share in gather(results) for result in share), key=lambda result: result[0])
    assert [index for index, *_ in results] == list(range(len(samples)))
    table = np.full((len(samples), max(len(its) for _, _, its, _ in results)), np.nan)
    for index, _, its, _ in results:
        table[index, : len(its)] = its
    all_texts = np.empty(len(samples), dtype=object)
    all_texts[:] = [text for *_, text in results]
    return {"losses": np.array([loss for _, loss, *_ in results]), "scores": table, "texts": all_texts}


@torch.no_grad()
def score_candidates(base: Base, samples: Sequence[Sample], candidates: Sequence[str]) -> torch.Tensor:
    """Log-likelihood [B, C] of every candidate answer and its end token after the prompt.

    All samples must have the same prompt length. Image and question are computed once; the candidates, padded on the
    right, continue from the cached keys and values.
    """
    prompt = forward_hidden(base, collate(base, samples, with_answers=False), use_cache=True)
    ids = [answer_ids(base, sample.prompt, answer) for sample in samples for answer in candidates]
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


@torch.no_grad()
def generate(base: Base, samples: Sequence[Sample], most: int) -> list[str]:
    """The model's own answers of at most `most` tokens, decoded greedily. All samples must have the same prompt length.

    A sample that has ended goes on with its end token until all have, which changes nothing for the others.
    """
    if not samples:
        return []
    tokenizer = base.processor.tokenizer
    ends = torch.tensor(sorted(end_tokens(tokenizer)), device=base.device)
    output = forward_hidden(base, collate(base, samples, with_answers=False), use_cache=True)
    tokens: list[torch.Tensor] = []
    ended = torch.zeros(len(samples), dtype=torch.bool, device=base.device)
    for _ in range(most):
        count_work()
        logits = base.model.get_output_embeddings()(output.last_hidden_state[:, -1])
        tokens.append(torch.where(ended, ends[0], logits.argmax(-1)))
        ended |= torch.isin(tokens[-1], ends)
        if ended.all():
            break
        inputs = {"input_ids": tokens[-1][:, None]}
        output = forward_hidden(base, inputs, past_key_values=output.past_key_values, use_cache=True)
    written = torch.stack(tokens, 1).tolist()  # [B, T]
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]


def max_new_tokens(base: Base, splits: Splits) -> int:
    """Most tokens of a generated answer: `--max-new-tokens`, or what the longest answer of the training part takes, and
    half as many again."""
    if splits.max_new_tokens:
        return splits.max_new_tokens
    answers = {s.answer: s.prompt for s in splits.train if not splits.task_of(s).candidates}
    longest = max((len(answer_ids(base, prompt, answer)) for answer, prompt in answers.items()), default=0)
    return min(int(longest * SPARE), MAX_NEW_TOKENS)


def like_prompts(base: Base, samples: Sequence[Sample], indices: Iterable[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of one task and of equal prompt length, so that there is no padding between a prompt and its
    answer."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for index in indices:
        alike[samples[index].task, prompt_length(base, samples[index])].append(index)
    return in_parts(alike.values(), batch_size)


def in_parts(batches: Iterable[list[int]], size: int) -> list[list[int]]:
    """Batches divided into batches of at most `size`."""
    return [batch[start : start + size] for batch in batches for start in range(0, len(batch), size)]
