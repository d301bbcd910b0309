"""How well another base's ranking of settings held on this study's base (`--warm-start`, `--model-small`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tune.records.end_state import EndState
from tune.records.goals import Goal
from tune.records.trials import TrialRecord, point_key

MIN_POINTS = 3  # of a correlation


def transfer_facts(prior: Mapping[str, Any], records: Sequence[TrialRecord], goal: Goal) -> dict[str, Any] | None:
    """What study.json says about the other study, if only its ranking counted; else None.

    Args:
        prior: the event "warm_start", or {}.

    Returns:
        `study` and `model`: the other one's. `num_points`: completed here and there. `spearman`: the correlation of
        their ranks by the goal, None below three points or where all are alike. `device_seconds`: of the other study.
        `device_seconds_saved`: with `--model-small`, about what its epochs would have cost on this base, less what both
        studies did cost; else None.
    """
    if not prior.get("only_ranking"):
        return None
    there = {point_key(trial["params"]): trial["values"][0] for trial in prior["trials"]}
    complete = [record for record in records if record.state == EndState.COMPLETE and record.device_seconds]
    pairs = [(there[point_key(r.searched)], r.value(goal[0])) for r in complete if point_key(r.searched) in there]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    saved = None
    if complete and prior["model_small"]:
        epoch_s = sum(r.device_seconds for r in complete) / sum(len(r.epochs) for r in complete)
        saved = epoch_s * prior["num_epochs"] - prior["device_seconds"] - sum(r.device_seconds for r in records)
    return {
        "study": prior["study"],
        "model": prior["model"],
        "num_points": len(pairs),
        "spearman": spearman(pairs),
        "device_seconds": prior["device_seconds"],
        "device_seconds_saved": saved,
    }


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's correlation of pairs; None below three of them, or where one side is all alike."""
    if len(pairs) < MIN_POINTS or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    from scipy.stats import spearmanr  # here: most studies need none

    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def transfer_sentences(facts: Mapping[str, Any] | None, device_seconds: float) -> str:
    """The facts for people; "" if there are none.

    Args:
        device_seconds: of this study's trials.
    """
    if not facts:
        return ""
    count, which = facts["num_points"], f"{facts['study']} (base {facts['model']})"
    agree = f"Transfer: {count} settings were trained both here and in {which}"
    if facts["spearman"] is None:
        agree += ": too few, or too alike, to compare the two rankings."
    else:
        agree += f"; Spearman's correlation of the two rankings is {facts['spearman']:.2f} (n = {count})."
    if (saved := facts["device_seconds_saved"]) is None:
        return agree
    spent = facts["device_seconds"] + device_seconds
    return (
        f"{agree} Both studies took {spent:,.0f} device-seconds; the search on this base would have taken about "
        f"{spent + saved:,.0f}, so {abs(saved):,.0f} were {'saved' if saved >= 0 else 'lost'}."
    )
