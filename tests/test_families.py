"""Other families of vision-language models through the same code: tiny random models with their own processors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import PeftModel
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from train_fn.data.images import read_image
from train_fn.data.phantoms import CLASSES, QUESTION
from train_fn.data.samples import Sample
from train_fn.model.base import Base, load_base
from train_fn.model.batches import answer_losses, collate, num_tokens, process
from train_fn.model.preflight import base_problems, text_problems
from train_fn.model.processors import image_only
from train_fn.model.prompts import answer_tail, end_tokens
from train_fn.scoring.evaluation import generate, score_candidates
from train_fn.settings import ModelSettings, TrialSettings
from train_fn.trial.adapter_files import load_adapter, save_adapter
from train_fn.trial.applied import TrialFailed
from train_fn.trial.engine import build_engine
from train_fn.trial.loop import run_trial
from train_fn.trial.lora import adapted
from train_fn.trial.memory import measure, patches_per_token
from train_fn.trial.scoring import score_adapter

ADAPTER = TrialSettings(num_train_epochs=6, lora_r=4, lora_alpha=8, learning_rate=1e-2, lora_dropout=0.0)
PROJECTOR = replace(ADAPTER, train_projector=True, lora_exclude_patterns=())
EVERY_PART = replace(PROJECTOR, train_vision="lora", projector_lora=True)
WIDTH = 32
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

# The published chat templates, reduced to one question with one image.
EACH_TURN = "{%- for message in messages -%}"
EACH_PART = "{%- for part in message['content'] -%}"
PARTS = (
    EACH_PART
    + "{%- if part['type'] == 'image' -%}{{- 'IMAGE' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}"
)
CHATML = (
    EACH_TURN
    + "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    + PARTS
    + "{{- '<|im_end|>\n' -}}{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
LLAVA = (  # ends no turn, and puts a space between the prompt and the answer
    EACH_TURN
    + "{{- message['role'].upper() + ': ' -}}"
    + PARTS
    + "{{- ' ' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
IDEFICS = (
    "<|im_start|>"
    + EACH_TURN
    + "{{- message['role'] | capitalize + (':' if message['content'][0]['type'] == 'image' else ': ') -}}"
    + PARTS
    + "{{- '<end_of_utterance>\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)
GEMMA = (  # writes the first token itself
    "{{- bos_token -}}"
    + EACH_TURN
    + "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' -}}"
    + PARTS
    + "{{- '<end_of_turn>\n' -}}{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)


def make_tokenizer(named: dict[str, str], others: tuple[str, ...], eos: str, begins: bool, spaced: bool) -> Any:
    """A word-level tokenizer with a family's special tokens: `named` ones, and `others` that have no role.

    Words carry the space before them. begins: a begin token is put first, as Llama and Gemma do. spaced: a space is
    put before every text, as Llama does.
    """
    splitter = pre_tokenizers.Split(Regex(r"\n|▁?[A-Za-z]+|▁?[^\s▁A-Za-z]|▁"), "isolated")
    spaces = [normalizers.Prepend("▁")] * spaced + [normalizers.Replace(" ", "▁")]
    normalizer = normalizers.Sequence(spaces)
    texts = [f"\n{QUESTION}", f" {QUESTION}", "\nWhat is this?", " What", *CLASSES, *(f" {c} mass" for c in CLASSES)]
    texts += ["user\nassistant\nmodel\n", "USER: ASSISTANT:", " ASSISTANT", "User: ", "Assistant:", " "]
    words = [piece for text in texts for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
    special = list(dict.fromkeys(["<unk>", "<s>", "<pad>", eos, *named.values(), *others]))
    vocabulary = {word: row for row, word in enumerate(dict.fromkeys(special + words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.Fuse()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if begins else None,
        pad_token="<pad>",
        eos_token=eos,
        unk_token="<unk>",
        extra_special_tokens=named,
        model_max_length=512,
    )


# ------------------------------------------------------------------------------------------------ the families


@dataclass(frozen=True)
class Family:
    """How to make a tiny model of one family.

    placeholder: what the chat template writes for an image. config: from the tokenizer's vocabulary to the model's
    configuration. num_alike: layers outside the language model that have the names of adapted ones. named, others, eos,
    begins, spaced: see `make_tokenizer`. parts: settings that name parts with unusual names. patches_per_token: the
    vision tower's for each image token. unused: the vision tower's layer whose output the model does not take.
    """

    model: str
    template: str
    placeholder: str
    named: dict[str, str]
    config: Callable[[dict[str, int]], dict[str, Any]]
    processor: str
    images: Any
    processor_options: dict[str, Any]
    num_alike: int
    patches_per_token: float
    others: tuple[str, ...] = ()
    eos: str = "<|im_end|>"
    begins: bool = False
    spaced: bool = False
    parts: dict[str, str] = field(default_factory=dict)
    unused: str = ""


MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, "vision_use_head": False}
QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "turn": "<|im_start|>"}
QWEN_OTHERS = ("<|vision_start|>", "<|vision_end|>")
IDEFICS_OTHERS = (
    "<fake_token_around_image>",
    "<global-img>",
    "<|im_start|>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)


def qwen_config(vision: dict[str, Any]) -> Callable[[dict[str, int]], dict[str, Any]]:
    shared = {"depth": 2, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "patch_size": 14}

    def config(rows: dict[str, int]) -> dict[str, Any]:
        return {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": shared | {"spatial_merge_size": 2, "out_hidden_size": WIDTH} | vision,
            "image_token_id": rows["<|image_pad|>"],
            "video_token_id": rows["<|video_pad|>"],
            "vision_start_token_id": rows["<|vision_start|>"],
            "vision_end_token_id": rows["<|vision_end|>"],
        }

    return config


def idefics_config(rows: dict[str, int]) -> dict[str, Any]:
    return {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"image_size": 32, "patch_size": 8},
        "image_token_id": rows["<image>"],
        "scale_factor": 2,
    }


def qwen(name: str, num_alike: int, **vision: Any) -> Family:
    return Family(
        model=f"{name}ForConditionalGeneration",
        template=CHATML,
        placeholder="<|vision_start|><|image_pad|><|vision_end|>",
        named=QWEN_TOKENS,
        others=QWEN_OTHERS,
        config=qwen_config(vision),
        processor=f"{name}Processor",
        images=Qwen2VLImageProcessorPil(
            patch_size=14, merge_size=2, size={"shortest_edge": 56 * 56, "longest_edge": 84 * 84}
        ),
        processor_options={},
        num_alike=num_alike,
        patches_per_token=4,
    )


def idefics(name: str, images: Any) -> Family:
    return Family(
        model=f"{name}ForConditionalGeneration",
        template=IDEFICS,
        placeholder="<image>",
        named={"image_token": "<image>"},
        others=IDEFICS_OTHERS,
        eos="<end_of_utterance>",
        config=idefics_config,
        processor=f"{name}Processor",
        images=images(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        processor_options={"image_seq_len": 4},
        num_alike=2 * 3,
        patches_per_token=4,
    )


FAMILIES = {
    "llava": Family(
        model="LlavaForConditionalGeneration",
        template=LLAVA,
        placeholder="<image>\n",
        named={"image_token": "<image>"},
        eos="</s>",
        begins=True,
        spaced=True,
        config=lambda rows: {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
            "image_token_index": rows["<image>"],
        },
        processor="LlavaProcessor",
        images=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        processor_options={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        num_alike=2 * 3,
        patches_per_token=1,
        unused="vision_tower.encoder.layers.1.",
    ),
    "llava_onevision": Family(
        model="LlavaOnevisionForConditionalGeneration",
        template=CHATML,
        placeholder="<image>\n",
        named={"image_token": "<image>", "video_token": "<video>", "turn": "<|im_start|>"},
        config=lambda rows: {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": SIGLIP,
            "image_token_index": rows["<image>"],
            "video_token_index": rows["<video>"],
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]],
        },
        processor="LlavaOnevisionProcessor",
        images=LlavaOnevisionImageProcessorPil(
            size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]]
        ),
        processor_options={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        num_alike=2 * 3,
        patches_per_token=10 / 11,
    ),
    "qwen2_5_vl": qwen("Qwen2_5_VL", num_alike=2 * 3, window_size=56, fullatt_block_indexes=[1]),
    "qwen3_vl": qwen("Qwen3VL", num_alike=0, num_position_embeddings=16, deepstack_visual_indexes=[0]),
    "idefics3": idefics("Idefics3", Idefics3ImageProcessorPil),
    "smolvlm": idefics("SmolVLM", SmolVLMImageProcessorPil),
    "gemma3": Family(
        model="Gemma3ForConditionalGeneration",
        template=GEMMA,
        placeholder="<start_of_image>",
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        others=("<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        begins=True,
        config=lambda rows: {
            "text_config": TEXT | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "boi_token_index": rows["<start_of_image>"],
            "eoi_token_index": rows["<end_of_image>"],
            "image_token_index": rows["<image_soft_token>"],
        },
        processor="Gemma3Processor",
        images=Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        processor_options={"image_seq_length": 4},
        num_alike=2 * 3,
        patches_per_token=4,
    ),
    "internvl": Family(
        model="InternVLForConditionalGeneration",
        template=CHATML,
        placeholder="<IMG_CONTEXT>\n",
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
            "turn": "<|im_start|>",
        },
        config=lambda rows: {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": VISION | {"image_size": [28, 28], "patch_size": [7, 7]},
            "image_token_id": rows["<IMG_CONTEXT>"],
            "image_seq_length": 4,
        },
        processor="InternVLProcessor",
        images=GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=4),
        processor_options={"image_seq_length": 4},
        num_alike=2 * 3,
        patches_per_token=4,
    ),
    # Its projector has a name of its own.
    "deepseek_vl": Family(
        model="DeepseekVLForConditionalGeneration",
        template=LLAVA,
        placeholder="<image_placeholder>",
        named={"image_token": "<image_placeholder>"},
        eos="</s>",
        begins=True,
        config=lambda rows: {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": SIGLIP,
            "image_token_id": rows["<image_placeholder>"],
        },
        processor="DeepseekVLProcessor",
        images=DeepseekVLImageProcessorPil(size={"height": 28, "width": 28}),
        processor_options={"num_image_tokens": 16},
        num_alike=2 * 3,
        patches_per_token=1,
        parts={"projector": "model.aligner"},
    ),
}


def save_family(family: Family, directory: Path) -> None:
    """Write a tiny random model and its processor in the format of `from_pretrained`."""
    tokenizer = make_tokenizer(family.named, family.others, family.eos, family.begins, family.spaced)
    options = dict(family.processor_options)
    if family.processor == "SmolVLMProcessor":
        options["video_processor"] = None  # has no default
    processor = image_only(getattr(transformers, family.processor))(
        image_processor=family.images,
        tokenizer=tokenizer,
        chat_template=family.template.replace("IMAGE", family.placeholder),
        **options,
    )
    config = family.config(processor.tokenizer.get_vocab())
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config["text_config"] = config["text_config"] | special | {"vocab_size": len(processor.tokenizer)}
    model_class = getattr(transformers, family.model)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config))
    with torch.no_grad():
        for parameter in model.parameters():  # some are initially zero, and no gradient flows through zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def base(family, tmp_path_factory) -> Base:
    """A family's tiny model, loaded as any other base."""
    if not dist.is_initialized():  # DeepSpeed needs a group
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    directory = tmp_path_factory.mktemp(family.model)
    with pytest.MonkeyPatch.context() as patch:
        # SmolVLM's processor asks for this package, which spells numbers in prompts of videos.
        patch.setattr(processing_smolvlm, "num2words", str)
        save_family(family, directory)
        return load_base(ModelSettings(model=str(directory), **family.parts), torch.device("cpu"))


