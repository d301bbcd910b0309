"""Checks before Ray starts for faults that would fail every trial. Loads no weights.

Checked are the base's files, its processor, the study's words and images in that processor, and the modules that get
an adapter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_fn.data.images import image_size
from train_fn.data.samples import PLACEHOLDER, Prompt, Sample, Splits
from train_fn.model.checkpoint import file_problems, resolve_model
from train_fn.model.words import cut_warning, early_ends, token_ids, unknown_warning
from train_fn.settings import SHOWN, ModelSettings, TrialSettings
from train_fn.support.text import shorten

if TYPE_CHECKING:
    from train_fn.model.base import Base

# Placeholders for the image in formats of training data. Here the chat template of the model inserts it.
PLACEHOLDERS = ("<image>", "<video>", "<audio>", "<img>", "</img>", "<|image|>", "<|image_pad|>", "<|video_pad|>",
                "<|vision_start|>", "<|vision_end|>", "<image_soft_token>", "<start_of_image>", "<end_of_image>",
                "<IMG_CONTEXT>", "<image_placeholder>", "<ImageHere>", "[IMG]", "<im_patch>")  # fmt: skip
MAX_RENDERED = 1000  # different questions that are rendered; there may be a million


def base_problems(
    settings: ModelSettings, trial: TrialSettings, splits: Splits, log: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Every reason why no trial on this base can be trained with this data.

    It takes 4 s, 3 s of them for the import of transformers. A fault that is noticed here costs no start of Ray and of
    every lane, and no failed trials.

    Args:
        log: called with each warning about words, which is no reason.
    """
    if problems := file_problems(resolve_model(settings.model)):
        return [f"`--model` {settings.model!r}: {problem}" for problem in problems]
    try:
        processor = checked_processor(settings)
    except ValueError as error:
        return [str(error)]
    problems = text_problems(processor, splits.samples, [task.candidates for task in splits.tasks])
    if not problems:
        for warning in text_warnings(processor, splits.samples):
            log(warning)
    # Images are processed with questions.
    images = [] if problems else processed_image_problems(processor, splits.samples, settings)
    return [*problems, *images, *skeleton_problems(settings, trial, processor)]


def checked_processor(settings: ModelSettings) -> Any:
    """The base's processor. Raises ValueError if it does not load."""
    from train_fn.model.processors import load_processor

    try:
        return load_processor(resolve_model(settings.model), settings)
    except Exception as error:  # tokenizers and processors raise anything for files that they cannot use
        raise ValueError(
            f"`--model` {settings.model!r} must have a tokenizer and a processor that load, but {one_line(error)}: "
            f"fetch the model again"
        ) from error


