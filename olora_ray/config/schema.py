"""Every setting of a run: frozen, typed, validated once; nothing here imports what it configures."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from olora_ray.config.adapter import Adapter as Adapter
from olora_ray.config.cluster import Cluster as Cluster
from olora_ray.config.delivery import Condition as Condition
from olora_ray.config.delivery import Export as Export
from olora_ray.config.delivery import Gate as Gate
from olora_ray.config.delivery import Notify as Notify
from olora_ray.config.delivery import Registry as Registry
from olora_ray.config.delivery import Retrain as Retrain
from olora_ray.config.field_types import ExperimentName, FileName, Folder, Place, PositiveInt
from olora_ray.config.section import AnySection as AnySection
from olora_ray.config.section import Section as Section
from olora_ray.config.train import Train as Train

IN_STORAGE = (
    *("tokens", "models", "locks", "mlartifacts", "retraining", "adapters"),
    *("mlflow.db", "mlflow.db-wal", "mlflow.db-shm", "mlflow.db-journal"),
)
"""Names in `run.storage` that a run's folder cannot have."""
NO_GATE: Mapping[str, Any] = {"gate.metric": "eval/loss", "gate.and": []}
"""Changes for what decides nothing, an evaluation or a search: what the gate asks for need not be measured there."""


class Run(Section):
    """Name, place and seed."""

    name: FileName
    """Name of the run and of its folder under `storage`: up to 200 letters, digits, '.', '_' and '-'."""
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
