"""Which servers take an adapter as it is, and what to do for the others: `python -m train_fn.predict --check-serving`.

The rules are those of the servers' source, read in the versions that `VLLM` and `SGLANG` name. Each reason ends with
the file that the rule was read in. No server is started, and no weights are read.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_fn.model.adapters import TENSOR, read_config, read_folder_json, read_shapes
from train_fn.model.checkpoint import resolve_model
from train_fn.model.hub_ids import is_hub_model, read_name
from train_fn.settings import ModelSettings
from train_fn.support.files import DamagedFile, read_json

VLLM, SGLANG = "vLLM 0.33.0", "SGLang 0.5.23"
AS_ADAPTER, MERGED = "takes it as an adapter", "takes it merged only"
HULUMED = "hulumed_"  # begins the `model_type` of Hulu-Med's own configuration
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # `MaxLoRARanks`, vllm/config/lora.py

# Classes of transformers that vLLM has a class of its own for, with LoRA (`SupportsLoRA`); True: also on vision tower
# and projector (`supports_tower_connector_lora`). vllm/model_executor/models/
VLLM_LORA = {
    "Gemma3ForConditionalGeneration": True,
    "Gemma4ForConditionalGeneration": True,
    "Glm4vForConditionalGeneration": True,
    "Idefics3ForConditionalGeneration": True,
    "InternVLForConditionalGeneration": False,
    "Lfm2VlForConditionalGeneration": True,
    "LlavaForConditionalGeneration": True,
    "LlavaNextForConditionalGeneration": True,
    "Mistral3ForConditionalGeneration": False,
    "PaliGemmaForConditionalGeneration": True,
    "Qwen2VLForConditionalGeneration": True,
    "Qwen2_5_VLForConditionalGeneration": True,
    "Qwen3VLForConditionalGeneration": True,
    "SmolVLMForConditionalGeneration": True,
}
# Those that vLLM has a class without LoRA for.
VLLM_WITHOUT_LORA = (
    "AriaForConditionalGeneration",
    "Cohere2VisionForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "PaddleOCRVLForConditionalGeneration",
)
# Those whose SGLang class names the layers that get LoRA (`should_apply_lora`): only those of the language model.
SGLANG_LORA = (
    "Ernie4_5_VLMoeForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "Gemma3nForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
)


@dataclass(frozen=True)
class Served:
    """What a server must know of an adapter, from its files."""

    architecture: str
    """The base's class, from its config.json."""
    hulumed: bool
    """Whether the base is in Hulu-Med's own layout, which no server reads."""
    r: int
    use_dora: bool
    use_rslora: bool
    full_modules: tuple[str, ...]
    """Modules that are saved in full: PEFT's `modules_to_save`."""
    listed: bool
    """Whether `target_modules` is a list. Adapters of earlier versions have a regular expression."""
    language: frozenset[str]
    """Last names of the adapted layers of the language model, such as q_proj."""
    others: bool
    """Whether layers outside the language model have LoRA: of vision tower or projector."""


@dataclass(frozen=True)
class Verdict:
    """What a server does with an adapter."""

    server: str
    takes: str = AS_ADAPTER
    reasons: list[str] = field(default_factory=list)
    """Why it does not take the adapter as it is."""
    options: list[str] = field(default_factory=list)
    """Of its command, for the adapter."""


def read_served(adapter: Path, base: Path) -> Served:
    """The facts about an adapter.

    Args:
        base: the base's folder.

    Raises:
        BadAdapter: a file of the adapter is missing or damaged.
        DamagedFile: the base's config.json is damaged.
        OSError: it is missing.
    """
    config = read_config(adapter)
    stored = read_folder_json(adapter, "adapter_config.json")
    layers = [match[1] for name in read_shapes(adapter, config) if (match := TENSOR.fullmatch(name))]
    base_config = read_json(base / "config.json", dict)
    language = frozenset(layer.rpartition(".")[2] for layer in layers if is_language(layer))
    full: Any = stored.get("modules_to_save") or ()
    return Served(
        architecture=str((base_config.get("architectures") or [""])[0]),
        hulumed=str(base_config.get("model_type", "")).startswith(HULUMED),
        r=config.r,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        full_modules=(full,) if isinstance(full, str) else tuple(full),
        listed=isinstance(stored["target_modules"], list),
        language=language,
        others=not all(map(is_language, layers)),
    )


