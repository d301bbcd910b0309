"""Baselines that cost nothing: a linear probe on the vision features, the majority answer, the untuned base."""

from __future__ import annotations

import numpy as np
import pytest

from train_fn.data.decision import softmax
from train_fn.data.samples import Sample, Splits, Task, closed_set
from train_fn.scoring.probe import probe_images, probe_predictions, probe_samples

QUESTION = "What is it?"


def splits_of(sizes: tuple[int, int, int], num_classes: int = 3, question: str = QUESTION) -> Splits:
    """Parts of these sizes, with the classes in turn; each sample has one image."""
    parts = [
        tuple(Sample((f"{part}{n}.png",), question, "abc"[n % num_classes], n % num_classes) for n in range(size))
        for part, size in enumerate(sizes)
    ]
    return Splits(*parts, closed_set("abc"[:num_classes], "a"), decide="macro_f1")


def features_of(splits: Splits, strength: float, width: int = 8) -> np.ndarray:
    """Features of the probe's images: noise, and `strength` in the column of the class."""
    label = {image: int(sample.label) for sample in splits.samples for image in sample.images}
    images = probe_images(splits)
    features = np.random.default_rng(0).normal(size=(len(images), width)).astype(np.float32)
    features[np.arange(len(images)), [label[image] for image in images]] += strength
    return features


def auroc(predicted: dict[str, np.ndarray], samples: tuple[Sample, ...]) -> float:
    from sklearn.metrics import roc_auc_score

    labels = [sample.label for sample in samples]
    found = softmax(predicted["scores"])
    return float(roc_auc_score(labels, found if found.shape[1] > 2 else found[:, 1], multi_class="ovr"))


def test_a_probe_on_separable_features_is_perfect_and_on_noise_is_a_coin() -> None:
    splits = splits_of((90, 60, 300))
    found = probe_predictions(features_of(splits, 20.0), splits, True)
    assert auroc(found["test"], splits.test) == auroc(found["validation"], splits.validation) == 1.0
    assert (found["test"]["scores"].argmax(1) == [sample.label for sample in splits.test]).all()
    noise = probe_predictions(features_of(splits, 0.0), splits, True)
    assert 0.42 < auroc(noise["test"], splits.test) < 0.58
    # Validation has chosen the strongest regularisation: it trusts noise with nothing.
    assert np.abs(softmax(noise["test"]["scores"]) - 1 / 3).max() < 0.1
    assert np.isnan(found["test"]["losses"]).all()


def test_the_probe_is_scikit_learns_logistic_regression_with_the_studys_class_weights() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    parts = splits_of((90, 60, 300), 2)
    rare = tuple(sample for n, sample in enumerate(parts.train) if sample.label == 0 or n % 10 == 1)
    splits = Splits(rare, parts.validation, parts.test, parts.tasks)
    features = features_of(splits, 1.0)
    rows = {image: features[row] for row, image in enumerate(probe_images(splits))}
    train, test = (np.array([rows[s.image] for s in part], dtype=float) for part in (splits.train, splits.test))
    labels = np.array([sample.label for sample in splits.train])
    scaler = StandardScaler().fit(train)
    for balanced, weights in ((True, "balanced"), (False, None)):
        found = softmax(probe_predictions(features, splits, balanced)["test"]["scores"])
        closest = min(
            np.abs(
                LogisticRegression(C=strength, class_weight=weights, max_iter=1000)
                .fit(scaler.transform(train), labels)
                .predict_proba(scaler.transform(test))
                - found
            ).max()
            for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
        )
        assert closest < 1e-3


def test_each_question_with_enough_samples_has_a_probe_of_its_own() -> None:
    one, other = (splits_of((60, 60, 60), 2, question) for question in ("Is it a mass?", "Is it benign?"))

    def both(part: str) -> tuple[Sample, ...]:
        """The same images with the opposite answer to the second question."""
        flipped = [Sample(s.images, s.question, "ba"[int(s.label)], 1 - int(s.label)) for s in getattr(other, part)]
        return (*getattr(one, part), *flipped)

    splits = Splits(both("train"), both("validation"), both("test"), one.tasks)
    found = probe_predictions(features_of(one, 20.0), splits, True)
    assert auroc(found["test"], splits.test) == 1.0


