"""Every setting of a run: frozen, typed, validated once; nothing here imports what it configures."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from olora_ray.common.errors import UserError
from olora_ray.config.section import (
    WEBHOOK,
    AliasName,
    ExperimentName,
    FileName,
    Folder,
    Fraction,
    ModelName,
    Place,
)
from olora_ray.config.section import PositiveInt as PositiveInt
from olora_ray.config.section import Section as Section
from olora_ray.config.section import extended as extended

# The config's section `adapter`: what is trained, and where it starts.


METHOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "nora": ("sigma",),
    "eva": ("rho", "init_tokens"),
    "lora_ga": ("gamma", "init_tokens"),
}
"""Fields of `adapter` that only these methods have: they count for nothing with another."""


class Adapter(Section):
    """The adapter that is trained."""

    method: Literal[
        "olora", "olora_even", "lora", "pissa", "pissa_fast", "milora", "orthogonal", "nora", "eva", "lora_ga"
    ] = "olora"
    """Where the adapter starts; docs/method.md says more of each. olora: Q and R of W (arXiv 2406.01775). lora: random
    A, zero B (2106.09685). pissa: largest singular values and vectors of W, exactly (2404.02948); pissa_fast: by a
    randomised SVD, for large layers. milora: the smallest (2406.09044). orthogonal: random A and B with B A = 0, as in
    PEFT; even rank. nora: random mixtures of the rows of W, zero B (2410.18965). eva: principal components of the
    layer's inputs on the training data, zero B; ranks go to the layers where they explain most (2410.07170).
    lora_ga: singular vectors of the weight's gradient on the training data (2407.05000)."""
    rank: PositiveInt = 16
    """Rank r of the update."""
    alpha: Annotated[float, Field(gt=0.0)] = 16
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input during training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """all-linear (language model with experts), or names, dotted suffixes or regexes of layers or experts' weights."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    sigma: Annotated[float, Field(gt=0.0)] | Literal["matched"] = 0.02
    """nora: size of A0 = sigma / scale x noise x W; matched: rows as long as plain LoRA's, so that the direction alone
    differs."""
    rho: Annotated[float, Field(ge=1.0)] = 2.0
    """eva: a layer's rank is at most rho x rank, with the same sum over all layers; 1: the same rank for all."""
    init_tokens: PositiveInt = 1024
    """eva, lora_ga: how many supervised tokens of the training data are looked at, at most."""
    gamma: Annotated[float, Field(gt=0.0)] = 16.0
    """lora_ga: A0 and B0 are as large as 1 / sqrt(gamma)."""

    @field_validator("targets", mode="before", json_schema_input_type=str | tuple[str, ...])
    @classmethod
    def _single_name(cls, value: object) -> object:
        return (value,) if isinstance(value, str) and value != "all-linear" else value

    @model_validator(mode="after")
    def _rank_fits_the_method(self) -> "Adapter":
        if self.method == "orthogonal" and self.rank % 2:
            near = f"{self.rank - 1} or {self.rank + 1}" if self.rank > 1 else "2"
            raise ValueError(f"rank={self.rank} is odd, and orthogonal needs an even rank; use {near}")
        return self

    @model_validator(mode="after")
    def _enough_tokens_for_the_components(self) -> "Adapter":
        if self.method == "eva" and self.init_tokens <= self.largest_rank():
            raise ValueError(
                f"init_tokens={self.init_tokens}: {self.largest_rank()} components (rho x rank) need more tokens; raise"
                " it, or lower rank or rho"
            )
        return self

    def scale(self) -> float:
        """The factor s of the low-rank update."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def largest_rank(self) -> int:
        """The largest that a layer's rank can become; on average layers have `rank`."""
        return round(self.rho * self.rank) if self.method == "eva" else self.rank

    def options(self) -> dict[str, Any]:
        """The settings that the method alone has."""
        return {name: getattr(self, name) for name in METHOD_OPTIONS.get(self.method, ())}

    def identity(self) -> str:
        """The settings as JSON, without those of other methods: the same text for the same adapter."""
        others = {name for names in METHOD_OPTIONS.values() for name in names} - self.options().keys()
        return self.model_dump_json(exclude=others)


