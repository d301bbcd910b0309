"""What `benchmarks/study.py` compares a study with: the same trials by other means, each in a process of its own.

    python benchmarks/alternatives.py {b,c,d} WORK.json

WORK.json holds {"splits": file, "trials": [settings], "numbers": [which of them], "folder": for what they leave}; in
its place comes a list of {"number", "metrics", "wall", ...}, seconds by phase.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(Path(__file__).resolve().parent))]


def documented_pattern(work: dict[str, Any]) -> list[dict[str, Any]]:
    """(b) The guide's settings, which are trial 0, as often as asked."""
    from benchmarks.lanes import run_documented

    found = run_documented(Path(work["folder"]), Path(work["splits"]), len(work["numbers"]), work["at_once"])
    seconds = {"wall": "time_total_s", "train": "train_s", "evaluation": "evaluation_s"}
    return [
        {"number": 0, "later": True, "metrics": {name: value for name, value in trial.items() if type(value) is float}}
        | {name: trial[key] for name, key in seconds.items()}
        for trial in found
    ]


def trainer_search(work: dict[str, Any]) -> list[dict[str, Any]]:
    """(c) As transformers' guide on hyperparameter search has it; projector by PEFT's `modules_to_save`."""
    import optuna
    import torch
    from peft import get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from train_fn.data.order import epoch_order
    from train_fn.data.splits_file import load_splits
    from train_fn.model.base import load_base
    from train_fn.model.batches import answer_losses, collate
    from train_fn.settings import ModelSettings, TrialSettings
    from train_fn.trial import loop
    from train_fn.trial.lora import lora_config, parameter_groups

    splits, trials = load_splits(Path(work["splits"])), [TrialSettings.from_dict(values) for values in work["trials"]]
    weights, guide = torch.tensor(splits.sample_weights()), TrialSettings(per_device_train_batch_size=2)
    numbers = {id(sample): index for index, sample in enumerate(splits.train)}
    num_steps = -(-len(splits.train) // guide.global_batch_size) * guide.num_train_epochs
    now: dict[str, Any] = {}  # the trial that is trained
    found: list[dict[str, Any]] = []

    def model_init(trial: Any) -> Any:
        number = trial.number if trial else 0  # Trainer's own start asks once without a trial
        base, settings = load_base(ModelSettings(), torch.device("cpu")), trials[number]
        torch.manual_seed(settings.seed)
        config = lora_config(base, settings)
        config.modules_to_save = [base.projector.rpartition(".")[2]] if settings.train_projector else None
        now.update(base=base, settings=settings)
        if trial:
            found.append({"number": number, "evaluation": 0.0, "start": time.perf_counter(), "later": number > 0})
        return get_peft_model(base.model, config)

    class Order(torch.utils.data.Sampler):
        epoch = 0

        def __iter__(self) -> Any:
            self.epoch += 1
            steps = epoch_order(len(splits.train), guide.global_batch_size, now["settings"].seed, self.epoch)
            return (batch.tolist() for step in steps for batch in step.reshape(-1, 2))

        def __len__(self) -> int:
            return num_steps // guide.num_train_epochs * guide.gradient_accumulation_steps

    class Seeded(TrainerCallback):
        def on_train_begin(self, *args: Any, **options: Any) -> None:
            loop.seed_everything(now["settings"].seed, 0)

    class StudyTrainer(Trainer):
        loss_is_scaled_for_ga = False

        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = torch.optim.AdamW(parameter_groups(now["base"], self.model, now["settings"]))
            return self.optimizer

        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            def batch(samples: list[Any]) -> dict[str, Any]:
                indices = torch.tensor([numbers[id(sample)] for sample in samples])
                return collate(now["base"], samples, with_answers=True) | {"indices": indices}

            own = torch.Generator()  # the loader draws a number per epoch; from torch's, dropout would change
            return torch.utils.data.DataLoader(splits.train, batch_sampler=Order(), collate_fn=batch, generator=own)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> torch.Tensor:
            indices = inputs.pop("indices")
            return (answer_losses(now["base"], inputs) * weights[indices]).mean()

        def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
            start = time.perf_counter()
            metrics = loop.evaluate(now["base"], splits, 16).metrics
            found[-1]["evaluation"] += time.perf_counter() - start
            found[-1] |= {"metrics": metrics, "wall": time.perf_counter() - found[-1]["start"]}
            told = {f"eval_{name}": value for name, value in metrics.items()}
            self.log(told)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, told)
            return told

    same = ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
            "lr_scheduler_type", "weight_decay", "max_grad_norm", "logging_steps", "seed")  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(Path(work["folder"]) / "trainer"),
        warmup_steps=round(guide.warmup_ratio * num_steps),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **{name: getattr(guide, name) for name in same},
    )
    trainer = StudyTrainer(model_init=model_init, args=arguments, eval_dataset=splits.validation, callbacks=[Seeded()])
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trials[trial.number].learning_rate},
        compute_objective=lambda metrics: metrics["eval_auroc"],
        n_trials=len(trials),
        direction="maximize",
        backend="optuna",
        pruner=optuna.pruners.NopPruner(),  # the default would end trials that the others train through
    )
    return found


