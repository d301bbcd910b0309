"""What happens to a trial that does not fit the memory."""

from __future__ import annotations

import json
from typing import Any

# The fine-tuning guide's advice, in its order.
OUT_OF_MEMORY_ADVICE = (
    "In this order: --use-qlora; --per-device-train-batch-size 1 --gradient-accumulation-steps 16; --lora-r 32; "
    "--gradient-checkpointing; --optim paged_adamw_8bit"
)
# Settings that decide, beside rank and dropout, how much memory a micro-batch takes.
MEMORY_SETTINGS = ("use_lora", "use_dora", "lora_target_modules", "train_projector", "gradient_checkpointing",
                   "torch_compile", "optim", "zero_stage", "offload_optimizer")  # fmt: skip


def takes_as_much(settings: dict[str, Any], known: dict[str, Any]) -> bool:
    """Whether a trial needs at least the memory of another one."""
    if settings.get("per_device_train_batch_size", 1) == 1:
        return False
    # A list where it has been in a file, else a tuple.
    alike = all(json.dumps(settings.get(name)) == json.dumps(known.get(name)) for name in MEMORY_SETTINGS)
    sizes = [
        (one["per_device_train_batch_size"], one.get("lora_r", 0), one.get("lora_dropout", 0.0) > 0)
        for one in (settings, known)
    ]
    return alike and all(own >= other for own, other in zip(*sizes, strict=True))


def halve(assignment: dict[str, Any], reason: str) -> None:
    """Half the micro-batch at the same global batch, with a note why."""
    settings = dict(assignment["settings"])
    micro = settings["per_device_train_batch_size"]
    settings["per_device_train_batch_size"] = micro // 2 if micro % 2 == 0 else 1
    settings["gradient_accumulation_steps"] *= micro // settings["per_device_train_batch_size"]
    note = f"{reason}: micro-batch {micro} -> {settings['per_device_train_batch_size']}, same global batch"
    assignment |= {"settings": settings, "notes": [*assignment.get("notes", []), note]}
