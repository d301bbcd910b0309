"""The test's comparisons as sentences. The paired interval decides the word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tune.records.goals import mode_of

# Whose test scores they are, beside "winner" and "guide".
UNTUNED, MAJORITY, PROBE = BASELINES = ("untuned base", "majority answer", "linear probe")
GAIN, OVER_PROBE = "difference", "winner minus probe"  # paired; the difference is winner minus guide
CLEAN = ", clean part"  # of test samples without a copy in training
Score = Mapping[str, Any]  # "value" and "interval" (low, high) of a test metric; of a difference also facts
SAID = ("auroc", "accuracy", "balanced_accuracy", "macro_f1", "sensitivity", "specificity", "quadratic_kappa")
"""Scores beside the goal that the sentence about the outcome names where their difference is clear."""
MOST_SAID = 3
WORDS = {1: "better than", 0: "not distinguishable from", -1: "worse than"}


def direction(gain: Score, metric: str, mode: str = "") -> int:
    """What a paired difference says: 1 better, -1 worse, 0 neither, since its interval includes 0.

    Args:
        metric: its metric.
        mode: "max" or "min"; "": as usual for the metric.
    """
    low, high = gain["interval"]
    if low <= 0 <= high:
        return 0
    return 1 if (high < 0) == ((mode or mode_of(metric)) == "min") else -1


def num_runs(gain: Score) -> tuple[list[int], str]:
    """How many adapters of either side a difference is over, and what they differ in: "seeds" or "folds". No numbers in
    studies of earlier versions, which compared one adapter with another."""
    return (gain["num_folds"], "folds") if "num_folds" in gain else (gain.get("num_seeds", []), "seeds")


def is_of_settings(gain: Score) -> bool:
    """Whether a difference compares settings, not single adapters: over several seeds or folds on either side."""
    runs, _ = num_runs(gain)
    return bool(runs) and min(runs) > 1


def interval_text(gain: Score) -> str:
    """A difference and its interval, short."""
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(gain["value"], *gain["interval"])


def where(gain: Score, whole: Score | None) -> str:
    """The test images of a difference, as the beginning of a sentence. whole: as for `comparison_sentence`."""
    return f"On the {gain['num_samples']} test images without a copy in training" if whole else "On the test images"


def numbers(gain: Score, metric: str, whole: Score | None = None, scores: str = "") -> str:
    """A difference with its interval, and that of the whole test behind it.

    Args:
        whole: as for `comparison_sentence`.
        scores: what to say of the whole test before its difference.
    """
    low, high = gain["interval"]
    text = f"{metric} {gain['value']:+.3f} (95 % interval {low:+.3f} to {high:+.3f}, paired"
    if whole:
        low, high = whole["interval"]
        text += f"; all {whole['num_samples']} test images, copies included: {scores}{whole['value']:+.3f}, "
        text += f"{low:+.3f} to {high:+.3f}"
    return f"{text})"


def comparison_sentence(gain: Score, metric: str, mode: str = "", whole: Score | None = None) -> str:
    """Whether the winner beats the guide's defaults on the test.

    Args:
        gain: the paired difference, winner minus guide, with its interval; of the clean part if there is one.
        metric: its metric.
        mode: "max" or "min"; "": as usual for the metric.
        whole: the difference on all test images, if `gain` is of the clean part.
    """
    subject, over = "the winner is", ""
    if is_of_settings(gain):
        runs, what = num_runs(gain)
        subject = "the winner's settings are"
        over = f" over {runs[0]} {what} each" if runs[0] == runs[1] else f" over {runs[0]} and {runs[1]} {what}"
    word = WORDS[direction(gain, metric, mode)]
    return f"{where(gain, whole)} {subject} {word} the guide's defaults{over}: {numbers(gain, metric, whole)}."


def others_sentence(gains: Mapping[str, Score], metric: str, mode: str = "") -> str:
    """The largest differences of other scores whose interval excludes 0, in a sentence; "": there are none.

    Args:
        gains: paired differences by metric, of the same test images as that of the goal.
        metric: the goal, of which there is a sentence already.
        mode: of the goal, "max" or "min"; "": as usual.
    """
    prefix = metric.rpartition("/")[0]
    names = [f"{prefix}/{name}" if prefix else name for name in SAID]
    directions = {
        name: direction(gains[name], name)
        for name in names
        if name != metric and name in gains and gains[name]["interval"] and gains[name]["value"] is not None
    }
    clear = sorted((name for name in directions if directions[name]), key=lambda name: -abs(gains[name]["value"]))
    if not clear:
        return ""
    parts = [
        f"{name} is {'higher' if gains[name]['interval'][0] > 0 else 'lower'}: {interval_text(gains[name])}"
        for name in clear[:MOST_SAID]
    ]
    goal = direction(gains[metric], metric, mode)
    begin = "Also," if all(directions[name] == goal for name in clear[:MOST_SAID]) else "But"
    return f"{begin} {', and '.join(parts)}."


def adapters_sentence(gain: Score) -> str:
    """What a difference of two single adapters does not say; "" if it is of settings, or of an earlier version."""
    if not num_runs(gain)[0] or is_of_settings(gain):
        return ""
    return "This compares two adapters, not two settings: another seed may turn it (--confirm trains both again)."


def probe_sentence(
    gain: Score, ours: Score, probe: Score, metric: str, mode: str = "", whole: Score | None = None
) -> str:
    """That the winner does not beat a linear probe on the test; "" if it does.

    Args:
        gain: the paired difference, winner minus probe; of the clean part if there is one.
        ours: the winner's own score on the whole test.
        probe: the probe's.
        metric: the metric of all of them.
        mode: "max" or "min"; "": as usual for the metric.
        whole: the difference on all test images, if `gain` is of the clean part.
    """
    found = direction(gain, metric, mode)
    if found > 0:
        return ""
    runs, what = num_runs(gain)
    over = f", mean of {runs[0]} {what}" if runs and runs[0] > 1 else ""
    place = f"{where(gain, whole)} the" if whole else "The"
    verb = "is worse than" if found else "does not beat"
    scores = f"{ours['value']:.3f} against {probe['value']:.3f}"
    text = f"{place} tuned winner {verb} a linear probe on the base's frozen vision features: "
    if whole:
        return f"{text}winner minus probe{over}, {numbers(gain, metric, whole, f'{scores}, ')}."
    return f"{text}{metric} {scores}; winner minus probe{over}, {numbers(gain, metric)}."