def one_line(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def skeleton_problems(settings: ModelSettings, trial: TrialSettings, processor: Any) -> list[str]:
    """Parts and target modules that the model lacks, checked on torch's meta device."""
    import torch
    from transformers.utils import logging

    from train_fn.model.base import Base, find_parts, load_model
    from train_fn.model.targets import target_problems

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        model = load_model(resolve_model(settings.model), device_map={"": "meta"})
    except Exception as error:  # a configuration may hold anything, and transformers raises anything for it
        name = f"`--model` {settings.model!r}"
        return [f"{name} must be a model that transformers can load, but {one_line(error)}: fetch the model again"]
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    try:
        parts = find_parts(model, settings)
    except ValueError as error:
        return str(error).splitlines()
    base = Base(model=model, processor=processor, device=torch.device("meta"), settings=settings, **parts)
    return target_problems(base, trial)


# ------------------------------------------------------------------------------------------------ words


def text_problems(processor: Any, samples: Iterable[Sample], candidates: Iterable[Sequence[str]] = ()) -> list[str]:
    """Every question and answer that this processor cannot present to the model.

    Args:
        samples: may repeat a text, and may lack answers.
        candidates: sets of answers between which the model chooses; those of one set must differ in tokens.
    """
    sets = list(dict.fromkeys(tuple(answers) for answers in candidates if answers))
    prompts, asked, answered = counted_texts(samples)
    for answer in {answer for answers in sets for answer in answers} - answered.keys():
        answered[answer] = 1
    problems = placeholder_problems(processor, asked, "question") + placeholder_problems(processor, answered, "answer")
    return shorten(problems) or rendering_problems(processor, list(prompts), list(answered), sets)


def text_warnings(processor: Any, samples: Iterable[Sample]) -> list[str]:
    """Facts about words that the model reads only in part, though it can be trained with them."""
    from train_fn.model.prompts import end_tokens

    _, asked, answered = counted_texts(samples)
    tokenizer = processor.tokenizer
    return [
        *unknown_warning(tokenizer, asked, "questions"),
        *unknown_warning(tokenizer, answered, "answers"),
        *cut_warning(tokenizer, answered, end_tokens(tokenizer)),
    ]


def counted_texts(samples: Iterable[Sample]) -> tuple[dict[Prompt, None], Counter[str], Counter[str]]:
    """The different prompts of samples, and how often each text of a prompt and each answer occurs."""
    prompts: dict[Prompt, None] = {}
    asked: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    for sample in samples:
        prompts[sample.prompt] = None
        asked.update(words_of(sample.prompt))
        if sample.answer:
            answered[sample.answer] += 1
    return prompts, asked, answered


def unreadable_prompts(processor: Any, samples: Sequence[Sample]) -> dict[Prompt, str]:
    """The problem of each prompt that this processor cannot present to the model. The samples have no answers."""
    found: dict[Prompt, str] = {}
    waiting = [samples[start : start + MAX_RENDERED] for start in range(0, len(samples), MAX_RENDERED)]
    while waiting:
        some = waiting.pop()
        if not (problems := text_problems(processor, some)):
            continue
        if len(some) == 1:
            found[some[0].prompt] = "; ".join(problems)
        else:
            waiting += [some[: len(some) // 2], some[len(some) // 2 :]]
    return found


def written(prompt: Prompt) -> list[str]:
    """All texts that a template must write."""
    return [*filter(None, [prompt.system]), *(text for turn in prompt.turns for text in turn), prompt.question]


def words_of(prompt: Prompt) -> list[str]:
    """The texts of a prompt that must be plain: without the placeholders of its own images."""
    texts = [*(question for question, _ in prompt.turns), prompt.question]
    if sum(text.count(PLACEHOLDER) for text in texts) == prompt.num_images:
        texts = [text.replace(PLACEHOLDER, " ") for text in texts]
    return [*texts, *(answer for _, answer in prompt.turns), *filter(None, [prompt.system])]


def placeholder_problems(processor: Any, texts: Counter[str], what: str) -> list[str]:
    """Every text with one of the model's special tokens, or with a placeholder for the image."""
    tokenizer = processor.tokenizer
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {*tokenizer.all_special_tokens, *PLACEHOLDERS, getattr(processor, "image_token", None) or "<image>"}
    pattern = re.compile("|".join(sorted(map(re.escape, filter(str.strip, special)), key=len, reverse=True)))
    return [
        f"each {what} must be plain text, but {SHOWN.repr(text)} ({count}x) holds {match[0]!r}: take it out (the "
        f"model's chat template puts the image)"
        for text, count in texts.items()
        if (match := pattern.search(text))
    ]


def rendering_problems(
    processor: Any, prompts: Sequence[Prompt], answers: Sequence[str], sets: Sequence[Sequence[str]]
) -> list[str]:
    """Faults of the chat template, and words that the tokenizer does not know, ends too early or, within one of `sets`,
    does not distinguish."""
    from train_fn.model.prompts import end_tokens, prompt_text, tokenize_answer

    tokenizer = processor.tokenizer
    asked, answered = prompts[:MAX_RENDERED], answers[:MAX_RENDERED]
    try:
        for prompt in asked:
            text = prompt_text(processor, prompt)
            pieces = [piece.strip() for words in written(prompt) for piece in words.split(PLACEHOLDER)]
            if lost := next((piece for piece in pieces if piece not in text), None):
                return [
                    f"the model's chat template must write the question, but leaves out {SHOWN.repr(lost)}: give the "
                    f"folder a chat_template.jinja for questions with an image"
                ]
            num_images = text.count(processor.image_token) if getattr(processor, "image_token", None) else 1
            if num_images != prompt.num_images and prompt.num_images > 1:
                return [
                    f"the model's chat template must write a placeholder for each of {prompt.num_images} images, but "
                    f"writes {num_images}: use a base for several images, or questions about one"
                ]
        # The tokens of each answer that are scored, without its end token.
        scored = {text: tuple(tokenize_answer(processor, asked[0], text)[0][:-1]) for text in answered}
        questions = dict.fromkeys(prompt.question.replace(PLACEHOLDER, " ") for prompt in asked)
        read = dict(zip(questions, map(tuple, token_ids(tokenizer, questions)), strict=True))
        early = early_ends(tokenizer, answered, end_tokens(tokenizer))
    except Exception as error:  # a template is a program, and raises anything
        return [
            f"the model's chat template must render a question with an image, but {one_line(error)}: fetch the "
            f"model again, or give its folder a chat_template.jinja"
        ]
    unknown = tokenizer.unk_token_id
    problems = [
        f"each {what} must hold words that the model's tokenizer knows, but it knows none of {SHOWN.repr(text)}: write "
        f"it in a language of the model"
        for what, tokens in (("answer", scored), ("question", read))
        for text, ids in tokens.items()
        if set(ids) <= {unknown}
    ]
    problems += [
        f"each answer must reach the model whole, but {SHOWN.repr(text)} ends at {SHOWN.repr(token)}, a special token "
        f"of its tokenizer: take it out"
        for text, (_, token, is_unknown) in early.items()
        if not is_unknown
    ]
    for answers in sets:
        alike: dict[tuple[int, ...], list[str]] = {}
        for text in answers:
            if text in scored and not set(scored[text]) <= {unknown}:
                alike.setdefault(scored[text], []).append(text)
        problems += [
            f"each answer must differ from the others for the model, but its tokenizer makes the same tokens of "
            f"{' and '.join(map(SHOWN.repr, same))}{why_alike(same, early)}: use words that it knows"
            for same in alike.values()
            if len(same) > 1
        ]
    return shorten(list(dict.fromkeys(problems)))


def why_alike(answers: Sequence[str], early: dict[str, tuple[str, str, bool]]) -> str:
    """The words at which answers with the same tokens end, if there are any; `early`: of `early_ends`."""
    words = list(dict.fromkeys(early[answer][1] for answer in answers if answer in early))
    return f" (they end at unknown words: {', '.join(map(SHOWN.repr, words[:5]))})" if words else ""


# ------------------------------------------------------------------------------------------------ images


def processed_image_problems(processor: Any, samples: Sequence[Sample], settings: ModelSettings) -> list[str]:
    """Images that the processor refuses.

    Where the processor can count the patches of a size, it does so for every size among the images. Then it gets the
    largest, the smallest and the most elongated image, and after each that it refuses the next in that order.
    """
    from types import SimpleNamespace

    from train_fn.model.batches import process

    base: Base = SimpleNamespace(processor=processor, settings=settings)  # type: ignore[assignment]  # for `process`
    by_size: dict[tuple[int, int], dict[str, Sample]] = {}
    for sample in samples:
        for path in sample.images:
            images = by_size.setdefault(image_size(path, settings.image_options), {})
            question = sample.question.replace(PLACEHOLDER, " ")
            images.setdefault(path, replace(sample, images=(path,), question=question, turns=()))

    def refusal(size: tuple[int, int]) -> str:
        try:
            process(base, next(iter(by_size[size].values())))
        except Exception as error:  # processors raise anything for images that they refuse
            return one_line(error)
        return ""

    refused = uncountable_sizes(processor.image_processor, by_size)
    if refused and not refusal(next(iter(refused))):  # it takes what it cannot count: then counting shows nothing
        refused = {}
    orders: tuple[Callable[[tuple[int, int]], float], ...] = (
        lambda size: -size[0] * size[1],
        lambda size: min(size),
        lambda size: -max(size) / min(size),
    )
    for order in orders:
        for size in sorted(by_size, key=order):
            if size not in refused:
                if not (error := refusal(size)):
                    break
                refused[size] = error
    return shorten([
        f"image {Path(image)} ({size[0]} x {size[1]}) must be accepted by the model's processor, but that raises "
        f"{error}: change it or take its entry out"
        for size, error in refused.items()
        for image in by_size[size]
    ])  # fmt: skip


def uncountable_sizes(image_processor: Any, sizes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """The error for each size (width, height) whose patches the processor, if it can count, cannot count."""
    errors: dict[tuple[int, int], str] = {}
    if not (count := getattr(image_processor, "get_number_of_image_patches", None)):
        return errors
    for width, height in sizes:
        try:
            if count(height, width) < 1:
                errors[width, height] = "ValueError: the image has no patches"
        except Exception as error:  # as for `process`
            errors[width, height] = one_line(error)
    return errors