# The config's section `cluster`: the workers.


class Cluster(Section):
    """Workers: how many, with what, and what happens when one fails."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 2
    """Training processes; [min, max]: at least min, and up to max as the cluster has room for them."""
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0.0, le=1.0)] = "auto"
    """GPUs per worker; auto: 1 if the cluster has GPUs, else 0. A fraction leaves the rest of a GPU to other runs and
    trials; 0.5 or less needs workers=1, since NCCL does not connect workers that share a GPU."""
    cpus_per_worker: Annotated[float, Field(gt=0.0)] = 1
    """CPUs per worker, and its number of threads."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every worker holds the whole base model; fsdp: each reads and holds a part of it."""
    fsdp_replicas: PositiveInt = 1
    """With fsdp: copies of the base model, each over workers / fsdp_replicas workers; for several nodes that are fast
    inside, the number of nodes: then weights never travel between them."""
    fsdp_offload: bool = False
    """With fsdp, on GPUs: blocks of the base model lie in the memory of the node, and are copied to the GPU as they are
    needed: room there for a longer step, the same result."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts after failures before the run gives up; -1: no limit. Preempted nodes do not count."""
    spares: Annotated[int, Field(ge=0)] = 0
    """Processes that stand by with the base model loaded and take the place of workers that die; with ddp on CPUs,
    where they take memory and no time."""

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: object) -> object:
        numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value, value]
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        if not whole or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
            raise ValueError(f"expected a number of workers, or [min, max] with 1 <= min <= max, not {value!r}")
        return value

    @field_validator("gpus_per_worker", mode="before")
    @classmethod
    def _one_gpu_at_most(cls, value: object) -> object:
        if isinstance(value, int | float) and value > 1:
            raise ValueError(
                f"a worker computes on one GPU, of {value:g} the others would be idle; use 1, and more workers"
            )
        return value

    @model_validator(mode="after")
    def _sharded_if_offloaded(self) -> "Cluster":
        if self.fsdp_offload and self.strategy != "fsdp":
            raise ValueError(
                f"fsdp_offload=true with strategy={self.strategy}: only a sharded base is; use strategy=fsdp"
            )
        return self

    def may_share_gpus(self) -> bool:
        """True if Ray may put several workers on one GPU."""
        gpus = self.gpus_per_worker
        return isinstance(gpus, float) and 0 < gpus <= 0.5 and self.max_workers() > 1

    def is_elastic(self) -> bool:
        """True if the number of workers may change."""
        return self.min_workers() < self.max_workers()

    def min_workers(self) -> int:
        """Workers without which training waits."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    def max_workers(self) -> int:
        """Workers that are used at most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


# Sections of the config about what comes after a training: exports, registry, gate, next training, who is told.


class Export(Section):
    """What is written, and registered, when training has ended: the adapter always, with or without a merged model."""

    merged: bool = True
    """true: the base with the adapter merged in is written too, and registered; false: the adapter alone is, with its
    base model by reference (an adapter-only version)."""
    rank: PositiveInt | None = None
    """Compress the exported adapter to this rank, for servers with a limit; null: as it is (olora: 2 x rank)."""


class Registry(Section):
    """The registered model."""

    model: ModelName | None = None
    """Name under which the model is registered: up to 200 letters, digits, ' ', '.', '_', '-'; null: not registered."""
    alias: AliasName = "candidate"
    """Alias that the new version gets."""

    @field_validator("alias")
    @classmethod
    def _is_no_version(cls, alias: str) -> str:
        if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
            raise ValueError(f"{alias!r} is a name that MLflow keeps for itself (latest, v1, v2, ...); choose another")
        return alias