def is_language(layer: str) -> bool:
    """Whether a layer's full name is one of the language model."""
    words = layer.split(".")
    return "language_model" in words or "text_model" in words or words[:2] == ["model", "layers"]


# ------------------------------------------------------------------------------------------------ the servers' rules


def check_vllm(served: Served) -> Verdict:
    """What vLLM does with an adapter."""
    native = served.architecture in VLLM_LORA
    reasons = shared_reasons(served, VLLM)
    if served.architecture in VLLM_WITHOUT_LORA:
        reasons.append(f"its class for {served.architecture} has no LoRA (vllm/model_executor/models/registry.py)")
    if served.full_modules:
        reasons.append(
            f"{', '.join(served.full_modules)} was trained in full, and vLLM refuses `modules_to_save`: train it with "
            "--projector-lora where vLLM has LoRA on the projector, or merge (vllm/lora/peft_helper.py)"
        )
    if served.use_dora:
        reasons.append("vLLM refuses DoRA (vllm/lora/peft_helper.py)")
    if served.r > LORA_RANKS[-1]:
        reasons.append(f"its rank {served.r} is above vLLM's largest, {LORA_RANKS[-1]} (vllm/config/lora.py)")
    if served.others and not VLLM_LORA.get(served.architecture, False):
        reasons.append(
            "vLLM has LoRA on vision tower and projector for some models only, and would leave out this one's without "
            "an error (vllm/lora/model_manager.py)"
        )
    if reasons:
        return Verdict(VLLM, MERGED, reasons)
    rank = next(rank for rank in LORA_RANKS if rank >= served.r)
    options = ["--enable-lora", "--max-lora-rank", str(rank)]
    options += ["--enable-tower-connector-lora"] * served.others
    return Verdict(VLLM, options=options + ["--model-impl", "transformers"] * (not native))


def check_sglang(served: Served) -> Verdict:
    """What SGLang does with an adapter."""
    reasons = shared_reasons(served, SGLANG)
    if not served.hulumed and served.architecture not in SGLANG_LORA:
        reasons.append(
            f"SGLang names no layers for LoRA in {served.architecture} (`should_apply_lora`), and "
            "its Transformers backend lacks the joined layers that LoRA is put on, such as qkv_proj "
            "(python/sglang/srt/lora/lora_manager.py)"
        )
    if not served.listed:
        reasons.append(
            "`target_modules` is a regular expression, which SGLang refuses; adapters of this version have a list "
            "(python/sglang/srt/lora/lora_manager.py)"
        )
    if served.full_modules:
        reasons.append(
            f"{', '.join(served.full_modules)} was trained in full, and SGLang would leave it out without an error "
            "(python/sglang/srt/lora/lora.py)"
        )
    if served.others:
        reasons.append(
            "SGLang has no LoRA on vision tower and projector, and would leave it out without an error "
            "(`should_apply_lora`, python/sglang/srt/models/)"
        )
    if served.use_dora:
        reasons.append("SGLang refuses DoRA (python/sglang/srt/lora/lora_manager.py)")
    if served.use_rslora:
        reasons.append(
            "SGLang scales rsLoRA as LoRA, which makes it too weak without an error (python/sglang/srt/lora/lora.py; "
            "sgl-project/sglang issue 40835)"
        )
    attention = served.language & {"q_proj", "k_proj", "v_proj"}
    if attention and not attention >= {"q_proj", "v_proj"}:
        reasons.append(
            "SGLang joins the adapters of q_proj, k_proj and v_proj, and needs those of q_proj and v_proj for that "
            "(`normalize_qkv_proj`, python/sglang/srt/lora/lora.py)"
        )
    if "up_proj" in served.language and "gate_proj" not in served.language:
        reasons.append(
            "SGLang joins the adapters of gate_proj and up_proj, and needs that of gate_proj for that "
            "(`normalize_gate_up_proj`, python/sglang/srt/lora/lora.py)"
        )
    return Verdict(SGLANG, MERGED, reasons) if reasons else Verdict(SGLANG, options=["--max-loras-per-batch", "1"])


