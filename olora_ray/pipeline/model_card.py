"""The model cards of the exports. They name no path of a data file and nothing else about the machine that trained."""

import contextlib
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from olora_ray.common import storage
from olora_ray.config.schema import Adapter
from olora_ray.config.section import Source

CARD = """---
{metadata}---

# {title}

{facts}

{loading}
"""
ADAPTER = """With PEFT:

```python
from peft import PeftModel
from transformers import {loader}, AutoTokenizer

model = PeftModel.from_pretrained({loader}.from_pretrained("{base}"{revision}), "{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```

{serving}"""
MERGED = """With transformers:

```python
from transformers import {loader}, AutoTokenizer

model, tokenizer = {loader}.from_pretrained("{place}"), AutoTokenizer.from_pretrained("{place}")
```

With vLLM:

    vllm serve {place}"""
SERVING = """With vLLM:

    vllm serve {base}{revision} --enable-lora --max-lora-rank {rank} --lora-modules tuned={place}{template}"""
NOT_SERVED = "vLLM takes adapters up to rank {largest}, and this one has {rank}: set `export.rank: {largest}` for it."
STACKED = """vLLM does not load an adapter of stacked experts (`target_parameters`). Serve the merged model, which the
run writes to `export/merged` with `export.merged: true`:

    vllm serve MERGED_MODEL"""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's max_lora_rank may have; it refuses all others."""


@dataclass(frozen=True)
class Card:
    base_name: str
    """A hub id, or the path of a folder."""
    base_digest: str
    """SHA-256 over the base model's weights."""
    adapter: Adapter
    rank: int
    """The rank of the exported matrices."""
    sources: Sequence[Source]
    batch: int
    """Sequences per step."""
    max_length: int
    steps: int
    eval_loss: float | None
    """The trained adapter's mean loss on the held-out rows, per `unit`."""
    unit: str = "supervised token"
    rows: str = ""
    """The size of the training data (`1,200 rows, 34,000 tokens, of `), if it is known."""
    held_out: str = ""
    """The size and the sources of the held-out data."""
    continued: bool = False
    """True if training started from the adapter of an earlier run."""
    checked: str = ""
    """The results of the export's checks."""
    compressed: str = ""
    """The loss of information, if the exported rank is smaller than the trained one."""
    revision: str | None = None
    """The commit, branch or tag of a base model from the hub, if the config names one."""
    loader: str = "AutoModelForCausalLM"
    """The class of transformers that loads the base model."""
    quantised: str = ""
    """The effect of a base model that was quantised in the training."""
    own_template: bool = False
    """True if the base model has another chat template, or none."""
    stacked: bool = False
    """True if stacks of experts are adapted, or other parameters that PEFT lists in `target_parameters`."""
    ends: str = ""
    """Tokens, with their ids, that end an answer and that the base model does not end with."""
    license: Mapping[str, Any] = field(default_factory=dict)
    """The result of `license_of`."""
    place: str = "THIS_FOLDER"
    """The address by which readers load the folder: its repository on the hub, if there is one."""
    merged: bool = False
    """True for the card of the merged model."""


def license_of(base: Path, hub_id: str | None, given: str | None) -> dict[str, Any]:
    """Return the license's fields of a model card: `given`, or those of the card in `base`; empty if it has none."""
    if given or not (base / "README.md").is_file():
        return {"license": given} if given else {}
    from huggingface_hub import metadata_load

    found: dict[str, Any] = {}
    with contextlib.suppress(ValueError, yaml.YAMLError):  # a damaged card
        found = metadata_load(base / "README.md") or {}
    fields = {
        name: found[name] for name in ("license", "license_name", "license_link") if found.get(name)
    }
    if "://" not in str(fields.get("license_link", "://")):  # a file beside the base model's card
        link = fields.pop("license_link")
        fields |= (
            {"license_link": f"https://huggingface.co/{hub_id}/blob/main/{link}"} if hub_id else {}
        )
    return fields


