"""Metrics of open answers: exact match, word F1, ROUGE-L and BLEU over one tokenizer.

Each compares one answer with its true answer and gives 0 to 1; a part's value is the mean over its samples. BLEU is a
value of all samples together, from counts of each. Both texts empty: 1; one of them empty: 0.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from typing import Any

import numpy as np

from train_fn.support.numbers import DASHES

BLEU_ORDER = 4  # BLEU counts sequences of one to four words
MAX_ROUGE_WORDS = 20_000  # of each text; the longest common subsequence takes time with the product of both lengths
ARTICLES = {"a", "an", "the"}


# ------------------------------------------------------------------------------------------------ words


@functools.cache
def patterns() -> tuple[Any, Any]:
    """Regular expressions for what is deleted from a text, and for the words of the rest."""
    import regex  # knows Unicode's scripts and categories; transformers needs it, too

    # Marks within numbers stay: 3.5 is not 35, 120/80 is not 12080, -3 is not 3, .5 is not 5.
    in_numbers = r"(?<=\p{Nd})\p{P}(?=\p{Nd})|(?<![\p{L}\p{N}.-])(?:-\.?|\.)(?=\p{Nd})"
    deleted = regex.compile(rf"(?:{in_numbers})(*SKIP)(*FAIL)|[\p{{P}}\p{{Sk}}\p{{Cf}}]")
    # Scripts without spaces between words. Line_Break=SA: Thai, Lao, Khmer, Myanmar and their like.
    unspaced = r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Bopomofo}\p{Yi}\p{Tibetan}\p{Line_Break=SA}&&[\p{L}\p{M}\p{N}]]"
    symbol = r"[\p{Sm}\p{Sc}\p{So}]"  # HER2+ is not HER2-, < 5 is not > 5
    words = regex.compile(rf"(?V1){unspaced}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}\p{{P}}]--{unspaced}]+|{symbol}")
    return deleted, words


def words(text: str) -> list[str]:
    """The words of a text, by which all metrics of open answers compare.

    As in SQuAD's normalisation, case, punctuation and English articles do not count, and punctuation is deleted without
    a gap ("x-ray" is "xray"). Beyond it: Unicode forms are unified (NFKC), Unicode's punctuation counts as such, each
    character of a script without spaces (Chinese, Japanese, Thai, ...) is a word, and nothing is deleted that changes
    the meaning of a short answer: marks within numbers (3.5, 120/80, -3), symbols (+, <, °; each is a word), an article
    at the end ("hepatitis A", the option "A"), and the marks of an answer that consists of punctuation only.
    """
    deleted, pattern = patterns()
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(DASHES)
    found = pattern.findall(deleted.sub("", text))
    if not found:
        return [mark for mark in text if mark.isprintable() and not mark.isspace()]
    return [word for word in found[:-1] if word not in ARTICLES] + found[-1:]


# ------------------------------------------------------------------------------------------------ one sample


def exact_match(answer: str, truth: str) -> float:
    """1 if both texts have the same words in the same order, else 0."""
    return float(words(answer) == words(truth))


def token_f1(answer: str, truth: str) -> float:
    """F1 of the words, each counted as often as it occurs, in any order (SQuAD; Rajpurkar et al. 2016)."""
    found, true = words(answer), words(truth)
    return f1((Counter(found) & Counter(true)).total(), len(found), len(true))


def rouge_l(answer: str, truth: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words.

    The value is that of the package rouge-score over the same words. Only the first MAX_ROUGE_WORDS words of each text
    are compared.
    """
    from rapidfuzz.distance import LCSseq

    number: dict[str, int] = {}
    found, true = (
        [number.setdefault(w, len(number)) for w in words(text)[:MAX_ROUGE_WORDS]] for text in (answer, truth)
    )
    return f1(LCSseq.similarity(found, true), len(found), len(true))


def f1(common: int, num_found: int, num_true: int) -> float:
    """F1 from counts; 1 if both sides are empty."""
    return 2 * common / (num_found + num_true) if num_found + num_true else 1.0


# ------------------------------------------------------------------------------------------------ BLEU


def bleu_statistics(answer: str, truth: str) -> np.ndarray:
    """What BLEU needs of one sample [10]: words of the answer, words of the truth, and for one to four words the number
    of sequences in both and the number in the answer. Sums over samples give the corpus's BLEU."""
    from sacrebleu.metrics.bleu import BLEU

    score = BLEU(tokenize="none", force=True).corpus_score([" ".join(words(answer))], [[" ".join(words(truth))]])
    return np.array([score.sys_len, score.ref_len, *score.counts, *score.totals])


def corpus_bleu(statistics: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """BLEU of a corpus, as `sacrebleu.corpus_bleu(...).score / 100` with its default smoothing.

    Args:
        statistics: [N, 10], a row of `bleu_statistics` for each sample.
        weights: how often each sample counts, in whole numbers [R, N].

    Returns:
        0 to 1 for each row of weights [R]. NaN if no truth has four words: there even perfect answers would have 0.
    """
    from sacrebleu.metrics.bleu import BLEU

    sums, long_enough = weights @ statistics, (weights @ (statistics[:, 1] >= BLEU_ORDER)) > 0
    found = np.full(len(weights), math.nan)
    for row in np.flatnonzero(long_enough):
        answer_words, truth_words, *counts = sums[row].round().astype(int).tolist()
        correct, total = counts[:BLEU_ORDER], counts[BLEU_ORDER:]
        score = BLEU.compute_bleu(correct, total, answer_words, truth_words, smooth_method="exp").score
        found[row] = min(score / 100, 1.0)
    return found
