"""What the model answers: scores of the candidate answers where a task has some, generated texts elsewhere.

Deterministic, without sampling.

Shapes: N samples, B samples of a batch, S tokens of its longest prompt, C candidates (of the task with the most),
T tokens of the longest candidate, K tokens that follow the prompt in one forward pass, H width of the language model,
V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from train_fn.data.samples import Sample, Splits
from train_fn.model.base import Base
from train_fn.model.batches import answer_losses, collate, forward_hidden, prompt_length, to_device
from train_fn.model.memory import is_out_of_memory
from train_fn.model.prompts import answer_ids, end_tokens
from train_fn.support.profile import count_work
from train_fn.support.ranks import gather, world

MAX_NEW_TOKENS = 1024  # of an answer for which nobody has set a limit
MAX_PROMPT_TOKENS = 16_384  # of a batch, padding included: 2.3 GiB of keys and values at Hulu-Med-4B's shape
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
        batch_size: most samples of a batch.
        generated: indices of the samples without candidates whose answer is generated. Not given: all of them.

    Returns: the predictions, on every worker.
    """
    base.model.eval()
    rank, world_size = world()
    results: list[tuple[int, float, list[float], str | None]] = []  # index, loss, scores, text
    kinds = {i: (samples[i].task, prompt_length(base, samples[i])) for i in range(rank, len(samples), world_size)}
    batches = in_batches(base, kinds, batch_size)
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

    Image and question are computed once; the candidates continue from the cached keys and values. All samples must have
    the same prompt length, unless `base.needs_no_mask`.
    """
    batch = collate(base, samples, with_answers=False)
    prompt = forward_hidden(base, batch, use_cache=True)
    answers = [[answer_ids(base, sample.prompt, answer) for answer in candidates] for sample in samples]
    longest = max(len(ids) for its in answers for ids in its)
    padded = torch.tensor([[ids + [-100] * (longest - len(ids)) for ids in its] for its in answers])
    targets = to_device(padded, base.device)  # [B, C, T]
    hidden, places = (in_one_row if base.needs_no_mask else in_own_rows)(base, batch, prompt, answers)
    likely = base.model.get_output_embeddings()(hidden).float().log_softmax(-1)  # [B, places, V]
    rows = torch.arange(len(samples), device=base.device)[:, None, None]
    found = likely[rows, to_device(places, base.device), targets.clamp(min=0)]  # [B, C, T]
    return found.masked_fill(targets == -100, 0).sum(2)


def in_one_row(
    base: Base, batch: dict[str, Any], prompt: Any, answers: Sequence[Sequence[list[int]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue each prompt with all of its candidates, one after another in a row. Each candidate attends to the prompt
    and to itself only, so the prompt's keys and values are not copied for each.

    Args:
        batch: the prompts.
        prompt: the model's output for them.
        answers: token ids of each sample's candidates.

    Returns:
        Hidden states [B, 1 + K, H], and which of them predicts each candidate's tokens [B, C, T], on the CPU.
    """
    longest = max(len(ids) for its in answers for ids in its)
    entries, places = [], []
    for its in answers:
        begins = [0, *itertools.accumulate(len(ids) - 1 for ids in its)]
        # The first token is predicted by the prompt, each other one by the token before it.
        places.append([[0] + [begin + t for t in range(1, len(ids))] + [0] * (longest - len(ids))
                       for begin, ids in zip(begins, its, strict=False)])  # fmt: skip
        entries.append([(token, c, t) for c, ids in enumerate(its) for t, token in enumerate(ids[:-1])])
    most = max(map(len, entries))
    hidden = last_of_prompt(batch, prompt)  # [B, 1, H]
    if most:
        padded = torch.tensor([its + [(0, -1, 0)] * (most - len(its)) for its in entries])  # [B, K, 3]
        tokens, candidate, depth = to_device(padded, base.device).unbind(2)
        own = (candidate[:, :, None] == candidate[:, None]).tril()  # [B, K, K]
        inputs = {"input_ids": tokens} | behind_prompts(batch, own, depth)
        output = forward_hidden(base, inputs, past_key_values=prompt.past_key_values, use_cache=True)
        hidden = torch.cat([hidden, output.last_hidden_state], 1)
    return hidden, torch.tensor(places)