def bare_loop(work: dict[str, Any]) -> list[dict[str, Any]]:
    """(d) The floor. Trials of one process share its base, and the batches, which all trials take in the same order."""
    import torch

    from train_fn.data.splits_file import load_splits
    from train_fn.model.base import load_base
    from train_fn.model.batches import image_features
    from train_fn.settings import ModelSettings, TrialSettings

    splits, base = load_splits(Path(work["splits"])), load_base(ModelSettings(), torch.device("cpu"))
    assert base.features
    base.features.on_disk = False
    for sample in (*splits.train, *splits.validation):
        image_features(base, sample.image)
    trials = {number: TrialSettings.from_dict(work["trials"][number]) for number in work["numbers"]}
    return bare_trials(base, splits, trials, Path(work["folder"]))


def bare_trials(base: Any, splits: Any, trials: dict[int, Any], folder: Path) -> list[dict[str, Any]]:
    """Train the trials one after another in plain PyTorch, each to its end, and write their weights into the folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import get_scheduler

    from train_fn.data.order import epoch_order
    from train_fn.model.batches import answer_losses, collate
    from train_fn.model.targets import adapter_pattern
    from train_fn.trial import loop
    from train_fn.trial.lora import parameter_groups

    class Adapted(torch.nn.Module):
        def __init__(self, frozen: torch.nn.Linear, settings: Any) -> None:
            super().__init__()
            self.frozen, self.dropout = frozen, torch.nn.Dropout(settings.lora_dropout)
            self.lora_A = torch.nn.Linear(frozen.in_features, settings.lora_r, bias=False)
            self.lora_B = torch.nn.Linear(settings.lora_r, frozen.out_features, bias=False)
            torch.nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
            torch.nn.init.zeros_(self.lora_B.weight)
            self.scaling = settings.lora_alpha / settings.lora_r

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.frozen(given) + self.lora_B(self.lora_A(self.dropout(given))) * self.scaling

    device = base.device
    weights = torch.tensor(splits.sample_weights(), device=device)
    pristine = dict(base.model.named_modules())

    @functools.cache
    def batch(*images: int) -> tuple[dict[str, Any], torch.Tensor]:
        samples = [splits.train[image] for image in images]
        return collate(base, samples, with_answers=True), weights[list(images)]

    found = []
    for turn, (number, settings) in enumerate(trials.items()):
        clock = loop.Clock()
        loop.seed_everything(settings.seed, 0)
        pattern = adapter_pattern(base, settings)
        adapted = [name for name in pristine if re.fullmatch(pattern, name)]
        for name in adapted:
            base.model.set_submodule(name, Adapted(pristine[name], settings).to(device))
        projector = {name: weight.clone() for name, weight in pristine[base.projector].state_dict().items()}
        pristine[base.projector].requires_grad_(settings.train_projector)
        groups = parameter_groups(base, base.model, settings)
        trained = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, fused=True)
        num_steps = -(-len(splits.train) // settings.global_batch_size) * settings.num_train_epochs
        schedule = get_scheduler("cosine", optimizer, round(settings.warmup_ratio * num_steps), num_steps)
        loop.seed_everything(settings.seed, 0)
        clock.lap("setup")
        for epoch in range(1, settings.num_train_epochs + 1):
            base.model.train()
            for step in epoch_order(len(splits.train), settings.global_batch_size, settings.seed, epoch):
                for images in step.reshape(-1, settings.per_device_train_batch_size or settings.global_batch_size):
                    inputs, weight = batch(*images.tolist())
                    loss = (answer_losses(base, inputs) * weight).sum() / settings.global_batch_size
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock.lap("warm-up" if epoch == 1 and device.type == "cuda" else "train")
            metrics = loop.evaluate(base, splits, 16).metrics
            clock.lap("evaluation")
        tensors = {name: p.detach().cpu() for name, p in base.model.named_parameters() if p.requires_grad}
        save_file(tensors, folder / f"{number}.safetensors")
        for name in adapted:
            base.model.set_submodule(name, pristine[name])
        pristine[base.projector].requires_grad_(False).load_state_dict(projector)
        clock.lap("checkpoint")
        told = {**clock.seconds(), "wall": sum(clock.seconds().values()), "metrics": metrics}
        found.append({**told, "number": number, "step": num_steps, "later": turn > 0})
    return found


if __name__ == "__main__":
    alternative = {"b": documented_pattern, "c": trainer_search, "d": bare_loop}[sys.argv[1]]
    work_file = Path(sys.argv[2])
    work_file.write_text(json.dumps(alternative(json.loads(work_file.read_text()))))