@pytest.fixture(scope="module")
def few(splits):
    """A handful of phantoms of every class."""

    def first(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        return tuple(s for label in range(3) for s in [one for one in samples if one.label == label][:2])

    return replace(splits, train=first(splits.train) * 2, validation=first(splits.validation), test=())


@pytest.fixture(scope="module")
def unlike(splits, tmp_path_factory) -> list[Sample]:
    """Two samples that differ in the shape of the image, in the question and in the answer's length."""
    folder = tmp_path_factory.mktemp("unlike")
    whole = Image.open(splits.train[0].image).convert("RGB")
    whole.resize((96, 40)).save(folder / "wide.png")
    whole.resize((30, 30)).save(folder / "small.png")
    return [
        Sample((str(folder / "wide.png"),), QUESTION, "Benign", 1),
        Sample((str(folder / "small.png"),), "What is this?", "Malignant mass", 2),
    ]


def test_each_family_passes_the_checks_before_ray(base, few, monkeypatch) -> None:
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    assert base_problems(base.settings, ADAPTER, few) == []
    bad = replace(
        few, train=(*few.train, replace(few.train[0], question=f"{base.processor.image_token * 2} What is this?"))
    )
    (problem,) = base_problems(base.settings, replace(ADAPTER, lora_target_modules=("q_proj",)), bad)
    assert base.processor.image_token in problem


def weights(base: Base) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in base.model.named_parameters()}