def shared_reasons(served: Served, server: str) -> list[str]:
    """Reasons that hold for both servers."""
    if served.hulumed:
        return [f"{server} does not know Hulu-Med's own layout, which the adapter has: merge to transformers' layout"]
    return []


# ------------------------------------------------------------------------------------------------ for people


def serving_lines(adapter: Path, settings: ModelSettings, shown: str = "") -> list[str]:
    """A paragraph for each server: what it does with an adapter, why, and the commands.

    Args:
        settings: of the base that the adapter was trained on, or that replaces it.
        shown: the adapter's folder in the commands, if not `adapter`.

    Raises:
        BadAdapter: a file of the adapter is missing or damaged.
        DamagedFile: the base's config.json is, too. Its 8 GB of weights are not fetched for a check.
    """
    directory = resolve_model(settings.model)
    if not (directory / "config.json").is_file():
        raise DamagedFile(
            f"`--check-serving` must read the base's config.json, but {settings.model} is not on this machine: name "
            f"its folder with `--model`"
        )
    served = read_served(adapter, directory)
    base = read_name(settings.model).id if is_hub_model(settings.model) else str(directory)
    folder, size = shown or str(adapter), image_size(adapter, settings)
    return [paragraph(v, served, folder, base, size, settings) for v in (check_vllm(served), check_sglang(served))]


def paragraph(
    verdict: Verdict, served: Served, folder: str, base: str, size: dict[str, int], settings: ModelSettings
) -> str:
    """One server's paragraph. folder: of the adapter; size: see `image_size`."""
    lines = [f"{verdict.server} {verdict.takes}", *(f"- {reason}" for reason in verdict.reasons)]
    serve = ["vllm", "serve"] if verdict.server == VLLM else ["python", "-m", "sglang.launch_server", "--model-path"]
    if verdict.takes == AS_ADAPTER:
        files = ["--lora-modules" if verdict.server == VLLM else "--lora-paths", f"study={folder}"]
        # A server that loads the base's own processor would use larger images. A merged checkpoint holds the size.
        if verdict.server == VLLM:
            sized = ["--mm-processor-kwargs", json.dumps({"size": size})]
        else:
            sized = ["--mm-process-config", json.dumps({"image": {"size": size}})]
        command = [*serve, base, *verdict.options, *files, *revision(settings), *(sized if size else [])]
        lines += [f"  {shlex.join(command)}"]
    else:
        merge = ["python", "-m", "train_fn.predict", "--adapter", folder, "--merge-into", "MERGED"]
        merge += ["--merge-layout", "transformers"] * served.hulumed
        lines += [f"  {shlex.join(merge)}", f"  {shlex.join([*serve, 'MERGED'])}"]
    if served.hulumed and not settings.upright_images:
        lines.append(
            "- Hulu-Med's own image preparation swaps height and width, and servers do not: images that are not square "
            "get other answers than in the study. Train with --upright-images to serve it."
        )
    if settings.use_qlora:
        lines.append("- The base was in 4 bit in training. Served unquantised, answers differ a little.")
    return "\n".join(lines)


def revision(settings: ModelSettings) -> list[str]:
    """The option for the base's revision, which both servers call the same."""
    found = read_name(settings.model).revision if is_hub_model(settings.model) else ""
    return ["--revision", found] if found else []


def image_size(adapter: Path, settings: ModelSettings) -> dict[str, int]:
    """The limits of the training on an image's pixels; empty: the base's own."""
    if not settings.max_image_tokens:
        return {}
    return dict(read_json(adapter / "processor_config.json", dict)["image_processor"]["size"])
