"""Words for settings that users of other tools type, and the fields that they mean here.

The words are those of transformers' TrainingArguments, PEFT, TRL, LLaMA-Factory, Axolotl, DeepSpeed and MLflow.
"""

from collections.abc import Iterator
from functools import cache
from typing import get_args

from olora_ray.config.schema import Config, Section

PLAIN = {
    "run.name": "run_name name_of_run experiment_id",
    "run.storage": "output_dir out_dir save_dir storage_path output_path work_dir",
    "run.seed": "random_seed data_seed random_state",
    "model.name": "model_name_or_path base_model model_name pretrained_model_name_or_path model_id model_path"
    " base_model_name",
    "model.revision": "model_revision",
    "model.dtype": "torch_dtype bf16 fp16 fp32 precision mixed_precision",
    "model.quantization": "quantization_config quantize quantise bnb_4bit_quant_type qlora",
    "model.attention": "attn_implementation flash_attn flash_attention use_flash_attention_2 attn",
    "data.train": "dataset datasets dataset_name dataset_path dataset_dir train_file train_files train_data data_path"
    " data_files training_data train_dataset",
    "data.eval": "eval_dataset validation_file validation_files val_file val_data eval_data test_data valid validation"
    " eval_file",
    "data.eval_fraction": "val_set_size test_size validation_split val_size eval_split eval_size holdout",
    "data.max_length": "max_seq_length max_seq_len cutoff_len sequence_len seq_length seq_len model_max_length"
    " block_size max_len max_tokens context_length",
    "data.packing": "sample_packing pack pack_sequences",
    "data.train.0.path": "path file filename data_file",
    "data.train.0.format": "format template dataset_format data_format conversation_format prompt_style",
    "data.train.0.fields": "fields columns column_mapping dataset_text_field text_column prompt_column field_mapping",
    "adapter.method": "init_lora_weights peft_type peft_method finetuning_type lora_init",
    "adapter.rank": "rank r lora_r lora_rank lora_dim peft_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules lora_target lora_target_modules modules lora_target_linear",
    "adapter.rank_stabilized": "use_rslora rslora",
    "train.epochs": "num_epochs num_train_epochs n_epochs max_epochs epoch",
    "train.steps": "max_steps num_steps total_steps train_steps iters",
    "train.lr": "learning_rate",
    "train.lr_ratio": "loraplus_lr_ratio lora_plus_lr_ratio",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule",
    "train.clip": "max_grad_norm gradient_clipping grad_clip clip_grad_norm",
    "train.micro_batch": "per_device_train_batch_size per_device_batch_size micro_batch_size"
    " train_micro_batch_size_per_gpu per_gpu_train_batch_size",
    "train.activation_checkpointing": "gradient_checkpointing use_gradient_checkpointing activation_checkpoint"
    " enable_activation_checkpointing recompute",
    "train.global_batch": "batch_size train_batch_size global_batch_size total_batch_size effective_batch_size",
    "train.eval_every": "eval_steps eval_interval evaluation_steps val_check_interval",
    "train.checkpoint_every": "save_steps save_interval checkpoint_interval",
    "train.keep": "save_total_limit max_checkpoints keep_checkpoints",
    "train.early_stop": "early_stopping_patience patience early_stopping",
    "train.log_every": "logging_steps log_interval log_steps",
    "train.start": "resume_from_checkpoint resume adapter_name_or_path peft_model_id",
    "cluster.workers": "num_workers num_processes nproc_per_node world_size nprocs num_nodes nnodes",
    "cluster.gpus_per_worker": "num_gpus gpus n_gpus use_gpu num_gpus_per_worker",
    "cluster.cpus_per_worker": "num_cpus cpus num_cpus_per_worker",
    "cluster.strategy": "fsdp deepspeed ddp parallel_strategy distributed_strategy",
    "cluster.fsdp_replicas": "dp_replicate_size data_parallel_replicate_degree hsdp num_replicas",
    "cluster.fsdp_offload": "cpu_offload offload offload_params fsdp_cpu_offload cpu_offload_policy",
    "cluster.max_failures": "max_retries retries max_restarts",
    "evaluation.scorer": "compute_metrics metric_for_best_model metrics",
    "evaluation.max_new_tokens": "generation_max_length",
    "tracking.uri": "tracking_uri mlflow_tracking_uri mlflow_uri",
    "tracking.experiment": "experiment_name mlflow_experiment_name wandb_project project",
    "export.merged": "merge merge_lora merge_adapter save_merged merge_and_unload export_merged",
    "registry.model": "registered_model_name model_registry_name hub_model_id",
}
"""Field -> the words that mean the same elsewhere."""
EXPLAINED = {
    "gradient_accumulation_steps": "use train.global_batch, the sequences of a step over all workers; the accumulation"
    " follows from it and train.micro_batch",
    "per_device_eval_batch_size": "use train.micro_batch, for evaluations too",
    "warmup_ratio": "use train.warmup, a share of the steps",
    "warmup_steps": "use train.warmup, a share of the steps (0.03), not their number",
    "num_warmup_steps": "use train.warmup, a share of the steps (0.03), not their number",
    "load_in_4bit": "use model.quantization: nf4",
    "load_in_8bit": "use model.quantization: int8",
    "train_on_inputs": "only answers are supervised, and of format text everything",
    "optim": "the optimizer is AdamW",
    "optimizer": "the optimizer is AdamW",
    "report_to": "runs are tracked in MLflow; see tracking.uri",
}
"""Words for which there is no field that means just the same -> what to do."""


@cache
def _fields() -> dict[str, str]:
    """A word, in the form of `_plain`, -> the field that it means."""
    own: dict[str, list[str]] = {}
    for section, name in _own():
        own.setdefault(name, []).append(f"{section}.{name}")
    found = {_plain(name): places[0] for name, places in own.items() if len(places) == 1}
    return found | {_plain(word): field for field, words in PLAIN.items() for word in words.split()}


def _own() -> Iterator[tuple[str, str]]:
    for section, field in Config.model_fields.items():
        inner = next(iter(get_args(field.annotation)), field.annotation)
        assert isinstance(inner, type)
        assert issubclass(inner, Section)
        yield from ((section, each.alias or name) for name, each in inner.model_fields.items())


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").strip("_")


def advice(word: str, place: str = "") -> str | None:
    """What to do instead of a word that is no field at `place`, as `use adapter.rank`; None if that is not known."""
    plain = _plain(word)
    if plain in EXPLAINED:
        return EXPLAINED[plain]
    field = _fields().get(plain)
    return f"use {field}" if field and field != place else None
