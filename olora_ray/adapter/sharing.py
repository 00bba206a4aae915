"""What makes an exported folder usable by others: a tokenizer that other versions read, and a model card.

Neither says anything of the machine that trained: no absolute path of a data file, no trace of the folder that the
tokenizer was loaded from.
"""

import json
import posixpath
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olora_ray.common import storage
from olora_ray.config.schema import Adapter, Source

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"
OF_A_MACHINE = ("local_files_only", "is_local", "name_or_path")
"""Keys of tokenizer_config.json that say how and where from it was loaded."""

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

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

With vLLM:

    vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned=THIS_FOLDER
"""


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
    """Per supervised token of the held-out rows."""


def copy_tokenizer(base: Path, out: Path) -> None:
    """Copy the tokenizer's files of a model folder into another, in a form that transformers 4 reads too."""
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    if (base / TEMPLATES).is_dir():
        shutil.copytree(base / TEMPLATES, out / TEMPLATES, copy_function=shutil.copyfile)
    make_portable(out)


def make_portable(folder: Path) -> None:
    """Rewrite tokenizer_config.json, if there is one, without traces of a machine or of transformers 5."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in fields.items() if name not in OF_A_MACHINE}
    # transformers 5 calls its class of fast tokenizers by a new name; it knows the old one, which 4 knows only.
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    # In 4 this key is a mapping, and the list has the other name; 5 reads both.
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    if kept != fields:
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(card: Card) -> str:
    """The README.md of an adapter's folder, with the metadata that the hub reads."""
    settings, hub = card.adapter, not posixpath.isabs(card.base_name)
    base = card.base_name if hub else posixpath.basename(card.base_name)
    place = card.base_name if hub else "PATH_OF_THE_BASE"
    facts = [
        f"Base model: `{base}`, untouched"
        + ("" if hub else "; a folder where this was trained, any copy of it will do"),
        f"SHA-256 of the base's weights: `{card.base_digest}`",
        f"Method: {settings.method}, rank {settings.rank}, alpha {settings.alpha:g}"
        + ", rank-stabilised" * settings.rank_stabilized
        + f"; written as a plain LoRA of rank {card.rank}",
        f"Training data: {', '.join(map(_source, card.sources))}",
        f"Training: {card.steps} steps, sequences of at most {card.max_length} tokens",
        *([f"Held-out loss: {card.eval_loss:.4f} per supervised token"] if card.eval_loss is not None else []),
    ]
    return CARD.format(
        metadata=f"base_model: {base}" if hub else "# base_model: the hub id of the base, if it has one",
        method=settings.method,
        title=base,
        facts="\n".join(f"- {fact}" for fact in facts),
        base=place,
        rank=card.rank,
    )


def _source(source: Source) -> str:
    """A source without the place where it lies, unless that is the hub."""
    name = source.path if source.path.startswith("hf://") else source.path.rstrip("/").rsplit("/", 1)[-1]
    if storage.is_uri(source.path) and not source.path.startswith("hf://"):
        name = name.partition("?")[0]
    weight = f", weight {source.weight:g}" if source.weight != 1 else ""
    return f"`{name}` ({source.format}{weight})"