def in_own_rows(
    base: Base, batch: dict[str, Any], prompt: Any, answers: Sequence[Sequence[list[int]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `in_one_row`, for models whose masks are not known here: each candidate continues in a row of its own, padded
    on the right, and the prompts are equally long."""
    num_candidates, longest = len(answers[0]), max(len(ids) for its in answers for ids in its)
    tokens = [ids[:-1] + [0] * (longest - len(ids)) for its in answers for ids in its]  # [B * C, T - 1]
    hidden = prompt.last_hidden_state[:, -1:].repeat_interleave(num_candidates, 0)
    if longest > 1:
        cache = prompt.past_key_values
        cache.batch_repeat_interleave(num_candidates)
        inputs = {"input_ids": torch.tensor(tokens, device=base.device)}
        output = forward_hidden(base, inputs, past_key_values=cache, use_cache=True)
        hidden = torch.cat([hidden, output.last_hidden_state], 1)
    places = torch.arange(num_candidates * longest).view(1, num_candidates, longest)
    return hidden.view(len(answers), num_candidates * longest, -1), places.expand(len(answers), -1, -1)


def last_of_prompt(batch: dict[str, Any], prompt: Any) -> torch.Tensor:
    """Hidden state of each prompt's last token [B, 1, H], in front of the padding."""
    lengths = batch["attention_mask"].sum(1)
    return prompt.last_hidden_state[torch.arange(len(lengths), device=lengths.device), lengths - 1][:, None]


def behind_prompts(batch: dict[str, Any], own: torch.Tensor, depth: torch.Tensor) -> dict[str, Any]:
    """Mask and positions of tokens that follow prompts of several lengths.

    Args:
        batch: the prompts [B, S], padded on the right.
        own: which of the tokens behind the prompts each of the last K attends to [B, K, all of them].
        depth: how many tokens each of the last K has between itself and its prompt [B, K].
    """
    lengths = batch["attention_mask"].sum(1)[:, None]
    in_prompt = batch["attention_mask"].bool()[:, None].expand(-1, own.shape[1], -1)
    mask = torch.cat([in_prompt, own], 2)[:, None]  # [B, 1, K, S + all]
    return {"attention_mask": {"full_attention": mask}, "position_ids": lengths + depth}


@torch.no_grad()
def generate(base: Base, samples: Sequence[Sample], most: int) -> list[str]:
    """The model's own answers of at most `most` tokens, decoded greedily. All samples must have the same prompt length,
    unless `base.needs_no_mask`.

    A sample that has ended goes on with its end token until all have, which changes nothing for the others.
    """
    if not samples:
        return []
    tokenizer = base.processor.tokenizer
    ends = torch.tensor(sorted(end_tokens(tokenizer)), device=base.device)
    batch = collate(base, samples, with_answers=False)
    output = forward_hidden(base, batch, use_cache=True)
    hidden = last_of_prompt(batch, output) if base.needs_no_mask else output.last_hidden_state[:, -1:]
    tokens: list[torch.Tensor] = []
    ended = torch.zeros(len(samples), dtype=torch.bool, device=base.device)
    for number in range(most):
        count_work()
        logits = base.model.get_output_embeddings()(hidden[:, 0])
        tokens.append(torch.where(ended, ends[0], logits.argmax(-1)))
        ended |= torch.isin(tokens[-1], ends)
        if ended.all():
            break
        inputs: dict[str, Any] = {"input_ids": tokens[-1][:, None]}
        if base.needs_no_mask:
            own = torch.ones(len(samples), 1, number + 1, dtype=torch.bool, device=base.device)
            inputs |= behind_prompts(batch, own, torch.full_like(inputs["input_ids"], number))
        output = forward_hidden(base, inputs, past_key_values=output.past_key_values, use_cache=True)
        hidden = output.last_hidden_state
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


def in_batches(base: Base, lengths: Mapping[int, tuple[str, Any]], batch_size: int) -> list[list[int]]:
    """Indices in batches of one task and of like prompt lengths, which depend on nothing but these arguments.

    Without `base.needs_no_mask` the lengths of a batch are equal, so that there is no padding between a prompt and its
    answer. With it a batch also has at most `MAX_PROMPT_TOKENS`.

    Args:
        lengths: each sample's task and `prompt_length`, by its index.
        batch_size: most samples of a batch.
    """
    if not base.needs_no_mask:
        alike: dict[Any, list[int]] = defaultdict(list)
        for index, key in lengths.items():
            alike[key].append(index)
        return in_parts(alike.values(), batch_size)
    batches: list[list[int]] = []
    for index in sorted(lengths, key=lambda index: (*lengths[index], index)):
        task, length = lengths[index]
        last = batches[-1] if batches else []
        fits = len(last) < batch_size and (len(last) + 1) * length <= MAX_PROMPT_TOKENS
        if last and fits and lengths[last[0]][0] == task:
            last.append(index)
        else:
            batches.append([index])
    return [sorted(batch) for batch in batches]


def in_parts(batches: Iterable[list[int]], size: int) -> list[list[int]]:
    """Batches divided into batches of at most `size`."""
    return [batch[start : start + size] for batch in batches for start in range(0, len(batch), size)]