class Condition(Section):
    """A bound that a new version must keep, whatever the champion does."""

    metric: str
    """eval/loss, eval/perplexity, or eval/NAME of a score that evaluation.scorer gives."""
    at_least: float | None = None
    """Smallest value that passes."""
    at_most: float | None = None
    """Largest value that passes."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Condition":
        if self.at_least is None and self.at_most is None:
            raise ValueError("set at_least or at_most")
        return self


class Gate(Section):
    """Conditions under which a retrained version becomes the champion."""

    metric: str = "eval/loss"
    """Metric of the comparison: eval/loss, eval/perplexity (lower is better) or eval/NAME of a score (higher)."""
    must_improve_by: float = 0.0
    """Improvement that must be exceeded, surely (see confident); negative: may be worse by that much."""
    conditions: Annotated[tuple[Condition, ...], Field(alias="and")] = ()
    """Further conditions {metric: ..., at_least: ...} or at_most, on the new version alone."""
    group: str | None = None
    """Column (or field) that the rows of one document or customer share; @file: all rows of a file; null: none."""
    min_rows: Annotated[int, Field(ge=2)] = 20
    """Fewest independent held-out rows (groups, with `group`) on which a champion is replaced."""
    confident: bool = True
    """true: the lower end of the improvement's 95% interval must exceed must_improve_by; false: its middle decides."""


class Retrain(Section):
    """Retraining by pipelines/retrain.py."""

    origin: Annotated[Literal["base", "champion"], Field(alias="from")] = "base"
    """base: train from the start on all data; champion: continue its adapter on new files and some old rows."""
    replay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """With `from: champion`: share of the rows of known files to train on again; others are drawn each night."""
    may_shrink: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Stop if the files of data.train have lost more than this share of the rows that the champion's had; 1: never."""


class Notify(Section):
    """Notifications of a retraining: promoted, refused, failed, not finished."""

    url: Annotated[str, Field(pattern=WEBHOOK)] | None = None
    """Webhook that gets a POST of JSON: http(s)://..., or env:NAME or file:/PATH that holds it; null: none."""
    command: str | None = None
    """Shell command that gets the same JSON on its standard input; null: none."""


# The config's section `train`: how long, in which batches and by which optimizer, and what happens on the way.


class Train(Section):
    """Length, batches, optimizer, evaluations and checkpoints of the training."""

    epochs: Annotated[float, Field(gt=0.0)] = 1
    """Passes over the training sequences."""
    steps: PositiveInt | None = None
    """Train this many optimizer steps instead of `epochs`."""
    global_batch: PositiveInt = 16
    """Sequences (packs) per optimizer step, over all workers."""
    micro_batch: PositiveInt = 4
    """Sequences that a worker runs through the model at once; a smaller number needs less memory, and feeds more
    workers: each takes whole micro-batches."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Run each block again in the backward pass instead of keeping what it computed: less memory, up to half more
    time, the same result. auto: where a step would not fit in the memory of the workers otherwise."""
    lr: Annotated[float, Field(gt=0.0)] | Literal["auto"] = "auto"
    """Peak learning rate of AdamW. auto: measured on the first rows before step 0, for the model, method, rank and
    alpha (docs/method.md)."""
    lr_factor: Annotated[float, Field(gt=0.0)] = 1.0
    """Multiplies `lr`, so that a search can vary an automatic rate."""
    lr_ratio: Annotated[float, Field(gt=0.0)] = 1.0
    """Learning rate of B divided by that of A, which is `lr` (LoRA+, arXiv 2402.12354, has 16); 1: one for both."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: Fraction = 0.03
    """Share of the steps at the start in which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's weight decay; it pulls the adapter back to its initial values."""
    precondition: bool = False
    """Multiply the gradient of A by (B^T B)^-1 and that of B by (A A^T)^-1, each scaled to length 1, before clipping
    (as NoRA+, arXiv 2410.18965, and Riemannian preconditioned LoRA, 2402.02347)."""
    clip: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    eval_every: PositiveInt = 50
    """Steps between evaluations; the last step is always evaluated."""
    checkpoint_every: PositiveInt = 50
    """Steps between checkpoints; the start and the last step always have one."""
    keep: PositiveInt = 2
    """Number of checkpoints to keep, the newest; each also holds the best adapter so far."""
    early_stop: PositiveInt | None = None
    """Stop after this many evaluations in a row without a better held-out loss; null: never."""
    log_every: PositiveInt = 10
    """Steps between progress lines."""
    start: Folder | None = None
    """Checkpoint folder of a run with the same base and adapter settings: training starts from its best adapter."""

    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step, over all workers."""
        return -(-self.global_batch // self.micro_batch)


IN_STORAGE = (
    *("tokens", "models", "locks", "mlartifacts", "retraining", "adapters"),
    *("mlflow.db", "mlflow.db-wal", "mlflow.db-shm", "mlflow.db-journal"),
)
"""Names in `run.storage` that a run's folder cannot have."""
NO_GATE: Mapping[str, Any] = {"gate.metric": "eval/loss", "gate.and": []}
"""Changes for what decides nothing, an evaluation or a search: what the gate asks for need not be measured there."""


