"""Write the model of a finished run, or a registered version, into a folder
that others can use. Starts no Ray.

    olora-ray export RUN|NAME@ALIAS --to FOLDER [--form FORM] [--quantize TYPE]
        [section.field=value ...]

RUN         name of a finished run in ./runs, or its folder; stays as it is
NAME@ALIAS  a registered model and its alias, or NAME@VERSION: its files are
            verified as whenever a version is loaded
--to        a new or empty folder; it is written whole or not at all
--form      adapter (for PEFT, vLLM), merged (for transformers, vLLM), gguf (for
            llama.cpp), ollama (gguf and a Modelfile), or that of an installed
            package; default: merged, or adapter for a run with export.merged:
            false
--quantize  precision of gguf and ollama: f32, f16, bf16, q8_0 (default), or
            q4_k_m by llama.cpp's llama-quantize

What is written is compared with the trained adapter on its base model. Nothing
is registered.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olora_ray.common import node_cache, records, storage
from olora_ray.common.errors import UserError
from olora_ray.config import command_line
from olora_ray.config.load import with_model
from olora_ray.config.schema import Config
from olora_ray.config.tables import EXPORTERS, FORMS
from olora_ray.evaluation.chat import finished_run

if TYPE_CHECKING:
    from olora_ray.pipeline.files_for_others import Given


def main(argv: list[str]) -> None:
    options = ["--to", "--form", "--quantize"]
    arguments = command_line.parse(argv, usage=__doc__ or "", options=options)
    names = [word for word in arguments.words if "=" not in word]
    to = arguments.options.get("--to")
    if len(names) != 1 or not to:
        raise UserError("usage: olora-ray export RUN|NAME@ALIAS --to FOLDER; see --help")
    target = Path(command_line.absolute(to))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"argument --to: {target} has files; name a new or an empty folder")
    form = arguments.options.get("--form")
    quantize = arguments.options.get("--quantize")
    _check_form(form, quantize)
    from olora_ray.pipeline import files_for_others

    with given(names[0], arguments.changes()) as found:
        form = form or found.form
        target.parent.mkdir(parents=True, exist_ok=True)
        checked = files_for_others.write(found, form, quantize or "q8_0", target)
    sizes = sizes_in(target)
    print(
        f"{found.about} as {form}: {target} ({len(sizes)} files, {sum(sizes.values()):,} bytes); {checked}"
    )


def _check_form(form: str | None, quantize: str | None) -> None:
    from olora_ray.pipeline.exporter import exporter_named

    if form is None or form in FORMS:
        if quantize:
            raise UserError(
                "argument --quantize: only for --form gguf or ollama; leave it out, or add --form gguf"
            )
    elif not EXPORTERS.knows(form):
        raise UserError(f"argument --form: {EXPORTERS.unknown(form, FORMS)}")
    elif quantize and quantize not in exporter_named(form).options:
        known = ", ".join(exporter_named(form).options)
        raise UserError(f"argument --quantize: {quantize} is none of {known}")


@contextmanager
def given(name: str, changes: Mapping[str, Any]) -> Iterator["Given"]:
    """Yield what the run or the version `name` has kept; raise UserError if there is none or its base has changed."""
    from olora_ray.common.logs import quiet_transformers
    from olora_ray.evaluation import targets
    from olora_ray.pipeline.base import parts
    from olora_ray.pipeline.files_for_others import Given
    from olora_ray.pipeline.run_folder import RunFolder
    from olora_ray.tracking import models

    quiet_transformers()
    uri = models.uri_of(name)
    if uri:
        # A scorer in Python that the run's config names is not needed here.
        own = targets.settings_of_version(uri, {"evaluation.scorer": None, **changes})
        config = with_model(own, uri)
        entry = models.of_config(config)
        assert entry
        name = entry.version.name
        about = f"{name} version {entry.version.number}"
        if entry.base is None:
            yield Given(name, about, config, None, None, entry.folder, system=entry.system)
        else:
            own, base, _ = parts(entry, entry.base, config)
            yield Given(name, about, own, entry.folder, base, None, system=entry.system)
        return
    root = finished_run(name)
    own = targets.settings([root], None, changes)
    assert isinstance(own, Config)
    result = records.read(storage.join(root, "result.json"), dict[str, Any]) or {}
    known = (result.get("base") or {}).get("digest")
    base, config = targets.base_of(root, known, own, own)
    run = Path(root).name
    folder = RunFolder(root)
    with ExitStack() as stack:
        adapter = stack.enter_context(node_cache.fetched(folder.adapter))
        merged = None
        compressed = False
        if storage.exists(storage.join(folder.merged, "config.json")):
            merged = stack.enter_context(node_cache.fetched(folder.merged))
            compressed = own.export.rank is not None
        yield Given(run, f"run {run}", config, adapter, base, merged, compressed)


def sizes_in(folder: Path) -> dict[str, int]:
    """Return path -> bytes of the files below a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
