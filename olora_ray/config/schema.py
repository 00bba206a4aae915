"""All settings of a run: frozen, typed and validated once. This module imports nothing that it configures."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from olora_ray.config.nights import Gate, Notify, Retrain
from olora_ray.config.section import (
    HUB_NAME,
    AliasName,
    ExperimentName,
    FileName,
    Folder,
    Fraction,
    ModelName,
    NameIn,
    PositiveFloat,
    PositiveInt,
    Reference,
    Section,
    Share,
    Source,
)
from olora_ray.config.tables import EXPORTERS, METHODS, OBJECTIVES, OPTIMIZERS

# The config's section `adapter`: what is trained, and where it starts.


METHOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "nora": ("sigma",),
    "eva": ("rho", "init_tokens"),
}
"""Fields of `adapter` that only one method reads; the other methods ignore them."""


class Adapter(Section):
    """The adapter: its method, its size and the layers that it adapts."""

    method: Annotated[str, NameIn(METHODS)] = "olora"
    """Initial values of A and B; docs/method.md explains each method. olora: Q and R of W (arXiv 2406.01775).
    lora: random A, zero B (2106.09685). pissa: largest singular values and vectors of W, exact (2404.02948). milora:
    smallest singular values and vectors (2406.09044). orthogonal: random A and B with B A = 0, as in PEFT; needs an
    even rank. nora: random mixtures of the rows of W, zero B (2410.18965). eva: principal components of the layer's
    inputs on the training data, zero B; layers where they explain most get more rank (2410.07170)."""
    rank: PositiveInt = 16
    """Rank r of the update; a larger rank has more trainable parameters."""
    alpha: PositiveFloat = 16
    """Scale of the update: it is multiplied by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout probability on the adapter's input during training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Layers to adapt. all-linear: all linear layers of the language model, experts included; or a list of names,
    dotted suffixes or regexes of layers or of experts' weights."""
    rank_stabilized: bool = False
    """Multiply the update by alpha / sqrt(rank) instead of alpha / rank."""
    sigma: PositiveFloat | Literal["matched"] = 0.02
    """Only for nora: size of A0 = sigma / scale x noise x W. matched: rows of A0 have the length that lora gives them,
    so that only their direction differs."""
    rho: Annotated[float, Field(ge=1.0)] = 2.0
    """Only for eva: the rank of a layer is at most rho x rank; the sum over all layers stays the same. 1: all layers
    have the same rank."""
    init_tokens: PositiveInt = 1024
    """Only for eva: the most supervised tokens of the training data that the initialisation reads."""

    @field_validator("targets", mode="before", json_schema_input_type=str | tuple[str, ...])
    @classmethod
    def _single_name(cls, value: object) -> object:
        if isinstance(value, str) and value != "all-linear":
            return (value,)
        return value

    @model_validator(mode="after")
    def _rank_fits_the_method(self) -> "Adapter":
        if self.method == "orthogonal" and self.rank % 2:
            raise ValueError(
                f"rank={self.rank} is odd, and orthogonal needs an even rank; use {self.rank + 1}"
            )
        return self

    @model_validator(mode="after")
    def _enough_tokens_for_the_components(self) -> "Adapter":
        if self.method == "eva" and self.init_tokens <= self.largest_rank():
            most = self.largest_rank()
            raise ValueError(
                f"init_tokens={self.init_tokens} must be larger than rho x rank = {most}; raise it"
            )
        return self

    def scale(self) -> float:
        """Return the factor s of the low-rank update."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def largest_rank(self) -> int:
        """Return the largest rank that one layer may have; the average over the layers is `rank`."""
        if self.method == "eva":
            return round(self.rho * self.rank)
        return self.rank

    def options(self) -> dict[str, Any]:
        """Return the settings that only this method reads."""
        return {name: getattr(self, name) for name in METHOD_OPTIONS.get(self.method, ())}

    def identity(self) -> str:
        """Return the settings as JSON without those of other methods, so that equal adapters have equal texts."""
        others = set[str]().union(*METHOD_OPTIONS.values()) - self.options().keys()
        return self.model_dump_json(exclude=others)


# The config's section `cluster`: the workers.


class Cluster(Section):
    """The workers: their number, their resources, and what happens when one fails."""

    workers: Literal["auto"] | PositiveInt | tuple[PositiveInt, PositiveInt] = "auto"
    """Number of training processes. auto: one for each GPU of the cluster (for each trial of a search: one), without
    GPUs 2. [min, max]: training runs with at least min workers, and with up to max when the cluster has room."""
    gpus_per_worker: Literal["auto"] | Share = "auto"
    """GPUs per worker; auto: 1 if the cluster has GPUs, otherwise 0. A fraction leaves the rest of the GPU to other
    runs and trials; 0.5 or less needs workers=1, because NCCL cannot connect workers on one GPU."""
    cpus_per_worker: PositiveFloat = 1
    """CPUs per worker; also the number of threads of each worker."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every worker holds the complete base model. fsdp: the base model is sharded; each worker reads and holds one
    part."""
    fsdp_replicas: PositiveInt = 1
    """Only for fsdp: number of copies of the base model, each sharded over workers / fsdp_replicas workers. With
    several nodes, set the number of nodes: then no weights are sent between nodes."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Number of restarts after failures before the run stops with an error; -1: no limit. Preempted nodes do not
    count."""
    silence: Annotated[float, Field(ge=5.0)] = 20.0
    """Seconds without a sign of life after which a worker counts as lost. Each worker gives one every second."""

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: object) -> object:
        numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value, value]
        are_numbers = all(
            isinstance(number, int) and not isinstance(number, bool) for number in numbers
        )
        if value != "auto" and (
            not are_numbers or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]
        ):
            raise ValueError(
                f"expected a number of workers, auto, or [min, max] with 1 <= min <= max, not {value!r}"
            )
        return value

    @field_validator("gpus_per_worker", mode="before")
    @classmethod
    def _one_gpu_at_most(cls, value: object) -> object:
        if isinstance(value, int | float) and value > 1:
            raise ValueError(
                f"a worker uses one GPU, and {value:g} per worker would leave some idle; use 1, and more workers"
            )
        return value

    def may_share_gpus(self) -> bool:
        """True if Ray may put several workers on one GPU."""
        gpus = self.gpus_per_worker
        return isinstance(gpus, float) and 0 < gpus <= 0.5 and self.workers not in (1, (1, 1))

    def each_trial(self) -> int | str:
        """Return the workers of a trial: of a range the smallest number."""
        if isinstance(self.workers, tuple):
            return self.workers[0]
        return self.workers


# Sections for the time after a training: exports and registry; nights.py has those of a scheduled retraining.


class Export(Section):
    """The exports that a run writes and registers after training: always the adapter, and by default a merged model."""

    merged: bool = True
    """Also write the merged model, and register it. false: register the adapter alone, with a reference to its base."""
    rank: PositiveInt | None = None
    """Compress the exported adapter to this rank, for servers that limit the rank. null: no compression; the adapter of
    olora then has rank 2 x rank."""
    push: Annotated[str, Field(pattern=HUB_NAME)] | None = None
    """Hub repository ORG/NAME to which finetune pushes a finished run, retrain the champion; a new one is private."""
    license: Annotated[str, Field(pattern=r"^[a-z0-9.-]+$")] | None = None
    """License in the model cards, such as apache-2.0. null: that of the base model's card."""
    also: dict[Annotated[str, NameIn(EXPORTERS)], str] = Field(default_factory=dict)
    """Further exports: NAME: OPTION. gguf: the merged model as a GGUF file for llama.cpp, in the precision f32, f16,
    bf16, q8_0 (8 bits per weight) or q4_k_m (needs llama.cpp's llama-quantize on the PATH); needs a model of type
    llama, qwen2 or qwen3 with a byte-level tokenizer. ollama: the same file with a Modelfile for Ollama."""

    @model_validator(mode="before")
    @classmethod
    def _gguf_is_one_of_also(cls, given: Any) -> Any:
        # Releases before the table of exporters had a field `gguf`.
        if not isinstance(given, dict) or "gguf" not in given:
            return given
        others = {name: value for name, value in given.items() if name != "gguf"}
        if given["gguf"] is not None:
            others["also"] = {**(others.get("also") or {}), "gguf": given["gguf"]}
        return others


