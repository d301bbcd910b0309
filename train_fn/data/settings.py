"""Settings of the data, each with its rule. A study has them all, and `train_fn.inspect` too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from train_fn.data.rows import COLUMN
from train_fn.data.tasks import MAX_ANSWERS, TaskRules
from train_fn.settings import MAX_SEED, PATH, ImageOptions, Range, TextRule, one_of

if TYPE_CHECKING:
    from train_fn.data.splitting import SplitRules

SEPARATOR = TextRule("a separator without letters or digits", lambda text: not any(map(str.isalnum, text)))


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The labelled images."""

    data: Annotated[str, PATH] = "phantoms"
    """JSON list or JSON Lines of {"image", "text", "answer", "label"}, of LLaVA conversations or of messages; CSV, TSV,
    parquet, a data set saved by `datasets`, a folder of images by class, or one of these on the Hugging Face hub
    (hf://OWNER/NAME[@REVISION][:FOLDER]). phantoms: generated ultrasound phantoms."""
    image_root: Annotated[str, PATH] = ""
    """Folder from which the manifest's image paths start. Not given: the manifest's own folder."""
    columns: Annotated[tuple[str, ...], COLUMN] = ()
    """Columns (or keys) of --data that have other than the usual names, such as question=text,answer=class; roles:
    image (of several images: image=a+b), question, answer, label, split (the part: train, validation or test), id,
    question_type, group, system (the system prompt)."""
    group_field: str = ""
    """Column (or key) of what may not be divided between the parts, such as patient_id: the same as --columns
    group=NAME. Not given: group, patient_id, subject_id, study_id or another usual name."""
    question: str = ""
    """What is asked about each image where the data has no questions, as in a folder of images by class. Not given:
    What does this image show?"""
    val_data: Annotated[str, PATH] = ""
    """Validation images, in any format of --data. Not given: its split of that name, or a stratified share."""
    test_data: Annotated[str, PATH] = ""
    """Test images, in any format of --data. Not given: its split of that name, or a stratified share."""
    val_fraction: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2
    """Share of --data for validation when neither --val-data nor a split of --data is given."""
    test_fraction: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2
    """Share of --data for the test when neither --test-data nor a split of --data is given."""
    contradictions: Annotated[str, one_of(("keep", "drop", "train"))] = "keep"
    """Near-copies with different answers: keep them, drop them (in no part), or train on them only."""
    copies_distance: Annotated[int, Range(-1, 16)] = 8
    """Bits (of 64) in which the perceptual hashes of near-copies may differ. -1: no image is a copy of another."""
    copies_correlation: Annotated[float, Range(0, 1)] = 0.65
    """Correlation of two images with near hashes, without what they share with similar images, at which they are
    near-copies. Higher: fewer; 1: equal images only."""
    max_image_pixels: Annotated[int, Range(1, 178_956_970)] = 50_000_000  # Pillow's own limit
    """Maximum pixels of an image, checked before it is decoded."""
    allow_flips: bool = False
    """Left and right do not matter for the answers: --augment may flip images from left to right. Never from top to
    bottom, because that is depth in ultrasound."""
    split_seed: Annotated[int, Range(0, MAX_SEED)] = 0
    """Seed of the split (and of the phantoms)."""
    positive_label: str = ""
    """Answer that counts as positive in sensitivity and specificity. Not given: Malignant; of two answers also
    abnormal, positive, present, yes or true."""
    max_answers: Annotated[int, Range(2, 1000)] = MAX_ANSWERS
    """Most answers of a closed set. Of more different answers the model writes its own, which are scored as text."""
    ordinal: tuple[str, ...] = ()
    """Answers that are grades, from the lowest to the highest, such as 1,2,3,4,5: quadratic kappa and mean error."""
    multilabel: Annotated[str, SEPARATOR] = ""
    """What stands between the labels of an answer, such as ";": sets of labels are scored, and each label."""
    numeric: bool = False
    """Answers that are numbers are measured values: mean absolute error and correlation instead of classes."""
    merge_variants: bool = False
    """Make answers equal that differ in case, spaces or Unicode form only: the most frequent form stays."""
    max_new_tokens: Annotated[int, Range(0, 32_768)] = 0
    """Most tokens of an answer that the model writes. 0: half as many again as the longest answer of the training part
    has."""
    num_phantoms: Annotated[int, Range(30, 100_000)] = 240
    """Images to generate for --data phantoms."""

    @property
    def all_columns(self) -> tuple[str, ...]:
        """`columns`, and the one of `group_field`."""
        return (*self.columns, *([f"group={self.group_field}"] if self.group_field else []))


def split_rules(data: DataSettings, images: ImageOptions) -> SplitRules:
    """How the data is divided. images: how they are read."""
    from train_fn.data.splitting import SplitRules

    return SplitRules(
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        seed=data.split_seed,
        contradictions=data.contradictions,
        copies_distance=data.copies_distance,
        copies_correlation=data.copies_correlation,
        images=images,
    )


def task_rules(data: DataSettings) -> TaskRules:
    """What the user says about the answers."""
    return TaskRules(
        max_answers=data.max_answers,
        ordinal=data.ordinal,
        multilabel=data.multilabel,
        numeric=data.numeric,
        merge_variants=data.merge_variants,
        positive=data.positive_label,
    )
