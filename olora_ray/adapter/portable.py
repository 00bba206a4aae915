"""Files of a model folder in a form that other tools and machines read.

Nothing says where it was made: no trace of the folder that a tokenizer or a config was loaded from.
"""

import json
import ntpath
import posixpath
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
OF_CODE = ("*.py", "*.model")
"""What a tokenizer that brings its own code may need besides: the code, and a vocabulary by whatever name."""
TEMPLATES = "additional_chat_templates"
OF_A_MACHINE = ("local_files_only", "is_local", "name_or_path")
"""Keys of tokenizer_config.json that say how and where from it was loaded."""
GENERATION, ENDS = "generation_config.json", "eos_token_id"
_CONFIGS = ("config.json", GENERATION)


def copy_tokenizer(base: Path, out: Path) -> None:
    """Copy the tokenizer's files of a model folder into another, in a form that transformers 4 reads too."""
    names = set(TOKENIZER_FILES)
    if _brings_code(base / "tokenizer_config.json"):
        names |= {file.name for pattern in OF_CODE for file in base.glob(pattern)}
    for name in sorted(names):
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    if (base / TEMPLATES).is_dir():
        # The base's are there already where an adapter's tokenizer goes into a merged folder.
        shutil.copytree(base / TEMPLATES, out / TEMPLATES, copy_function=shutil.copyfile, dirs_exist_ok=True)
    make_portable(out)


def name_class(folder: Path, name: str) -> None:
    """Have tokenizer_config.json name this class of transformers."""
    _rewrite(folder / "tokenizer_config.json", lambda fields: {**fields, "tokenizer_class": name})


def end_with(folder: Path, ids: Sequence[int]) -> None:
    """Have generation_config.json name these ids as those that end an answer."""
    file = folder / GENERATION
    if not file.is_file():
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {name: shape[name] for name in ("bos_token_id", "pad_token_id") if shape.get(name) is not None}
        file.write_text(json.dumps(kept), encoding="utf-8")
    _rewrite(file, lambda fields: {**fields, ENDS: list(ids)})


def _brings_code(settings: Path) -> bool:
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("auto_map"))


def make_portable(folder: Path) -> None:
    """Rewrite the JSON files of tokenizer and model that are there without traces of a machine or of transformers 5."""
    _rewrite(folder / "tokenizer_config.json", _portable_tokenizer)
    for name in _CONFIGS:
        _rewrite(folder / name, portable_config)


_OLD_ROPE = ("rope_theta", "rope_scaling")


def portable_config(tree: Any) -> Any:
    """A model's config without the folders that it or a part of it was loaded from; hub ids stay.

    What transformers 5 says by new names is also there by those of 4, which would take its defaults for it, silently.
    """
    if isinstance(tree, dict):
        kept = {name: portable_config(value) for name, value in tree.items() if not _is_place(name, value)}
        return {**kept, **_old_names(kept)}
    return [portable_config(value) for value in tree] if isinstance(tree, list) else tree


def _old_names(fields: dict[str, Any]) -> dict[str, Any]:
    """What a config says of rotary positions, by the names of transformers 4; 5 reads both."""
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope or not fields.keys().isdisjoint(_OLD_ROPE):
        return {}
    rest = {name: value for name, value in rope.items() if name != "rope_theta"}
    scaled = rest.get("rope_type", "default") != "default"
    return {"rope_theta": rope["rope_theta"], **({"rope_scaling": rest} if scaled else {})}


def _rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    if not file.is_file():
        return
    fields = json.loads(file.read_text(encoding="utf-8"))
    if (kept := change(fields)) != fields:
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _portable_tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in fields.items() if name not in OF_A_MACHINE and not _is_place(name, value)}
    # transformers 5 calls its class of fast tokenizers by a new name; it knows the old one, which 4 knows only.
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    # In 4 this key is a mapping, and the list has the other name; 5 reads both.
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    return kept


def _is_place(name: str, value: Any) -> bool:
    """Whether a field says where on some machine a file or folder lies."""
    if not isinstance(value, str) or not name.endswith(("_path", "_file")):
        return False
    absolute = posixpath.isabs(value) or ntpath.isabs(value) or ntpath.splitdrive(value)[0] != ""
    return absolute or value.startswith((".", "~"))