class Registry(Section):
    """The model in the registry of MLflow."""

    model: ModelName | None = None
    """Name of the registered model: up to 200 letters, digits, ' ', '.', '_' and '-'. null: register nothing."""
    alias: AliasName = "candidate"
    """Alias that MLflow sets on the new version."""
    key: Reference | None = None
    """Private EC key (PEM) that signs new versions: file:/PATH, or env:NAME with the key; null: unsigned."""
    verify: str | None = None
    """File with a public key (PEM): a version is compared, promoted and loaded only if its private key has signed it.
    null: the environment variable OLORA_VERIFY; without either, no signature is needed."""

    @field_validator("alias")
    @classmethod
    def _is_no_version(cls, alias: str) -> str:
        if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
            raise ValueError(
                f"the alias {alias!r} is reserved by MLflow (latest, v1, v2, ...); choose another"
            )
        return alias


class Train(Section):
    """Length, batches, optimizer, evaluations and checkpoints of the training."""

    epochs: PositiveFloat = 1
    """Number of passes over the training sequences."""
    steps: PositiveInt | None = None
    """Number of optimizer steps; overrides `epochs`. null: `epochs` decides."""
    global_batch: PositiveInt = 16
    """Sequences (packs) per optimizer step, summed over all workers."""
    micro_batch: Literal["auto"] | PositiveInt = "auto"
    """Sequences that a worker processes at once; they are never split over workers. auto: on GPUs the largest equal
    parts of a step that fit in memory, decided once per run; without GPUs 4. A smaller value needs less memory."""
    activation_checkpointing: Literal["auto", "swiglu"] | bool = "auto"
    """Recompute each block in the backward pass instead of keeping its activations: less memory, up to 50% more time,
    the same result. swiglu: only act(gate(x)) and its product with up(x), about a third of the activations, in little
    time. auto: the least of both with which a step fits in the memory of a worker."""
    deterministic: bool = False
    """On GPUs: only deterministic kernels, so that the same run gives the same bits. Slower; not measured how much."""
    objective: Annotated[str, NameIn(OBJECTIVES, also=("auto",))] = "auto"
    """The loss of the training. tokens: the cross-entropy of the supervised tokens, which all count alike. pairs: DPO
    on preference pairs, also beside rows with answers (docs/preferences.md). auto: pairs if some rows are pairs."""
    beta: PositiveFloat = 0.1
    """Only for preference pairs: how fast the margin between both answers, in nats, lowers the loss."""
    chosen: Annotated[float, Field(ge=0.0)] = 0.0
    """Only for preference pairs: weight of plain training on the chosen answers beside the pairs; 0.1 keeps the
    probability of the chosen answers from falling."""
    optimizer: Annotated[str, NameIn(OPTIMIZERS)] = "adamw"
    """preconditioned: AdamW on the gradient of A times (B^T B)^-1 and that of B times (A A^T)^-1, each scaled to length
    1 (as NoRA+, arXiv 2410.18965). spectral: steps that change the weight by a given share of its size, whatever the
    sizes of A and B (docs/method.md)."""
    lr: PositiveFloat | Literal["auto"] = "auto"
    """Peak learning rate. auto: with spectral a constant for the rank and the number of steps; with AdamW measured on
    the first rows before step 0, for this model, method, rank, alpha and number of steps, compared with tuned rates at
    20 steps, too low for a base that has learned little. With preference pairs a tenth of it, or less: the first step
    moves the margins of other pairs by 0.5 / beta nats at most."""
    lr_factor: PositiveFloat = 1.0
    """Multiplies `lr`; a search varies it, to vary an automatic rate."""
    lr_ratio: PositiveFloat = 1.0
    """Learning rate of B divided by the learning rate of A, which is `lr`; LoRA+ (arXiv 2402.12354) uses 16."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Curve of the learning rate after the warm-up."""
    warmup: Fraction = 0.03
    """Share of all steps, at the start, in which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight decay; it pulls the adapter back to its initial values, and the model to that of the first step."""
    clip: PositiveFloat | None = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it. null: no clipping."""
    eval_every: PositiveInt = 50
    """Steps between two evaluations; the last step is always evaluated."""
    checkpoint_every: PositiveInt = 50
    """Steps between two checkpoints; there is always one at the start and after the last step."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep; each also contains the best adapter so far."""
    early_stop: PositiveInt | None = None
    """Stop after this many consecutive evaluations without a better held-out loss; null: never."""
    log_every: PositiveInt = 10
    """Steps between two progress lines in the log; sooner if these steps take more than 30 s."""
    start: Folder | None = None
    """Checkpoint folder of a run with the same base model and adapter settings; training starts from its best
    adapter."""


