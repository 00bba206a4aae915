"""Every setting of a run: frozen, typed, validated once; nothing here imports what it configures."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from olora_ray.config.adapter import Adapter as Adapter
from olora_ray.config.compare import Compare as Compare
from olora_ray.config.delivery import Condition as Condition
from olora_ray.config.delivery import Export as Export
from olora_ray.config.delivery import Gate as Gate
from olora_ray.config.delivery import Registry as Registry
from olora_ray.config.delivery import Retrain as Retrain
from olora_ray.config.field_types import EXPERIMENT, Folder, Fraction, Name, Place, PositiveInt
from olora_ray.config.section import AnySection as AnySection
from olora_ray.config.section import Section as Section

IN_STORAGE = ("tokens", "models", "locks", "mlartifacts", "mlflow.db")
"""Names in `run.storage` that a run's folder cannot have."""


class Run(Section):
    """Name, place and seed."""

    name: Name
    """Name of the run and of its folder under `storage`: letters, digits, '.', '_' and '-'."""
    storage: Folder = "./runs"
    """Folder or s3://, gs:// URI that every node can read and write."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 17
    """Seeds the order of the data, dropout and random initialisations."""
    wait: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds to wait while another process works on the run, before leaving with exit code 75."""

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
    format: Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text"] = "messages"
    """Format of the rows, which decides the columns that are read: messages {messages, tools}, prompt_completion
    {prompt, completion, tools}, alpaca {instruction, input, output, system, history}, sharegpt {conversations, from,
    value, system, tools} or text {text}."""
    fields: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it
    """Maps the format's field names to the file's columns, e.g. {prompt: question}."""
    weight: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    """Times each row is used per epoch: 1 once, 2 twice, 0.5 half of the rows, drawn by a hash of their places."""
    only: tuple[str, ...] = ()
    """Files of a folder or glob to use, by their full paths or URIs; empty: all."""
    chat: Literal["auto"] | bool = "auto"
    """Whether prompt_completion rows are chats; auto: where the model has a chat template; else joined as they are."""

    @model_validator(mode="after")
    def _chat_fits_the_format(self) -> "Source":
        if self.format != "prompt_completion" and self.chat is (self.format == "text"):
            what = "no chats" if self.chat else "chats"
            raise ValueError(f"chat: rows of format {self.format} are {what}; prompt_completion leaves the choice")
        return self


class Data(Section):
    """Corpora, and how rows become sequences."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Training sources; several are interleaved evenly."""
    eval: tuple[Source, ...] = ()
    """Held-out sources."""
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Instead of `eval`: this share of the training rows is held out."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Most tokens per sequence; a longer example is rejected, longer plain text is cut in pieces."""
    packing: Literal["auto"] | bool = "auto"
    """Put several examples in one sequence; attention stays within each. auto: unless something else of the model, a
    convolution or a state, would carry from one example to the next."""
    last_turn_only: bool = False
    """Train on the last answer of each chat only; the earlier ones are its context."""
    max_rejected: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Stop when more than this share of the rows cannot be used, of training and of held-out rows each. Above 0, a
    single row of ten or more may always be rejected."""

    @field_validator("train", "eval", mode="before")
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

    def holds_out(self) -> bool:
        """Whether rows are held out for evaluation."""
        return bool(self.eval or self.eval_fraction)


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
    lr: Annotated[float, Field(gt=0.0)] = 3.0e-4
    """Peak learning rate of AdamW."""
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
    """Steps between progress lines and reports to Ray."""
    start: Folder | None = None
    """Checkpoint folder of a run with the same base and adapter settings: training starts from its best adapter."""

    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step, over all workers."""
        return -(-self.global_batch // self.micro_batch)


class Cluster(Section):
    """Workers: how many, with what, and what happens when one fails."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 2
    """Training processes; [min, max]: at least min, and up to max as the cluster has room for them."""
    resize_interval: Annotated[float, Field(gt=0.0)] = 60.0
    """With [min, max] workers: seconds between checks whether more of them fit in the cluster."""
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
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts after failures before the run gives up; -1: no limit. Preempted nodes do not count."""

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

    def may_share_gpus(self) -> bool:
        """Whether Ray may put several workers on one GPU."""
        gpus = self.gpus_per_worker
        return isinstance(gpus, float) and 0 < gpus <= 0.5 and self.max_workers() > 1

    def is_elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.min_workers() < self.max_workers()

    def min_workers(self) -> int:
        """Workers without which training waits."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    def max_workers(self) -> int:
        """Workers that are used at most."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


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
    experiment: Annotated[str, Field(pattern=EXPERIMENT)] = "olora"
    """MLflow experiment of the run."""


class Config(Section):
    """One run, whole."""

    run: Run
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
    compare: Compare = Compare()

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

    def accumulation(self, workers: int | None = None) -> int:
        """Micro-batches that a worker runs in one optimizer step, at most; `workers` defaults to the most."""
        return -(-self.train.micro_batches() // (workers or self.cluster.max_workers()))

    def folder(self) -> str:
        """The run's folder: `<storage>/<name>`."""
        return f"{self.run.storage.rstrip('/')}/{self.run.name}"
