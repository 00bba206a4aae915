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
    if given:
        return {"license": given}
    if not (base / "README.md").is_file():
        return {}
    from huggingface_hub import metadata_load

    found: dict[str, Any] = {}
    with contextlib.suppress(ValueError, yaml.YAMLError):  # a damaged card
        found = metadata_load(base / "README.md") or {}
    fields = {
        name: found[name] for name in ("license", "license_name", "license_link") if found.get(name)
    }
    if "://" not in str(fields.get("license_link", "://")):  # a file beside the base model's card
        link = fields.pop("license_link")
        if hub_id:
            fields["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return fields


def model_card(card: Card) -> str:
    hub = not posixpath.isabs(card.base_name)
    base = path = card.base_name
    if not hub:
        base = posixpath.basename(base)
        path = "PATH_OF_THE_BASE"
    if card.merged:
        title = f"{base}, fine-tuned"
        loading = MERGED
        serving = ""
    else:
        title = f"Adapter for {base}"
        loading = ADAPTER
        serving = _serving(path, card)
    return CARD.format(
        metadata=_metadata(card, hub),
        title=title,
        facts=_facts(card, base, hub),
        loading=loading.format(
            base=path,
            loader=card.loader,
            place=card.place,
            revision=f', revision="{card.revision}"' if card.revision else "",
            serving=serving,
        ),
    )


def _facts(card: Card, base: str, hub: bool) -> str:
    model = f"`{base}`"
    if card.revision:
        model += f" at revision `{card.revision}`"
    model += ", with the adapter merged into its weights" if card.merged else ", untouched"
    if not hub:
        model += "; a folder on the machine that trained, or a copy of that folder"
    adapter = card.adapter
    method = f"{adapter.method}, rank {adapter.rank}, alpha {adapter.alpha:g}"
    if adapter.rank_stabilized:
        method += ", rank-stabilised"
    targets = adapter.targets
    method += f", on {targets if isinstance(targets, str) else ', '.join(targets)}"
    if not card.merged:
        method += f"; written as a plain LoRA of rank {card.rank}"
    training = f"{card.steps} steps of {card.batch} sequences of at most {card.max_length} tokens"
    if card.continued:
        training += ", from the adapter of an earlier run"
    facts = {
        "Base model": model,
        "SHA-256 of the base model's weights": f"`{card.base_digest}`",
        "Method": method,
        "Training data": card.rows + in_words(card.sources),
        "Training": training,
        "Held-out data": card.held_out,
    }
    if card.eval_loss is not None:
        facts["Held-out loss"] = f"{card.eval_loss:.4f} per {card.unit}"
    facts["Base model in the training"] = card.quantised
    if card.ends:
        facts[f"Answers end with {card.ends}"] = (
            "set it as a server's stop token (`stop_token_ids`)"
        )
    facts[f"Compressed to rank {card.rank}"] = card.compressed
    facts["Checks of the export"] = card.checked
    return "\n".join(f"- {name}: {text}" for name, text in facts.items() if text)


def facts_of(folder: Path) -> str:
    text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[-1]
    return "\n".join(line for line in text.splitlines() if line.startswith("- "))


def _metadata(card: Card, hub: bool) -> str:
    # The hub reads these fields: https://huggingface.co/docs/hub/model-cards. A merged adapter is a fine-tuned model
    # there; `merge` means a mixture of several models.
    fields = dict(card.license)
    if hub:
        fields["base_model"] = card.base_name
        fields["base_model_relation"] = "finetune" if card.merged else "adapter"
    datasets = [
        each.path[5:].partition("?")[0] for each in card.sources if each.path.startswith("hf://")
    ]
    if datasets:
        fields["datasets"] = list(dict.fromkeys(datasets))
    fields["library_name"] = "transformers" if card.merged else "peft"
    fields["pipeline_tag"] = "text-generation"
    fields["tags"] = ["lora", card.adapter.method]
    text = yaml.safe_dump(fields, sort_keys=False)
    if not hub:
        text = f"# base_model: the hub id of the base model, if it has one\n{text}"
    return text


def _serving(base: str, card: Card) -> str:
    if card.stacked:
        return STACKED
    vllm_rank = next((each for each in VLLM_RANKS if each >= card.rank), None)
    if vllm_rank is None:
        return NOT_SERVED.format(rank=card.rank, largest=VLLM_RANKS[-1])
    template = ""
    if card.own_template:
        template = " --chat-template THIS_FOLDER/chat_template.jinja"
    revision = f" --revision {card.revision}" if card.revision else ""
    return SERVING.format(
        base=base, rank=vllm_rank, revision=revision, place=card.place, template=template
    )


def in_words(sources: Sequence[Source]) -> str:
    parts = []
    for source in sources[:6]:
        name = source.path
        # Paths and buckets stay out of the card; a data set of the hub is public.
        if not name.startswith("hf://"):
            name = name.rstrip("/").rsplit("/", 1)[-1]
            if storage.is_uri(source.path):
                name = name.partition("?")[0]
        name = " ".join(name.replace("`", "'").split())
        weight = f", weight {source.weight:g}" if source.weight != 1 else ""
        parts.append(f"`{name}` ({source.format}{weight})")
    if len(sources) > 6:
        parts.append(f"{len(sources) - 6} more")
    return ", ".join(parts)