IN_STORAGE = (
    *("tokens", "models", "locks", "mlartifacts", "retraining", "adapters"),
    *("mlflow.db", "mlflow.db-wal", "mlflow.db-shm", "mlflow.db-journal"),
)
"""Names in `run.storage` that are reserved, so no run may have them."""
PAIR_MEANS = ("loss", "preferred", "margin", "chosen", "rejected")
"""Means over preference pairs (train/objectives/pairs.py)."""
OF_PAIRS = tuple(f"eval/pairs/{name}" for name in PAIR_MEANS)
"""Metrics of held-out preference pairs."""
NO_GATE: Mapping[str, Any] = {"gate.metric": "auto", "gate.and": []}
"""Changes to a config for an evaluation or a search: no gate decides there, so nothing must measure its metrics."""


class Run(Section):
    """Name, storage and seed of the run."""

    name: FileName = "auto"
    """Name of the run and of its folder in `storage`: up to 200 letters, digits, '.', '_' and '-'. auto:
    adapter.method, adapter.rank and a digest of the settings that change the result, without train.steps and
    train.epochs."""
    storage: Folder = "./runs"
    """Folder, or s3:// or gs:// address, that every node can read and write."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 17
    """Seed of the order of the data, of dropout and of random initialisations."""

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name in IN_STORAGE:
            raise ValueError(f"run.storage reserves the name {name!r}; choose another name")
        return name


class Model(Section):
    """The frozen base model."""

    name: Folder
    """Base model: hub id, folder, package://PACKAGE/FILE (a .gguf file or a folder), models:/NAME@ALIAS or
    models:/NAME/VERSION."""
    revision: str | None = None
    """Branch, tag or commit of the hub id; null: the main branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the frozen base model. auto: bfloat16 if the device computes fast in it, otherwise float32."""
    quantization: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Form in which training keeps the linear layers of the frozen base model: nf4 has 4 bits per weight (as QLoRA),
    int8 and fp8 have 8. The export is for the original weights. nf4 and int8 need pip install 'olora-ray[quant]'."""
    attention: Literal["auto", "flash_attention_2", "varlen", "segments", "sdpa", "eager"] = "auto"
    """Attention kernel. auto: on a GPU flash_attention_2 if it is installed, otherwise varlen (of torch); on CPUs
    segments. If that kernel differs from the model's own attention, auto tries sdpa, then eager."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a hub model. Keep false unless you have read that code."""