class Run(Section):
    """Name, place and seed."""

    name: FileName = "auto"
    """Name of the run and of its folder under `storage`: up to 200 letters, digits, '.', '_' and '-'. auto: a name from
    adapter.method, adapter.rank and a digest of the settings that decide what comes out (not of the length)."""
    storage: Folder = "./runs"
    """Folder or s3://, gs:// URI that every node can read and write."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 17
    """Seeds the order of the data, dropout and random initialisations."""

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name in IN_STORAGE:
            raise ValueError(f"{name!r} is what the storage itself keeps there; choose another name")
        return name


class Model(Section):
    """The frozen base model."""

    name: Folder
    """Hub id, folder, package://PACKAGE/FILE (.gguf or folder), or models:/NAME@ALIAS or /VERSION."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the frozen base; auto: bfloat16 where the device is fast at it, else float32."""
    quantization: Literal["none", "nf4", "int8", "fp8"] = "none"
    """How the linear layers of the frozen base are kept while it is trained: nf4 in 4 bits a number (QLoRA's), int8 and
    fp8 in 8. The export is for the weights as they were. nf4 and int8 need pip install 'olora-ray[quant]'."""
    attention: Literal["auto", "flash_attention_2", "varlen", "segments", "sdpa", "eager"] = "auto"
    """Attention kernel; auto: on a GPU flash_attention_2 if installed, else varlen (torch's own), on CPUs segments;
    where that does not compute what the model does, sdpa, then eager."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Leave off unless you have read that code."""
    allow_pickle: bool = False
    """Convert pickled weights (pytorch_model*.bin) where there are no safetensors; objects in them are not loaded."""


class Source(Section):
    """One corpus."""

    path: Place
    """File, folder or glob (jsonl, json, parquet, csv, tsv, txt; .gz ...), hf://ORG/NAME?split=..., s3://, gs://."""
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text"] = "auto"
    """Format of the rows, which decides the columns that are read; auto: the one that they have, found with its fields
    in a few rows; messages {messages, tools}, prompt_completion {prompt, completion, tools}, alpaca {instruction,
    input, output, system, history}, sharegpt {conversations, from, value, system, tools} or text {text}."""
    fields: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it
    """Maps the format's field names to the file's columns, e.g. {prompt: question}; with auto those that it shall not
    find."""
    weight: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    """Times each row is used per epoch: 1 once, 2 twice, 0.5 half of the rows, drawn by a hash of their places."""
    only: tuple[str, ...] = ()
    """Files of a folder or glob to use, by their full paths or URIs; empty: all."""
    chat: Literal["auto"] | bool = "auto"
    """Whether prompt_completion rows are chats; auto: where the model has a chat template; else joined as they are."""

    @model_validator(mode="after")
    def _chat_fits_the_format(self) -> "Source":
        if self.format not in ("auto", "prompt_completion") and self.chat is (self.format == "text"):
            what = "no chats" if self.chat else "chats"
            raise ValueError(f"chat: rows of format {self.format} are {what}; prompt_completion leaves the choice")
        return self


