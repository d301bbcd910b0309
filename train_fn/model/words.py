"""What a tokenizer makes of words: which it does not know, and where it ends an answer too early."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from train_fn.settings import SHOWN

MAX_UNKNOWN = 0.05  # share of unknown tokens above which a warning says so
MAX_TEXTS = 20_000  # different texts that are counted; there may be a million
MAX_NAMED = 5  # words or answers that a warning names


def token_ids(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens around it."""
    texts = list(texts)
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def without_a_token(tokenizer: Any, words: Iterable[str]) -> set[str]:
    """The words that hold an unknown token, at the beginning of a text and after a space."""
    words = list(words)
    forms = token_ids(tokenizer, words), token_ids(tokenizer, [f" {word}" for word in words])
    pairs = zip(words, *forms, strict=True)
    return {word for word, *its in pairs if all(tokenizer.unk_token_id in ids for ids in its)}


def unknown_words(tokenizer: Any, texts: Counter[str]) -> tuple[float, Counter[str]]:
    """The share of tokens that stand for unknown words, and how often each of these words occurs.

    Args:
        texts: how often each text occurs.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return 0.0, Counter()
    num_unknown = num_tokens = 0
    words: Counter[str] = Counter()
    chosen = dict(texts.most_common(MAX_TEXTS))
    for (text, count), ids in zip(chosen.items(), token_ids(tokenizer, chosen), strict=True):
        num_tokens += count * len(ids)
        if unknown in ids:
            num_unknown += count * ids.count(unknown)
            for word in text.split():
                words[word.strip(".,;:!?()\"'")] += count
    unknown_ones = Counter({word: words[word] for word in without_a_token(tokenizer, filter(None, words))})
    return num_unknown / max(1, num_tokens), unknown_ones


def early_ends(tokenizer: Any, answers: Iterable[str], ends: set[int]) -> dict[str, tuple[str, str, bool]]:
    """The answers that the model gets only a part of, since one of their own tokens ends an answer.

    Args:
        ends: ids of the tokens that end an answer.

    Returns:
        By answer: the part before that token; the word or token that ends it; and whether it is an unknown word.
    """
    answers = list(answers)
    found = {}
    for answer, ids in zip(answers, token_ids(tokenizer, answers), strict=True):
        if (at := next((n for n, token in enumerate(ids) if token in ends), None)) is None:
            continue
        is_unknown = ids[at] == tokenizer.unk_token_id
        token = str(tokenizer.convert_ids_to_tokens(ids[at]))
        if is_unknown:
            unknown = without_a_token(tokenizer, words := answer.split())
            token = next((word for word in words if word in unknown), token)
        found[answer] = (tokenizer.decode(ids[:at]).strip(), token, is_unknown)
    return found


def unknown_warning(tokenizer: Any, texts: Counter[str], what: str) -> list[str]:
    """A warning if more than `MAX_UNKNOWN` of the tokens of the texts stand for unknown words.

    Args:
        texts: how often each text occurs.
        what: their name in the warning.
    """
    share, words = unknown_words(tokenizer, texts)
    if share <= MAX_UNKNOWN:
        return []
    named = ", ".join(f"{SHOWN.repr(word)} ({count:,}x)" for word, count in words.most_common(MAX_NAMED))
    return [
        f"{share:.0%} of the tokens of the {what} stand for words that the model's tokenizer does not know, so the "
        f"model cannot tell these words apart (most frequent: {named}): use words that it knows, or a base with a "
        f"larger vocabulary"
    ]


def cut_warning(tokenizer: Any, answers: Counter[str], ends: set[int]) -> list[str]:
    """A warning if the model gets only the beginning of some answers, up to a word that its tokenizer does not know.

    Args:
        answers: how often each answer occurs.
        ends: ids of the tokens that end an answer.
    """
    chosen = [answer for answer, _ in answers.most_common(MAX_TEXTS)]
    cut = {answer: its for answer, its in early_ends(tokenizer, chosen, ends).items() if its[2] and its[0]}
    if not cut:
        return []
    named = ", ".join(
        f"{SHOWN.repr(answer)} ({answers[answer]:,}x) ends before {SHOWN.repr(word)}"
        for answer, (_, word, _) in list(cut.items())[:MAX_NAMED]
    )
    number = sum(answers[answer] for answer in cut)
    return [
        f"{number:,} of {answers.total():,} answers end for the model at a word that its tokenizer does not know, and "
        f"the rest is not trained: {named}{', ...' if len(cut) > MAX_NAMED else ''}; use words that it knows"
    ]
