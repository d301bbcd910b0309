"""A linear probe: multinomial logistic regression on the frozen vision features of the base.

It shows what the images give without any tuning of the language model. Without torch: the study fits it in seconds.

Shapes: I images, F pooled features of an image, N samples, C candidates.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np

from train_fn.data.samples import Sample, Splits, Task
from train_fn.scoring.fitting import DECIDED
from train_fn.support.text import plain_form

MOST_TRAINED = 10_000  # training samples; more cost minutes and change a linear model little
FEWEST_OF_A_QUESTION = 20  # training samples that a question needs for a probe of its own
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C: a small one draws the weights towards 0
LEAST = 1e-12  # probability of a candidate that no training sample has
Predictions = dict[str, np.ndarray]


def probe_tasks(splits: Splits) -> list[Task]:
    """Tasks with a probe: those with one answer of a set."""
    return [task for task in splits.tasks if task.kind in DECIDED]


def probe_samples(splits: Splits) -> dict[str, list[int]]:
    """Indices of the samples that the probe is fitted on or answers, by part; of the training part a random choice."""
    names = {task.name for task in probe_tasks(splits)}
    found = {}
    for part in ("train", "validation", "test"):
        its = [index for index, sample in enumerate(getattr(splits, part)) if sample.task in names]
        if part == "train" and len(its) > MOST_TRAINED:
            its = sorted(np.random.default_rng(0).choice(its, MOST_TRAINED, replace=False).tolist())
        found[part] = its
    return found


def probe_images(splits: Splits) -> list[str]:
    """The different images of `probe_samples`, in the order of the rows of their features [I, F]."""
    chosen = probe_samples(splits)
    images = (image for part, its in chosen.items() for index in its for image in getattr(splits, part)[index].images)
    return list(dict.fromkeys(images))


def probe_predictions(features: np.ndarray, splits: Splits, class_balanced: bool) -> dict[str, Predictions]:
    """Fit the probe on the training part, and answer validation and test.

    The strength of the regularisation is the one with the smallest log-loss on validation.

    Args:
        features: of `probe_images` [I, F].
        class_balanced: whether each training sample weighs as in a class-balanced loss.

    Returns:
        By part: `scores`, log-probabilities [N, C] of all samples of the part, NaN for those without a probe; `losses`
        [N] are NaN, since the probe writes no tokens.

    Raises:
        ValueError: a feature is not finite.
    """
    if not np.isfinite(features).all():
        raise ValueError("the vision features must be finite, but some are not")
    rows = {image: row for row, image in enumerate(probe_images(splits))}
    chosen, width = probe_samples(splits), max(len(task.candidates) for task in splits.tasks)
    answers = {
        part: {"losses": np.full(size, np.nan), "scores": np.full((size, width), np.nan)}
        for part in ("validation", "test")
        if (size := len(getattr(splits, part)))
    }
    by_sample = np.array(splits.sample_weights() if class_balanced else [1.0] * len(splits.train))
    for task in probe_tasks(splits):
        members = {
            part: [index for index in its if getattr(splits, part)[index].task == task.name]
            for part, its in chosen.items()
        }
        samples = {part: [getattr(splits, part)[index] for index in its] for part, its in members.items()}
        pooled = {part: of_samples(features, rows, its) for part, its in samples.items()}
        by_class = np.array(splits.class_weights(task) if class_balanced else [1.0] * len(task.candidates))
        weights = {"train": by_sample[members["train"]]}
        weights["validation"] = by_class[[int(sample.label) for sample in samples["validation"]]]
        for part, scores in fit(samples, pooled, weights, len(by_class)).items():
            if members[part]:
                answers[part]["scores"][members[part], : len(task.candidates)] = scores
    return answers


def of_samples(features: np.ndarray, rows: dict[str, int], samples: Sequence[Sample]) -> np.ndarray:
    """Features of samples [N, F]: the mean over the images of each."""
    pooled = [features[[rows[image] for image in sample.images]].mean(0) for sample in samples]
    return np.array(pooled, dtype=float).reshape(len(samples), features.shape[1])


def fit(
    samples: dict[str, list[Sample]],
    pooled: dict[str, np.ndarray],
    weights: dict[str, np.ndarray],
    num_classes: int,
) -> dict[str, np.ndarray]:
    """Log-probabilities of one task's validation and test samples [N, C].

    A question with enough training samples has a probe of its own, since the features say nothing of the question. All
    others get that of the whole task.

    Args:
        samples: of the task, by part.
        pooled: their features [N, F], by part.
        weights: of each sample in the fit ("train") and in the choice of the strength ("validation") [N].
        num_classes: C.
    """
    labels = {part: np.array([sample.label for sample in its], dtype=int) for part, its in samples.items()}
    counts = Counter(plain_form(sample.question) for sample in samples["train"])
    own = {form for form, count in counts.items() if count >= FEWEST_OF_A_QUESTION}
    questions = {}
    for part, its in samples.items():
        forms = [plain_form(sample.question) for sample in its]
        questions[part] = np.array([form if form in own else "" for form in forms], dtype=object)
    best: dict[str, np.ndarray] = {}
    smallest = np.inf
    for strength in STRENGTHS if samples["validation"] else STRENGTHS[2:3]:
        found = {part: np.zeros((len(labels[part]), num_classes)) for part in ("validation", "test")}
        for question in dict.fromkeys(form for part in found for form in questions[part]):
            trained = (questions["train"] == question) | (not question)
            chosen = labels["train"][trained], weights["train"][trained]
            probe = Probe(pooled["train"][trained], *chosen, num_classes, strength)
            for part, scores in found.items():
                asked = questions[part] == question
                scores[asked] = probe(pooled[part][asked])
        truth = found["validation"][np.arange(len(labels["validation"])), labels["validation"]]
        loss = -float((truth * weights["validation"]).sum())
        if loss < smallest or not best:
            best, smallest = found, loss
    return best


class Probe:
    """A logistic regression on standardised features.

    Args:
        features: [N, F].
        labels: index of each true candidate [N].
        weights: of each sample [N].
        num_classes: C.
        strength: scikit-learn's C.
    """

    def __init__(
        self, features: np.ndarray, labels: np.ndarray, weights: np.ndarray, num_classes: int, strength: float
    ) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        self.classes, self.num_classes = np.unique(labels), num_classes
        self.scaler = StandardScaler().fit(features) if len(labels) else None
        self.model = None
        if len(self.classes) > 1:
            assert self.scaler
            self.model = LogisticRegression(C=strength, max_iter=1000)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                self.model.fit(self.scaler.transform(features), labels, sample_weight=weights)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Log-probabilities [N, C]."""
        found = np.full((len(features), self.num_classes), np.log(LEAST))
        if self.model and len(features):
            assert self.scaler
            found[:, self.classes] = np.maximum(
                self.model.predict_log_proba(self.scaler.transform(features)), np.log(LEAST)
            )
        else:
            found[:, self.classes] = 0.0  # the only answer of the training samples
        return found