class Data(Section):
    """Corpora, and how rows become sequences."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Training sources, each a path or {path: ..., format: ..., ...}; several are interleaved evenly."""
    eval: tuple[Source, ...] = ()
    """Held-out sources."""
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Instead of `eval`: this share of the training rows is held out."""
    max_length: Literal["auto"] | Annotated[int, Field(ge=8)] = 512
    """Most tokens per sequence; longer plain text is cut in pieces, and of what else is longer `too_long` decides.
    auto: as many as the longest row needs that a dry run reads; chosen once, where a run or a search begins."""
    too_long: Literal["reject", "cut", "drop_turns"] = "reject"
    """What becomes of an example of more than max_length tokens: it is rejected; cut at max_length; or, of a chat, the
    last turns are left out, so that it ends with a whole answer."""
    packing: Literal["auto"] | bool = "auto"
    """Put several examples in one sequence; attention stays within each. auto: unless something else of the model, a
    convolution or a state, would carry from one example to the next."""
    chat_template: str | None = None
    """Chat template in place of the model's own: a file of Jinja, or plain (User: ..., Assistant: ...). The exported
    model carries it."""
    last_turn_only: bool = False
    """Train on the last answer of each chat only; the earlier ones are its context."""
    max_rejected: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Stop when more than this share of the rows cannot be used, of training and of held-out rows each. Above 0, a
    single row of ten or more may always be rejected."""

    @field_validator("train", "eval", mode="before", json_schema_input_type=str | Source | tuple[str | Source, ...])
    @classmethod
    def _paths(cls, value: object) -> object:
        """A path alone is a source, and a source alone is a list of one."""
        sources = list(value) if isinstance(value, list | tuple) else [value] if value else value
        if not isinstance(sources, list):
            return value
        return [{"path": source} if isinstance(source, str) else source for source in sources]

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> "Data":
        if self.eval and self.eval_fraction is not None:
            raise ValueError("set data.eval or data.eval_fraction, not both")
        return self

    def length(self) -> int:
        """`max_length`; raises UserError where auto is left."""
        if self.max_length == "auto":
            raise UserError(
                "data.max_length: auto is for finetune, sweep and retrain; set the number that these have said"
            )
        return self.max_length

    def holds_out(self) -> bool:
        """True if rows are held out for evaluation."""
        return bool(self.eval or self.eval_fraction)


class Evaluation(Section):
    """Answers to held-out prompts, before and after training."""

    scorer: str | None = None
    """exact_match, json_fields or package.module:function (is imported); null: no answers are scored."""
    rows: Annotated[int, Field(ge=0)] = 80
    """Held-out rows that are answered and scored, before and after training."""
    samples: Annotated[int, Field(ge=0)] = 3
    """Held-out prompts whose answers are shown, before and after training."""
    max_new_tokens: PositiveInt = 128
    """Longest generated answer, in tokens."""


class Tracking(Section):
    """MLflow: its address and the experiment."""

    uri: str | None = None
    """MLflow server or database, or env:NAME or file:/PATH that holds it; null: MLFLOW_TRACKING_URI, else SQLite."""
    experiment: ExperimentName = "olora"
    """MLflow experiment of the run."""


