"""The dry run of a retraining: what a call would do now, or the error with which it would stop.

It starts no Ray and changes neither the registry nor a run folder. It reads the data as the night does, and keeps their
digests, so that the night need not read them again.
"""

import numpy as np

from olora_ray.common.secrets import mask
from olora_ray.common.text import duration, paragraph, plural, some
from olora_ray.config.schema import Config
from olora_ray.retrain import recipe
from olora_ray.retrain.recipe import Inputs
from olora_ray.retrain.run import lock_of
from olora_ray.tracking.aliases import Aliases
from olora_ray.tracking.checksums import Version
from olora_ray.tracking.run import took


def dry_run(config: Config) -> None:
    """Print what a retraining would do; raise UserError or TrackingUnavailable as it would."""
    lock_of(config)  # refuses a config without a registered model
    aliases = Aliases.of(config)
    inputs = recipe.read_inputs(config)
    to_beat = recipe.version_to_beat(aliases)
    champion = to_beat.version
    if champion is not None:
        champion.refuse_changed()
    done = recipe.find_decision(to_beat.versions, champion, inputs.fingerprint)
    if done is None:
        facts = _training(inputs, champion)
    else:
        verdict = to_beat.role if done is champion else done.verdict
        facts = {"tonight": f"nothing changed since version {done.number} ({verdict})"}
    times = []
    for version in to_beat.versions[-3:]:
        seconds = took(aliases.uri, version.run_id)
        if seconds is not None:
            times.append(f"version {version.number} took {duration(seconds)}")
    facts["time"] = ", ".join(times) or "unknown: no training of this model has ended yet"
    for name, text in facts.items():
        print(paragraph(f"{name:11}{text}", 11))


def _training(inputs: Inputs, champion: Version | None) -> dict[str, str]:
    # Raises the error of a gate that nothing could pass, and of data that have shrunk.
    wanted, _ = recipe.training_config(inputs.config, inputs, champion)
    plan = inputs.plan
    gate = inputs.config.gate
    facts = {
        "tonight": "train the first version: there is no champion yet",
        "from": f"the base model {mask(inputs.base.model.shown())}",
        "rows": f"{plan.file_rows:,} in {plural(len(plan.files), 'file')}",
        "held out": f"about {round(inputs.held_out.rows):,} rows",
        "gate": "compares with no champion; only the conditions of gate.and count",
    }
    if champion is None:
        return facts
    facts["tonight"] = f"train, because of changed {recipe.changed(inputs, champion)}"
    facts["gate"] = (
        f"{gate.metric} against version {champion.number};"
        f" the held-out rows are enough (gate.min_rows={gate.min_rows})"
    )
    if wanted.train.start is not None:
        facts["from"] = f"the adapter of version {champion.number}"
    known = recipe.of_version(inputs.config, champion)
    if known is not None:
        units = plan.pieces.units
        sizes = np.bincount(units["file"], units["rows"], len(plan.files))
        new = []
        for size, each in zip(sizes, plan.files, strict=True):
            if each.sha256 not in known.files:
                new.append(f"{each.file.uri.rpartition('/')[2]} ({size:,.0f} rows)")
        facts["new files"] = some(new, 5) or "none"
    return facts