def adapted_layers(base: Base) -> list[str]:
    """The language model's linear layers that an adapter goes on, by the models' common names."""
    linear = [name for name, module in base.model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in linear if name.rpartition(".")[2] in ADAPTER.lora_target_modules]


def expected_names(base: Base, settings: TrialSettings) -> set[str]:
    """Names, in the adapted model, of everything that is trained."""
    layers = [name for name in adapted_layers(base) if name.startswith(base.language_model + ".")]
    linear = [name for name, module in base.model.named_modules() if isinstance(module, torch.nn.Linear)]
    in_projector = [name for name in linear if name.startswith(base.projector + ".")]
    if settings.train_vision == "lora":
        layers += [n for n in linear if n.startswith(base.vision_tower + ".") and n not in in_projector]
    if settings.projector_lora:
        layers += in_projector
    names = {f"base_model.model.{name}.lora_{side}.default.weight" for name in layers for side in "AB"}
    if settings.train_projector and not settings.projector_lora:
        projector = base.model.get_submodule(base.projector)
        names |= {f"base_model.model.{base.projector}.{name}" for name, _ in projector.named_parameters()}
    return names


def every_part(base: Base) -> TrialSettings:
    """Adapters on every part. Gemma 3's projector has no linear layer and is trained in full."""
    return replace(EVERY_PART, projector_lora=base.model.config.model_type != "gemma3")