TEMPLATES = ("plain", "chatml", "chatml-tools", "gemma", "llama3")
"""Values of data.chat_template that are no files (data/templates)."""


class Data(Section):
    """The sources of the rows, and how rows become sequences."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Training sources: each is a path or {path: ..., format: ..., ...}; their rows are interleaved evenly."""
    eval: tuple[Source, ...] = ()
    """Held-out sources: their rows are evaluated and never trained on."""
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the training rows to hold out, if `eval` is not set; of several sources, one row at least of each that
    has ten rows."""
    max_length: Literal["auto"] | Annotated[int, Field(ge=8)] = 512
    """Largest number of tokens per sequence. Longer plain text is cut into pieces; for other rows see `too_long`. auto:
    enough for the longest row that a dry run reads; it is chosen once, at the start of a run or a search."""
    too_long: Literal["reject", "cut", "drop_turns"] = "reject"
    """Treatment of an example of more than max_length tokens. reject: leave it out. cut: cut it at max_length.
    drop_turns: leave out the last turns of a chat, so that it ends with a complete answer."""
    packing: Literal["auto"] | bool = "auto"
    """Put several examples in one sequence; attention stays within each example. auto: true, unless another part of the
    model, such as a convolution or a state, would mix neighbouring examples."""
    chat_template: str | None = None
    """Chat template instead of the model's own, exported too: a Jinja file, plain (User: ..., Assistant: ...), or
    chatml, chatml-tools, gemma or llama3, without a folder or suffix."""
    last_turn_only: bool = False
    """Supervise only the last answer of each chat; earlier answers are context."""
    max_rejected: Share = 0.01
    """Stop if more than this share of the rows is rejected: of those of `train`, with the rows that `eval_fraction`
    holds out, and of those of `eval`. Above 0, one rejected row of ten or more never stops a run."""

    @field_validator(
        "train",
        "eval",
        mode="before",
        json_schema_input_type=str | Source | tuple[str | Source, ...],
    )
    @classmethod
    def _paths(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            if not value:
                return value
            value = [value]
        return [{"path": source} if isinstance(source, str) else source for source in value]

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> "Data":
        if self.eval and self.eval_fraction is not None:
            raise ValueError("set data.eval or data.eval_fraction, not both")
        return self

    def holds_out(self) -> bool:
        return bool(self.eval or self.eval_fraction)


class Evaluation(Section):
    """Generated answers to held-out prompts, before and after training."""

    scorer: str | None = None
    """exact_match, json_fields, macro_f1 (of labels, over all rows), or package.module:function, which is imported;
    several with commas; null: answers are not scored."""
    rows: Annotated[int, Field(ge=0)] = 80
    """Number of held-out rows whose answers are scored, before and after training."""
    samples: Annotated[int, Field(ge=0)] = 3
    """Number of held-out prompts whose answers are printed, before and after training."""
    max_new_tokens: PositiveInt = 128
    """Largest number of tokens of a generated answer."""
    guard: bool = True
    """At each evaluation of a run, measure the loss on 80 other texts, too (eval/guard/loss): it rises if the model
    forgets. Not in searches."""


class Tracking(Section):
    """MLflow: its address and the experiment of the run."""

    uri: str | None = None
    """Address of an MLflow server or database, or env:NAME or file:/PATH that holds it. null: MLFLOW_TRACKING_URI,
    otherwise SQLite in run.storage."""
    experiment: ExperimentName = "olora"
    """MLflow experiment of the run."""


class Config(Section):
    """The complete configuration of a run."""

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
            if metric in ("auto", "eval/loss", "eval/perplexity", *OF_PAIRS):
                continue
            if not metric.startswith("eval/") or self.evaluation.scorer is None:
                raise ValueError(
                    f"gate: metric {metric} is not measured; use eval/loss, eval/perplexity, or eval/NAME for a score"
                    " NAME that evaluation.scorer returns"
                )
            if self.evaluation.rows == 0:
                raise ValueError(
                    f"gate: metric {metric} is not measured: evaluation.rows=0 scores no answers; set evaluation.rows"
                    f" to gate.min_rows={self.gate.min_rows} or more"
                )
            held_out = self.data.eval or (self.data.train if self.data.eval_fraction else ())
            if held_out and all(source.has_no_questions() for source in held_out):
                raise ValueError(
                    f"gate: metric {metric} is not measured: held-out rows of format {held_out[0].format} have no"
                    " questions; use eval/loss or eval/perplexity"
                )
        return self

    @model_validator(mode="after")
    def _packed_weights_are_not_sharded(self) -> "Config":
        if self.model.quantization != "none" and self.cluster.strategy == "fsdp":
            raise ValueError(
                f"model.quantization={self.model.quantization} with cluster.strategy=fsdp: quantised weights cannot be"
                " sharded; use cluster.strategy=ddp or model.quantization=none"
            )
        return self

    @model_validator(mode="after")
    def _workers_share_no_gpu(self) -> "Config":
        # An evaluation has no such check: its actors exchange nothing, so they may share a GPU.
        if self.cluster.may_share_gpus():
            raise ValueError(
                f"cluster.gpus_per_worker={self.cluster.gpus_per_worker:g} with"
                f" cluster.workers={self.cluster.workers}: NCCL cannot connect workers that share a GPU;"
                " use cluster.gpus_per_worker=1 or cluster.workers=1"
            )
        return self

    @model_validator(mode="after")
    def _replicas_divide_the_workers(self) -> "Config":
        workers = self.cluster.workers
        replicas = self.cluster.fsdp_replicas
        if self.cluster.strategy != "fsdp" or replicas == 1 or workers in (1, "auto"):
            return self
        fields = f"cluster.fsdp_replicas={replicas} with cluster.workers={workers}"
        if not isinstance(workers, int):
            raise ValueError(
                f"{fields}: the workers may not be divisible by it; use one number of workers"
            )
        if workers % replicas:
            raise ValueError(
                f"{fields}: the workers are not divisible by it; use a divisor of the number of workers"
            )
        if workers == replicas:
            raise ValueError(
                f"{fields}: no weight would be sharded; use strategy=ddp or fewer replicas"
            )
        return self

    def folder(self) -> str:
        return f"{self.run.storage.rstrip('/')}/{self.run.name}"


# The config of an evaluation without a run: it has no training data, no adapter and no registry.


class EvaluationData(Data):
    """The held-out rows of an evaluation, and how they become sequences."""

    train: tuple[Source, ...] = ()


class EvaluationConfig(Section):
    """The part of a config that an evaluation reads; only `model` is required."""

    model: Model
    run: Run = Run(name="evaluation")
    """Only `storage` and `seed` are used: an evaluation has no run folder."""
    data: EvaluationData = EvaluationData()
    train: Train = Train()
    """Only `micro_batch` is used: the number of sequences that a worker processes at once."""
    cluster: Cluster = Cluster()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()


AnyConfig = Config | EvaluationConfig
"""A config that an evaluation can use: the config of a run, or one without a run."""
