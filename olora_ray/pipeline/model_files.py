"""Files of a model folder in a form that other tools and machines read.

No file says where it was made: the folder from which a tokenizer or a config was loaded is left out.
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
"""Further files of a tokenizer with its own code: the code, and a vocabulary of any name."""
TEMPLATES = "additional_chat_templates"
OF_A_MACHINE = ("local_files_only", "is_local", "name_or_path")
"""Keys of tokenizer_config.json that say how and from where it was loaded."""
GENERATION = "generation_config.json"
ENDS = "eos_token_id"


def copy_tokenizer(base: Path, out: Path) -> None:
    """Copy the tokenizer's files of a model folder into another, in a form that transformers 4 reads too."""
    names = set(TOKENIZER_FILES)
    settings = base / "tokenizer_config.json"
    if settings.is_file() and json.loads(settings.read_text(encoding="utf-8")).get("auto_map"):
        for pattern in OF_CODE:
            names |= {file.name for file in base.glob(pattern)}
    for name in sorted(names):
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    if (base / TEMPLATES).is_dir():
        # dirs_exist_ok: a merged folder already has the base's templates when it gets the adapter's tokenizer.
        shutil.copytree(
            base / TEMPLATES, out / TEMPLATES, copy_function=shutil.copyfile, dirs_exist_ok=True
        )
    make_portable(out)


def name_class(folder: Path, name: str) -> None:
    _rewrite(folder / "tokenizer_config.json", lambda fields: {**fields, "tokenizer_class": name})


def put_template(folder: Path, source: str) -> None:
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    # The template of a processor, and others, were not used in the training. transformers would prefer some of them.
    (folder / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(folder / TEMPLATES, ignore_errors=True)

    def without_template(fields: dict[str, Any]) -> dict[str, Any]:
        if "chat_template" in fields:
            return {**fields, "chat_template": None}
        return fields

    _rewrite(folder / "tokenizer_config.json", without_template)


def end_with(folder: Path, ids: Sequence[int]) -> None:
    file = folder / GENERATION
    if not file.is_file():
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {
            name: shape[name]
            for name in ("bos_token_id", "pad_token_id")
            if shape.get(name) is not None
        }
        file.write_text(json.dumps(kept), encoding="utf-8")
    _rewrite(file, lambda fields: {**fields, ENDS: list(ids)})


def make_portable(folder: Path) -> None:
    """Rewrite the folder's JSON files of tokenizer and model without traces of a machine or of transformers 5."""
    _rewrite(folder / "tokenizer_config.json", _portable_tokenizer)
    for name in ("config.json", GENERATION):
        _rewrite(folder / name, portable_config)


def portable_config(tree: Any) -> Any:
    """Return a model's config without the folders that it or a part of it was loaded from; hub ids stay.

    Fields that transformers 5 renamed get their old name as well: transformers 4 would silently use its defaults.
    """
    if isinstance(tree, list):
        return [portable_config(value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    kept = {
        name: portable_config(value) for name, value in tree.items() if not _is_place(name, value)
    }
    # Rotary positions by the names of transformers 4; 5 reads both.
    rope = kept.get("rope_parameters")
    if (
        isinstance(rope, dict)
        and "rope_theta" in rope
        and not {"rope_theta", "rope_scaling"} & kept.keys()
    ):
        rest = {name: value for name, value in rope.items() if name != "rope_theta"}
        kept["rope_theta"] = rope["rope_theta"]
        if rest.get("rope_type", "default") != "default":
            kept["rope_scaling"] = rest
    return kept


def _rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    if not file.is_file():
        return
    fields = json.loads(file.read_text(encoding="utf-8"))
    kept = change(fields)
    if kept != fields:
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _portable_tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: value
        for name, value in fields.items()
        if name not in OF_A_MACHINE and not _is_place(name, value)
    }
    # transformers 5 has a new name for the class of fast tokenizers, and reads the old one; 4 knows only the old one.
    if kept.get("tokenizer_class") == "TokenizersBackend":
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    # In transformers 4 this key is a mapping, and the list is additional_special_tokens; 5 reads both.
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    return kept


def _is_place(name: str, value: Any) -> bool:
    # True for a path on some machine, whatever its system; a hub id such as ORG/NAME stays.
    if not isinstance(value, str) or not name.endswith(("_path", "_file")):
        return False
    absolute = posixpath.isabs(value) or ntpath.isabs(value) or ntpath.splitdrive(value)[0] != ""
    return absolute or value.startswith((".", "~"))