@torch.no_grad()
def own_logits(base: Base, sample: Sample, tail: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own logits [S, V] and the token ids [S] of a whole conversation, prepared by the processor alone."""
    image = {"type": "image", "image": read_image(sample.image)}
    turn = {"role": "user", "content": [image, {"type": "text", "text": sample.question}]}
    prompt = base.processor.apply_chat_template([turn], add_generation_prompt=True)
    begun = bool(base.processor.tokenizer.bos_token) and prompt.startswith(base.processor.tokenizer.bos_token)
    inputs = base.processor(
        images=[image["image"]], text=[prompt + tail], return_tensors="pt", add_special_tokens=not begun
    )
    return base.model(**inputs).logits[0], inputs["input_ids"][0]


def tail_text(base: Base, family: Family, answer: str) -> str:
    """The published template's text after the prompt, up to the end of the answer's turn."""
    ends = {LLAVA: "</s>", GEMMA: "<end_of_turn>", IDEFICS: "<end_of_utterance>", CHATML: "<|im_end|>"}
    return (" " if family.template in (LLAVA, IDEFICS) else "") + answer + ends[family.template]


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(
    "settings", [ADAPTER, PROJECTOR, EVERY_PART], ids=["adapter", "adapter and projector", "every part"]
)
def test_one_step_moves_exactly_what_is_trained(base, family, few, settings) -> None:
    settings = every_part(base) if settings is EVERY_PART else settings
    settings = replace(settings, gradient_accumulation_steps=1, warmup_ratio=0.0)
    alike = [name for name in adapted_layers(base) if not name.startswith(base.language_model + ".")]
    assert len(adapted_layers(base)) - len(alike) == 2 * 7
    assert len(alike) == family.num_alike, "the other parts' layers of the same names make this test"
    pristine, modules = weights(base), [name for name, _ in base.model.named_modules()]
    expected = expected_names(base, settings)
    with adapted(base, settings) as model:
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
        engine = build_engine(base, model, settings, torch.ones(3), 4, 1)
        engine.train()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        samples = few.train[:2]
        engine.backward(engine(collate(base, samples, True), torch.tensor([s.label for s in samples])))
        engine.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
        engine.destroy()
    # lora_A's gradient is lora_B's value, 0 before the first step: weight decay moves it all the same.
    # Without a gradient lora_B keeps its 0.
    unused = {name for name in expected if family.unused and family.unused in name and ".lora_B." in name}
    assert bool(unused) == bool(family.unused and settings.train_vision == "lora")
    assert moved == expected - unused
    assert modules == [name for name, _ in base.model.named_modules()]
    after = weights(base)
    assert pristine.keys() == after.keys() and all(torch.equal(pristine[name], after[name]) for name in pristine)


TRAINED = ("llava", "qwen2_5_vl", "gemma3")  # the others are trained with `-m slow`


@pytest.mark.parametrize(
    "family",
    [name if name in TRAINED else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
    indirect=True,
)
def test_loss_falls_and_the_saved_adapter_gives_its_scores(base, few, tmp_path) -> None:
    settings = replace(PROJECTOR, gradient_accumulation_steps=3)
    untouched = score_candidates(base, few.validation, few.candidates)
    reports: list[dict[str, Any]] = []
    run_trial(base, few, settings, lambda message: bool(reports.append(message)), output=tmp_path)
    losses = [report.metrics["train_loss"] for report in reports]
    assert losses[-1] < 0.7 * losses[0]
    saved = score_adapter(base, few, "validation", 4, tmp_path / "final_model")
    assert saved["losses"].mean() < 0.7 * -untouched.mean().item()
    assert torch.equal(score_candidates(base, few.validation, few.candidates), untouched)


def test_a_trained_projector_is_float32_in_a_bfloat16_base(base, family, few) -> None:
    settings = ModelSettings(model=base.model.name_or_path, dtype="bfloat16", **family.parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_smolvlm, "num2words", str)
        coarse = load_base(settings, torch.device("cpu"))
    wanted = answer_losses(base, collate(base, few.train[:2], with_answers=True))
    with adapted(coarse, PROJECTOR) as model:
        losses = answer_losses(coarse, collate(coarse, few.train[:2], with_answers=True))
        losses.mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected_names(coarse, PROJECTOR)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())
    assert losses.tolist() == pytest.approx(wanted.tolist(), abs=0.1)


def test_adapters_on_every_part_are_loaded_by_plain_peft(base, family, few, tmp_path) -> None:
    settings, samples = every_part(base), few.train[:2]
    with torch.no_grad(), adapted(base, settings) as model:
        torch.manual_seed(1)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.eval()
        wanted = answer_losses(base, collate(base, samples, with_answers=True))
        save_adapter(base, model, settings, tmp_path)
    with torch.no_grad(), load_adapter(base, tmp_path):
        assert torch.allclose(answer_losses(base, collate(base, samples, with_answers=True)), wanted, atol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_smolvlm, "num2words", str)
        fresh = load_base(base.settings, torch.device("cpu"))
    with torch.no_grad():
        untouched = answer_losses(fresh, collate(fresh, samples, with_answers=True))
        PeftModel.from_pretrained(fresh.model, tmp_path).eval()
        found = answer_losses(fresh, collate(fresh, samples, with_answers=True))
    assert torch.allclose(found, wanted, atol=1e-5)
    assert (found - untouched).abs().max() > 1e-3


def test_the_towers_activations_are_counted_and_can_be_checkpointed(base, family, monkeypatch) -> None:
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    assert patches_per_token(base) == pytest.approx(family.patches_per_token, rel=0.02)
    sizes = measure(base.settings, every_part(base), torch.float32)
    assert 0 < sizes.tower_checkpointed < sizes.tower


def test_a_projector_without_linear_layers_gets_no_adapter(base, family, few, monkeypatch) -> None:
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    if every_part(base).projector_lora:
        assert base_problems(base.settings, EVERY_PART, few) == []
        return
    with pytest.raises(
        TrialFailed, match=r"`projector_lora` must find linear layers, but the projector model.multi_mo"
    ):
        run_trial(base, few, EVERY_PART, lambda message: False)


# ------------------------------------------------------------------------------------------------ forward


def test_answer_losses_are_the_models_own(base, family, unlike) -> None:
    for sample in unlike:
        tail = tail_text(base, family, sample.answer)
        logits, ids = own_logits(base, sample, tail)
        wanted, _ = answer_tail(base, sample.prompt, sample.answer)
        assert "<unk>" not in base.processor.tokenizer.convert_ids_to_tokens(ids)
        assert ids[-len(wanted) :].tolist() == wanted
        assert len(wanted) == len(sample.answer.split()) + 1
        theirs = torch.nn.functional.cross_entropy(logits[-len(wanted) - 1 : -1].float(), ids[-len(wanted) :])
        batch = collate(base, [sample], with_answers=True)
        with torch.no_grad():
            assert answer_losses(base, batch).item() == pytest.approx(theirs.item(), abs=1e-4)
            labelled = base.model(**batch).loss
        assert labelled.item() == pytest.approx(theirs.item(), abs=1e-4)


@torch.no_grad()
def test_a_padded_batch_equals_its_samples(base, unlike) -> None:
    together = answer_losses(base, collate(base, unlike, with_answers=True))
    backwards = answer_losses(base, collate(base, unlike[::-1], with_answers=True))
    for row, sample in enumerate(unlike):
        alone = answer_losses(base, collate(base, [sample], with_answers=True)).item()
        assert together[row].item() == pytest.approx(alone, abs=1e-4)
        assert backwards[1 - row].item() == pytest.approx(alone, abs=1e-4)


def test_candidate_scores_equal_a_full_forward_pass(base, family, few, unlike) -> None:
    candidates = ["Normal", "Benign mass", "Malignant"]
    for samples in (few.validation[:2], unlike[:1]):
        fast = score_candidates(base, samples, candidates)
        for row, sample in enumerate(samples):
            for column, answer in enumerate(candidates):
                logits, ids = own_logits(base, sample, tail_text(base, family, answer))
                length = len(answer_tail(base, sample.prompt, answer)[0])
                likely = logits[-length - 1 : -1].float().log_softmax(-1)
                slow = likely.gather(1, ids[-length:, None]).sum()
                assert fast[row, column].item() == pytest.approx(slow.item(), abs=1e-4)


def test_the_prompt_is_the_processors_own(base, unlike) -> None:
    for sample in unlike:
        image = {"type": "image", "image": read_image(sample.image)}
        turn = {"role": "user", "content": [image, {"type": "text", "text": sample.question}]}
        theirs = base.processor.apply_chat_template(
            [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ours = collate(base, [sample], with_answers=False)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_number_of_tokens_is_near_the_batchs_own(base, unlike) -> None:
    """For the token budget of a micro-batch, without preparing an image."""
    for sample in unlike:
        length = collate(base, [sample], with_answers=True)["input_ids"].shape[1]
        with pytest.MonkeyPatch.context() as patch:
            if hasattr(base.processor, "_get_num_multimodal_tokens"):
                patch.delattr("train_fn.model.batches.process")
            assert num_tokens(base, sample) == pytest.approx(length, abs=6)
        assert not base.packs([length, length + 1])


# ------------------------------------------------------------------------------------------------ finding the parts


@pytest.fixture(scope="module")
def unusual(tmp_path_factory) -> Path:
    """A model whose projector has a name of its own."""
    directory = tmp_path_factory.mktemp("unusual")
    save_family(FAMILIES["deepseek_vl"], directory)
    return directory


def test_an_unknown_structure_is_refused_with_its_modules_and_the_setting(unusual) -> None:
    with pytest.raises(ValueError) as caught:
        load_base(ModelSettings(model=str(unusual)), torch.device("cpu"))
    told = str(caught.value)
    assert "projector of DeepseekVLForConditionalGeneration" in told and "model.multi_modal_projector" in told
    for module in ("model.vision_model", "model.aligner", "model.language_model", "lm_head"):
        assert module in told
    assert told.endswith("name it with --projector")


@pytest.mark.parametrize("part", ["vision_tower", "projector", "language_model"])
def test_a_part_that_does_not_exist_is_refused(unusual, part) -> None:
    parts = {"projector": "model.aligner"} | {part: "model.nowhere"}
    with pytest.raises(ValueError) as caught:
        load_base(ModelSettings(model=str(unusual), **parts), torch.device("cpu"))
    told = str(caught.value)
    assert "must be model.nowhere, but" in told and "model.aligner" in told
    assert f"give --{part.replace('_', '-')} the full name" in told


def test_named_parts_are_used(unusual) -> None:
    names = ("model.vision_model.encoder", "model.aligner", "model.language_model.layers.1")
    parts = dict(zip(("vision_tower", "projector", "language_model"), names, strict=True))
    base = load_base(ModelSettings(model=str(unusual), **parts), torch.device("cpu"))
    assert (base.vision_tower, base.projector, base.language_model) == names
    with adapted(base, replace(PROJECTOR, train_projector=False)) as model:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 7 * 2
    assert all(name.startswith("base_model.model.model.language_model.layers.1.") for name in trained)


# ------------------------------------------------------------------------------------------------ open answers, images


def test_generated_answers_are_the_models_own(base, unlike) -> None:
    ends = sorted(end_tokens(base.processor.tokenizer))
    for sample in unlike:
        inputs = process(base, sample)
        with torch.no_grad():
            whole = base.model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=ends)
        wanted = base.processor.tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert generate(base, [sample], 12) == [wanted.strip()]
        assert generate(base, [sample] * 3, 12) == [wanted.strip()] * 3


@pytest.mark.parametrize("placed", [False, True], ids=["images first", "images within the text"])
def test_several_images_with_an_earlier_turn(base, unlike, placed) -> None:
    """A conversation about two images has the loss of the model itself, on inputs that its processor alone has made."""
    images = [sample.image for sample in unlike]
    first = "Compare <image> with <image>." if placed else "Compare them."
    sample = Sample((*images,), "What is the second?", "Malignant mass", turns=((first, "unlike"),))
    assert text_problems(base.processor, [sample]) == []
    parts: list[dict[str, str]] = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare them."}]
    if placed:
        parts = [{"type": "text", "text": "Compare"}, {"type": "image"}, {"type": "text", "text": "with"}]
        parts += [{"type": "image"}, {"type": "text", "text": "."}]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "unlike"}]},
        {"role": "user", "content": [{"type": "text", "text": "What is the second?"}]},
    ]
    prompt = base.processor.apply_chat_template(turns, add_generation_prompt=True)
    bos = base.processor.tokenizer.bos_token
    inputs = base.processor(
        images=[[read_image(image) for image in images]],
        text=[prompt],
        return_tensors="pt",
        add_special_tokens=not (bool(bos) and prompt.startswith(bos)),
    )
    answer, _ = answer_tail(base, sample.prompt, sample.answer)
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    more = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in more:
            more[name] = torch.cat([more[name], torch.zeros(1, len(answer), dtype=more[name].dtype)], 1)
    with torch.no_grad():
        logits = base.model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0]
    own = torch.nn.functional.cross_entropy(logits[-len(answer) - 1 : -1].float(), torch.tensor(answer))
    other = unlike[0]
    with torch.no_grad():
        losses = answer_losses(base, collate(base, [other, sample, other], with_answers=True))
    assert losses[1].item() == pytest.approx(own.item(), abs=2e-4)
    assert losses[0].item() == pytest.approx(losses[2].item(), abs=1e-5)