def model_card(card: Card) -> str:
    settings, hub = card.adapter, not posixpath.isabs(card.base_name)
    base = card.base_name if hub else posixpath.basename(card.base_name)
    path = card.base_name if hub else "PATH_OF_THE_BASE"
    facts = [
        f"Base model: `{base}`"
        + (f" at revision `{card.revision}`" if card.revision else "")
        + (", with the adapter merged into its weights" if card.merged else ", untouched")
        + ("" if hub else "; a folder on the machine that trained, or a copy of that folder"),
        f"SHA-256 of the base model's weights: `{card.base_digest}`",
        f"Method: {settings.method}, rank {settings.rank}, alpha {settings.alpha:g}"
        + ", rank-stabilised" * settings.rank_stabilized
        + f", on {settings.targets if isinstance(settings.targets, str) else ', '.join(settings.targets)}"
        + ("" if card.merged else f"; written as a plain LoRA of rank {card.rank}"),
        f"Training data: {card.rows}{in_words(card.sources)}",
        f"Training: {card.steps} steps of {card.batch} sequences of at most {card.max_length} tokens"
        + ", from the adapter of an earlier run" * card.continued,
        *([f"Held-out data: {card.held_out}"] if card.held_out else []),
        *(
            [f"Held-out loss: {card.eval_loss:.4f} per {card.unit}"]
            if card.eval_loss is not None
            else []
        ),
        *([f"Base model in the training: {card.quantised}"] if card.quantised else []),
        *(
            [f"Answers end with {card.ends}: set it as a server's stop token (`stop_token_ids`)"]
            if card.ends
            else []
        ),
        *([f"Compressed to rank {card.rank}: {card.compressed}"] if card.compressed else []),
        *([f"Checks of the export: {card.checked}"] if card.checked else []),
    ]
    loading = (MERGED if card.merged else ADAPTER).format(
        base=path,
        loader=card.loader,
        place=card.place,
        revision=f', revision="{card.revision}"' if card.revision else "",
        serving="" if card.merged else _serving(path, card),
    )
    title = f"{base}, fine-tuned" if card.merged else f"Adapter for {base}"
    return CARD.format(
        metadata=_metadata(card, hub),
        title=title,
        facts="\n".join(f"- {fact}" for fact in facts),
        loading=loading,
    )


def facts_of(folder: Path) -> str:
    text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[-1]
    return "\n".join(line for line in text.splitlines() if line.startswith("- "))


def _metadata(card: Card, hub: bool) -> str:
    # The hub reads these fields: https://huggingface.co/docs/hub/model-cards. A merged adapter is a fine-tuned model
    # there; `merge` means a mixture of several models.
    relation = {
        "base_model": card.base_name,
        "base_model_relation": "finetune" if card.merged else "adapter",
    }
    datasets = [
        each.path[5:].partition("?")[0] for each in card.sources if each.path.startswith("hf://")
    ]
    fields = {
        **card.license,
        **(relation if hub else {}),
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
        "library_name": "transformers" if card.merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", card.adapter.method],
    }
    unknown = "" if hub else "# base_model: the hub id of the base model, if it has one\n"
    return unknown + yaml.safe_dump(fields, sort_keys=False)


def _serving(base: str, card: Card) -> str:
    if card.stacked:
        return STACKED
    vllm_rank = next((each for each in VLLM_RANKS if each >= card.rank), None)
    if vllm_rank is None:
        return NOT_SERVED.format(rank=card.rank, largest=VLLM_RANKS[-1])
    template = " --chat-template THIS_FOLDER/chat_template.jinja" * card.own_template
    revision = f" --revision {card.revision}" if card.revision else ""
    return SERVING.format(
        base=base, rank=vllm_rank, revision=revision, place=card.place, template=template
    )


def in_words(sources: Sequence[Source]) -> str:
    rest = [f"{len(sources) - 6} more"] if len(sources) > 6 else []
    return ", ".join([*map(_source, sources[:6]), *rest])


def _source(source: Source) -> str:
    # Paths and buckets stay out of the card; a data set of the hub is public.
    name = (
        source.path
        if source.path.startswith("hf://")
        else source.path.rstrip("/").rsplit("/", 1)[-1]
    )
    if storage.is_uri(source.path) and not source.path.startswith("hf://"):
        name = name.partition("?")[0]
    weight = f", weight {source.weight:g}" if source.weight != 1 else ""
    name = " ".join(name.replace("`", "'").split())
    return f"`{name}` ({source.format}{weight})"