class Config(Section):
    """One run, whole."""

    run: Run = Run()
    model: Model
    data: Data
    adapter: Adapter = Adapter()
    train: Train = Train()
    cluster: Cluster = Cluster()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    export: Export = Export()
    registry: Registry = Registry()
    gate: Gate = Gate()
    retrain: Retrain = Retrain()
    notify: Notify = Notify()

    @model_validator(mode="after")
    def _gate_can_be_measured(self) -> "Config":
        for metric in (self.gate.metric, *(condition.metric for condition in self.gate.conditions)):
            if metric in ("eval/loss", "eval/perplexity"):
                continue
            if not metric.startswith("eval/") or self.evaluation.scorer is None:
                raise ValueError(
                    f"gate: metric {metric} is not measured: use eval/loss, eval/perplexity, or eval/NAME of a score"
                    " that evaluation.scorer gives"
                )
            if self.evaluation.rows == 0:
                raise ValueError(
                    f"gate: metric {metric} is not measured: with evaluation.rows=0 no answer is scored; set it to"
                    f" gate.min_rows={self.gate.min_rows} at least"
                )
            held_out = self.data.eval or (self.data.train if self.data.eval_fraction else ())
            if held_out and all(source.format == "text" for source in held_out):
                raise ValueError(
                    f"gate: metric {metric} is not measured: held-out rows of format text have no question to answer;"
                    " use eval/loss or eval/perplexity"
                )
        return self

    @model_validator(mode="after")
    def _packed_weights_are_not_sharded(self) -> "Config":
        if self.model.quantization != "none" and self.cluster.strategy == "fsdp":
            raise ValueError(
                f"model.quantization={self.model.quantization} with cluster.strategy=fsdp: packed weights are not"
                " sharded; use strategy: ddp, or quantization: none"
            )
        return self

    @model_validator(mode="after")
    def _workers_share_no_gpu(self) -> "Config":
        # Actors of an evaluation may: they exchange nothing.
        if self.cluster.may_share_gpus():
            raise ValueError(
                f"cluster.gpus_per_worker={self.cluster.gpus_per_worker:g} with"
                f" cluster.workers={self.cluster.max_workers()}: workers that share a GPU cannot be connected (NCCL);"
                " use gpus_per_worker=1, or workers=1"
            )
        return self

    @model_validator(mode="after")
    def _replicas_divide_the_workers(self) -> "Config":
        workers, replicas = self.cluster.workers, self.cluster.fsdp_replicas
        if self.cluster.strategy != "fsdp" or replicas == 1 or workers == 1:
            return self
        what = f"cluster.fsdp_replicas={replicas} with cluster.workers={workers}"
        if not isinstance(workers, int):
            raise ValueError(f"{what}: some numbers of workers cannot be split so; use one number of workers")
        if workers % replicas:
            raise ValueError(f"{what}: the workers cannot be split so; use a divisor of the number of workers")
        if workers == replicas:
            raise ValueError(f"{what}: each worker would hold the whole base; use strategy: ddp, or fewer replicas")
        return self

    @model_validator(mode="after")
    def _spares_hold_the_whole_base(self) -> "Config":
        if self.cluster.spares and self.cluster.strategy != "ddp":
            raise ValueError(
                f"cluster.spares={self.cluster.spares} with cluster.strategy={self.cluster.strategy}: a spare cannot"
                " take the place of a part of the base; use spares: 0, or strategy: ddp"
            )
        return self

    def accumulation(self, workers: int | None = None) -> int:
        """Micro-batches that a worker runs in one optimizer step, at most; `workers` defaults to the most."""
        return -(-self.train.micro_batches() // (workers or self.cluster.max_workers()))

    def folder(self) -> str:
        """The run's folder: `<storage>/<name>`."""
        return f"{self.run.storage.rstrip('/')}/{self.run.name}"


# The config of an evaluation whose model comes from no run: no training data, no adapter, no registry.


class EvaluationData(Data):
    """Held-out rows, if any, and how they become sequences."""

    train: tuple[Source, ...] = ()


class EvaluationConfig(Section):
    """The part of a config that an evaluation reads; only the model has no default."""

    model: Model
    run: Run = Run(name="evaluation")
    """Of this only `storage` and `seed` count: an evaluation has no folder of its own."""
    data: EvaluationData = EvaluationData()
    train: Train = Train()
    """Of this only `micro_batch` counts: sequences that go through the model at once."""
    cluster: Cluster = Cluster()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()


AnyConfig = Config | EvaluationConfig
"""A config that can be evaluated with: a run's config, or one without a run."""
