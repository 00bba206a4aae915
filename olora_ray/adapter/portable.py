"""Files of a model folder in a form that other tools and machines read.

Nothing says where it was made: no trace of the folder that a tokenizer or a config was loaded from.
"""

import json
import ntpath
import posixpath
import shutil
from collections.abc import Callable
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
_CONFIGS = ("config.json", "generation_config.json")


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


def _brings_code(settings: Path) -> bool:
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("auto_map"))


def make_portable(folder: Path) -> None:
    """Rewrite the JSON files of tokenizer and model that are there without traces of a machine or of transformers 5."""
    _rewrite(folder / "tokenizer_config.json", _portable_tokenizer)
    for name in _CONFIGS:
        _rewrite(folder / name, portable_config)


def portable_config(tree: Any) -> Any:
    """A model's config without the folders that it or a part of it was loaded from; hub ids stay."""
    if isinstance(tree, dict):
        return {name: portable_config(value) for name, value in tree.items() if not _is_place(name, value)}
    return [portable_config(value) for value in tree] if isinstance(tree, list) else tree


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
