"""The model card of an adapter's folder. It says nothing of the machine that trained: no path of a data file."""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

from olora_ray.common import storage
from olora_ray.config.schema import Adapter, Source

CARD = """---
{metadata}
library_name: peft
pipeline_tag: text-generation
tags: [lora, {method}]
---

# Adapter for {title}

{facts}

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"{revision}), "THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

{serving}
"""
SERVING = """With vLLM:

    vllm serve {base}{revision} --enable-lora --max-lora-rank {rank} --lora-modules tuned=THIS_FOLDER"""
NOT_SERVED = "vLLM takes no adapter of rank {rank}, but up to {largest}: set `export.rank: {largest}` for it."
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's max_lora_rank may be: it refuses all others."""


@dataclass(frozen=True)
class Card:
    """The facts of a model card."""

    base_name: str
    """A hub id, or the path of a folder."""
    base_digest: str
    """SHA-256 over the base's weights."""
    adapter: Adapter
    rank: int
    """Of the exported matrices."""
    sources: Sequence[Source]
    max_length: int
    steps: int
    eval_loss: float | None
    """Per supervised token of the held-out rows, of the adapter as trained."""
    checked: str = ""
    """What the checks of the export have found."""
    compressed: str = ""
    """What was lost, where the matrices have a smaller rank than those that were trained."""
    revision: str | None = None
    """Of a base from the hub: the commit, branch or tag that was trained on, if the config named one."""
    quantised: str = ""
    """What it changes that the base was quantised in the training, where it was."""
    ends: str = ""
    """Tokens, with their ids, that end an answer and are no end tokens of the base."""


def model_card(card: Card) -> str:
    """The README.md of an adapter's folder, with the metadata that the hub reads."""
    settings, hub = card.adapter, not posixpath.isabs(card.base_name)
    base = card.base_name if hub else posixpath.basename(card.base_name)
    place = card.base_name if hub else "PATH_OF_THE_BASE"
    facts = [
        f"Base model: `{base}`"
        + (f" at revision `{card.revision}`" if card.revision else "")
        + ", untouched"
        + ("" if hub else "; a folder where this was trained, any copy of it will do"),
        f"SHA-256 of the base's weights: `{card.base_digest}`",
        f"Method: {settings.method}, rank {settings.rank}, alpha {settings.alpha:g}"
        + ", rank-stabilised" * settings.rank_stabilized
        + f"; written as a plain LoRA of rank {card.rank}",
        f"Training data: {', '.join(map(_source, card.sources))}",
        f"Training: {card.steps} steps, sequences of at most {card.max_length} tokens",
        *([f"Held-out loss: {card.eval_loss:.4f} per supervised token"] if card.eval_loss is not None else []),
        *([f"Base in the training: {card.quantised}"] if card.quantised else []),
        *([f"Answers end with {card.ends}: a server needs it as a stop token (`stop_token_ids`)"] if card.ends else []),
        *([f"Compressed to rank {card.rank}: {card.compressed}"] if card.compressed else []),
        *([f"Checked when it was exported: {card.checked}"] if card.checked else []),
    ]
    return CARD.format(
        metadata=f"base_model: {base}" if hub else "# base_model: the hub id of the base, if it has one",
        method=settings.method,
        title=base,
        facts="\n".join(f"- {fact}" for fact in facts),
        base=place,
        revision=f', revision="{card.revision}"' if card.revision else "",
        serving=_serving(place, card),
    )


def _serving(base: str, card: Card) -> str:
    """How vLLM serves matrices of this rank."""
    enough = next((each for each in VLLM_RANKS if each >= card.rank), None)
    if enough is None:
        return NOT_SERVED.format(rank=card.rank, largest=VLLM_RANKS[-1])
    return SERVING.format(base=base, rank=enough, revision=f" --revision {card.revision}" if card.revision else "")


def _source(source: Source) -> str:
    """A source without the place where it lies, unless that is the hub."""
    name = source.path if source.path.startswith("hf://") else source.path.rstrip("/").rsplit("/", 1)[-1]
    if storage.is_uri(source.path) and not source.path.startswith("hf://"):
        name = name.partition("?")[0]
    weight = f", weight {source.weight:g}" if source.weight != 1 else ""
    return f"`{name}` ({source.format}{weight})"