def test_images_of_a_question_are_averaged_and_other_tasks_are_left_out() -> None:
    single = splits_of((60, 60, 60), 2)
    tasks = (Task("size", "binary", ("a", "b")), Task("report", "open"))

    def paired(part: str) -> tuple[Sample, ...]:
        """Each question has an image of noise as well; and one question is open."""
        its = [Sample((f"noise {s.image}", s.image), QUESTION, s.answer, s.label, task="size")
               for s in getattr(single, part)]  # fmt: skip
        return (Sample((f"other {part}.png",), "Describe it.", "a mass", task="report"), *its)

    splits = Splits(paired("train"), paired("validation"), paired("test"), tasks)
    images = probe_images(splits)
    assert len(images) == 360 and not any(image.startswith("other") for image in images)
    signal = dict(zip(probe_images(single), features_of(single, 40.0), strict=True))
    features = np.array([signal.get(image, np.zeros(8)) for image in images])
    found = probe_predictions(features, splits, True)["test"]
    assert probe_samples(splits)["test"] == list(range(1, 61))
    assert np.isnan(found["scores"][0]).all() and np.isfinite(found["scores"][1:]).all()
    assert auroc({"scores": found["scores"][1:]}, splits.test[1:]) == 1.0


def test_answers_that_training_lacks_and_features_that_are_not_finite() -> None:
    parts = splits_of((90, 60, 60))
    splits = Splits(tuple(s for s in parts.train if s.label != 2), parts.validation, parts.test, parts.tasks)
    found = softmax(probe_predictions(features_of(splits, 20.0), splits, True)["test"]["scores"])
    assert found[:, 2].max() < 1e-9 and np.isfinite(found).all()
    only = Splits(tuple(s for s in parts.train if s.label == 1), parts.validation, parts.test, parts.tasks)
    found = softmax(probe_predictions(features_of(only, 20.0), only, True)["test"]["scores"])
    assert found[:, 1].min() > 1 - 1e-9
    features = features_of(parts, 1.0)
    features[0, 0] = np.inf
    with pytest.raises(ValueError, match="must be finite"):
        probe_predictions(features, parts, True)


def test_training_samples_of_the_probe_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr("train_fn.scoring.probe.MOST_TRAINED", 30)
    splits = splits_of((90, 60, 60))
    chosen = probe_samples(splits)
    assert len(chosen["train"]) == 30 and chosen["train"] == sorted(set(chosen["train"]))
    assert chosen["test"] == list(range(60)) and len(probe_images(splits)) == 150
    assert auroc(probe_predictions(features_of(splits, 20.0), splits, True)["test"], splits.test) == 1.0


# ------------------------------------------------------------------------------------------------ from the workers


def test_workers_send_the_base_without_an_adapter_and_pooled_features(base, splits) -> None:
    from train_fn.model.batches import image_features
    from train_fn.scoring.evaluation import predict
    from train_fn.trial.scoring import baselines

    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    untuned, features = baselines(base, splits, 16)
    assert untuned.keys() == {"validation", "test"}
    assert np.array_equal(untuned["test"]["scores"], predict(base, splits.test, splits, 16)["scores"])
    images = probe_images(splits)
    assert features is not None and features.shape == (60, 2 * base.model.config.vision_config.hidden_size)
    assert features.dtype == np.float32
    patches = image_features(base, images[7]).double().numpy()  # [P, D]
    assert features[7] == pytest.approx(np.concatenate([patches.mean(0), patches.std(0)]), abs=1e-4)
    assert all(before[name].equal(parameter) for name, parameter in base.model.named_parameters())
    assert np.isfinite(probe_predictions(features, splits, True)["test"]["scores"]).all()


def test_workers_share_the_images(base, splits, monkeypatch) -> None:
    from train_fn.trial import scoring

    images = probe_images(splits)[:5]
    whole = scoring.pooled_features(base, images)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(scoring, "world", lambda rank=rank: (rank, 3))
        monkeypatch.setattr(scoring, "gather", lambda share: shares.append(share) or [share] * 0)
        scoring.pooled_features(base, images)
    assert [len(share) for share in shares] == [2, 2, 1]
    monkeypatch.setattr(scoring, "gather", lambda share: shares)
    assert np.array_equal(scoring.pooled_features(base, images), whole)


def test_a_base_whose_features_are_not_kept_by_image_sends_none(base, splits, monkeypatch) -> None:
    from train_fn.model.base import Base
    from train_fn.trial.scoring import baselines

    monkeypatch.setattr(Base, "takes_features", False)
    monkeypatch.setattr("train_fn.trial.scoring.predict", lambda *args: {})
    assert baselines(base, splits, 16)[1] is None
