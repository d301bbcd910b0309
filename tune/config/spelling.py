"""What an unknown option stands for: the names of other tools, and near spellings."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from train_fn.settings import flag

LEAST_RATIO = 0.8  # of difflib, from which a name is a misspelling of another
MOST_SHOWN = 3  # options that a hint names
FIX_BATCH = (
    "--gradient-accumulation-steps N gives a global batch of 2 x N images, and the micro-batch follows from the memory "
    "(--per-device-train-batch-size sets it)"
)
FIX_ONE_WORKER = "give --workers-per-trial for the workers of one trial, --lanes for trials side by side"
FIX_EPOCHS = "each epoch is evaluated and the best one is kept (--select), so leave it out"
FIX_LENGTH = "no sample is cut, so leave it out; --max-image-tokens makes images smaller"
FIX_ADAPTER = "python -m train_fn.predict takes it"

# Names of Hugging Face (transformers, PEFT, TRL), Optuna, Ray Tune and other training scripts, by the setting that they
# stand for.
SAME: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr", "base_lr", "max_lr", "peak_lr", "lora_lr"),
    "projector_learning_rate": ("mm_projector_lr", "projector_lr", "merger_lr"),
    "vision_learning_rate": ("vision_lr", "vision_tower_lr"),
    "lr_scheduler_type": ("lr_scheduler", "lr_schedule", "schedule"),
    "warmup_ratio": ("warmup", "warmup_steps", "warmup_proportion"),
    "weight_decay": ("wd", "decay"),
    "max_grad_norm": ("grad_clip", "gradient_clipping", "clip_grad_norm", "max_norm"),
    "optim": ("optimizer",),
    "num_train_epochs": ("epochs", "num_epochs", "n_epochs", "max_epochs", "train_epochs"),
    "max_steps": ("steps", "num_steps", "max_train_steps", "num_train_steps", "total_steps"),
    "gradient_accumulation_steps": ("accumulation", "accumulation_steps", "grad_accum", "accumulate_grad_batches"),
    "per_device_train_batch_size": ("micro_batch_size", "per_gpu_train_batch_size", "train_micro_batch_size_per_gpu"),
    "per_device_eval_batch_size": ("eval_batch_size", "per_gpu_eval_batch_size", "val_batch_size"),
    "gradient_checkpointing": ("activation_checkpointing", "grad_checkpointing", "use_gradient_checkpointing"),
    "torch_compile": ("compile",),
    "lora_r": ("r", "rank", "lora_rank", "lora_dim"),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "lora_target_modules": ("target_modules", "lora_modules", "lora_target"),
    "lora_exclude_patterns": ("exclude_modules",),
    "use_rslora": ("rslora",),
    "use_dora": ("dora",),
    "use_qlora": ("qlora", "load_in_4bit", "quantization_bit", "bits", "quantize", "use_4bit"),
    "train_projector": ("tune_mm_mlp_adapter", "tune_mm_mlp", "modules_to_save", "tune_projector"),
    "train_vision": ("tune_mm_vision", "vision_lora", "unfreeze_vision", "tune_vision"),
    "zero_stage": ("deepspeed", "stage", "zero"),
    "offload_optimizer": ("offload", "cpu_offload"),
    "dtype": ("torch_dtype", "precision", "mixed_precision", "half_precision_backend"),
    "class_balanced_loss": ("class_weights", "class_weight", "balanced"),
    "augment": ("augmentation", "data_augmentation"),
    "seed": ("random_seed", "random_state"),
    "split_seed": ("data_seed",),
    "trials": ("num_trials", "n_trials", "max_trials", "num_samples", "n_iter", "max_evals"),
    "time_budget": ("timeout", "time_budget_s", "max_time", "time_limit"),
    "space": ("search_space", "param_space", "config"),
    "scheduler": ("pruner", "early_stopping"),
    "metric": ("metric_for_best_model", "objective", "direction", "monitor", "greater_is_better"),
    "select": ("load_best_model_at_end", "save_best"),
    "workers_per_trial": ("nproc_per_node", "num_processes", "world_size", "gpus_per_trial", "tensor_parallel_size"),
    "lanes": ("n_jobs", "max_concurrent_trials", "max_concurrent", "parallel", "jobs"),
    "results": ("output_dir", "output", "out", "out_dir", "save_dir", "log_dir", "storage_path", "results_dir"),
    "name": ("study_name", "run_name", "project", "exp_name"),
    "experiment": ("experiment_name",),
    "mlflow_uri": ("tracking_uri", "mlflow_tracking_uri", "backend_store_uri"),
    "resume": ("resume_from_checkpoint", "continue", "restore"),
    "show": ("status", "list", "summary"),
    "doctor": ("dry_run", "check"),
    "model": ("model_name_or_path", "model_name", "model_path", "model_id", "base_model", "pretrained", "checkpoint"),
    "data": ("dataset", "dataset_name", "dataset_path", "data_path", "data_dir", "data_file", "train_file",
             "train_data", "manifest"),
    "val_data": ("validation_file", "validation_data", "eval_data", "eval_file", "val_file", "val_path"),
    "test_data": ("test_file", "test_path"),
    "val_fraction": ("val_split", "val_size", "validation_split", "validation_split_percentage"),
    "test_fraction": ("test_split", "test_size"),
    "image_root": ("image_folder", "image_dir", "images", "image_path", "media_dir"),
    "columns": ("image_column", "text_column", "label_column", "dataset_text_field"),
    "group_field": ("group", "group_column", "patient_id"),
    "positive_label": ("pos_label", "positive_class"),
    "max_image_tokens": ("max_pixels", "max_image_size", "image_size", "resolution"),
    "storage": ("s3", "bucket", "remote"),
    "register": ("register_model", "push_to_hub", "hub_model_id"),
    "save_total_limit": ("keep_checkpoints",),
}  # fmt: skip

# Names that one setting alone does not stand for.
ADVICE = {
    "batch_size": FIX_BATCH,
    "train_batch_size": FIX_BATCH,
    "global_batch_size": FIX_BATCH,
    "per_device_batch_size": FIX_BATCH,
    "total_batch_size": FIX_BATCH,
    "bs": FIX_BATCH,
    "gpus": FIX_ONE_WORKER,
    "num_gpus": FIX_ONE_WORKER,
    "n_gpus": FIX_ONE_WORKER,
    "ngpu": FIX_ONE_WORKER,
    "workers": FIX_ONE_WORKER,
    "num_workers": FIX_ONE_WORKER,
    "gpu": "give --device gpu",
    "cuda": "give --device gpu",
    "cpu": "give --device cpu",
    "no_cuda": "give --device cpu",
    "use_cpu": "give --device cpu",
    "load_in_8bit": "a base is held in 4 bit (--use-qlora) or in --dtype",
    "eval_strategy": FIX_EPOCHS,
    "evaluation_strategy": FIX_EPOCHS,
    "eval_steps": FIX_EPOCHS,
    "save_strategy": FIX_EPOCHS,
    "early_stopping_patience": FIX_EPOCHS,
    "do_train": "a study trains and evaluates, so leave it out",
    "do_eval": "a study trains and evaluates, so leave it out",
    "overwrite_output_dir": "a study is never overwritten: leave it out, or give --name",
    "trust_remote_code": "no code of a model is run, so leave it out",
    "max_length": FIX_LENGTH,
    "max_seq_length": FIX_LENGTH,
    "model_max_length": FIX_LENGTH,
    "cutoff_len": FIX_LENGTH,
    "adapter": FIX_ADAPTER,
    "merge": FIX_ADAPTER,
    "merge_into": FIX_ADAPTER,
    "version": "study.json holds the versions of a study",
}


def hint(word: str, names: Collection[str]) -> str:
    """What to give instead of an unknown option, or of a word that begins none.

    Args:
        word: as typed, with or without dashes, long ones of a text program among them.
        names: the settings' names.
    """
    name = word.lstrip("-\N{EN DASH}\N{EM DASH}").replace("-", "_").lower()[:100]
    if name in names:
        return f"did you mean {flag(name)}?"
    if name in ADVICE:
        return ADVICE[name]
    if same := [setting for setting, others in SAME.items() if name in others]:
        return f"give {' or '.join(map(flag, same))}"
    words = set(name.split("_"))
    near = difflib.get_close_matches(name, names, n=1, cutoff=LEAST_RATIO)
    near = near or [setting for setting in names if words <= set(setting.split("_"))]
    if not 0 < len(near) <= MOST_SHOWN:
        return "see --help-all"
    return f"did you mean {' or '.join(map(flag, near))}?"
