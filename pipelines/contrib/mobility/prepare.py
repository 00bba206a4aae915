"""Convert records of people's places into rows that ask for the next place, for pipelines/finetune.py.

    python pipelines/contrib/mobility/prepare.py RECORDS [RECORDS ...] --format checkins|foursquare|geolife --out FOLDER
        [--history 40] [--context 5] [--form short|hours|tuple] [--config CONFIG.yaml]
        [--rows train=2000,eval=64,test=600] [--turns 1] [--least N] [--seed 0]
        [--repair broken,unsorted,duplicates]

RECORDS    files or folders: csv of processed check-ins, TSMC2014's text files, or Geolife's Data folder
--out      folder for train.jsonl, eval.jsonl, test.jsonl (rows of format messages with a column user), stays.csv,
           places.csv and template.json
--history  largest number of earlier stays in a question, before the --context latest ones
--form     form of a stay: short: Mon 07:30 12; hours: Mon 7h 12; tuple: ('07:30 AM', 'Monday', 12), as in MoBLLM
--config   leave the oldest stays out of questions that are longer than this config's data.max_length in tokens of its
           model
--rows     number of rows to draw for a split; default: all
--turns    stays that a row of train.jsonl asks for, one after the other: the model trains on each of them, for a
           fraction of the tokens of separate rows. Rows of the other files ask for one stay, as a server does
--least    number of earlier stays that a target needs; default: one more than --context
--seed     seed of the drawing of --rows
--repair   faults to repair instead of stopping: broken and duplicates are left out, unsorted is sorted; the command
           prints how many

Each person's first 60 % of stays are targets in train.jsonl, the next 20 % in eval.jsonl, the rest in test.jsonl.

Exit codes: 0 the rows are written; 2 an error that you can fix.
"""

from collections.abc import Mapping
from pathlib import Path

import prompt
import readers
import rows
from stays import Repairs

from olora_ray.common.errors import UserError, as_user_error, short_reason
from olora_ray.common.text import plural
from olora_ray.config import command_line

OPTIONS = (
    "--format", "--out", "--history", "--context", "--form", "--config", "--rows", "--turns", "--least", "--seed",
    "--repair",
)  # fmt: skip


def main(argv: list[str]) -> None:
    parsed = command_line.parse(argv, __doc__ or "", options=OPTIONS)
    paths, options = parsed.names(), parsed.options
    if not paths or "--out" not in options or "--format" not in options:
        raise UserError("arguments RECORDS, --format and --out: needed; --help shows how")
    history, context = whole(options, "--history", 40), whole(options, "--context", 5)
    least, seed = whole(options, "--least", context + 1), whole(options, "--seed", 0)
    if not (turns := whole(options, "--turns", 1)):
        raise UserError("argument --turns: a row asks for one stay or more; set it to 1 or more")
    limits = row_limits(options.get("--rows", ""))
    repairs = Repairs([name for name in options.get("--repair", "").split(",") if name])
    settings = {"form": options.get("--form", "short"), "history": history, "context": context}
    # Wrong options are refused before the records are read, which may take minutes.
    prompt.Template(**settings)  # type: ignore[arg-type]
    records = readers.read(paths, options["--format"], repairs)
    timed = all(stay.duration is not None for stays in records.people.values() for stay in stays)
    template = prompt.Template(**settings, duration=timed and settings["form"] == "tuple")  # type: ignore[arg-type]
    fits = fitting(options["--config"]) if "--config" in options else None
    selection = rows.select(records.people, least, limits, seed, turns)
    if empty := [name for name in rows.SPLITS if not selection.targets[name]]:
        raise UserError(
            f"argument RECORDS: no row for {empty[0]}.jsonl; add records, lower --least, or ask for rows in --rows"
        )
    print(
        "\n".join(
            [
                f"read: {plural(len(records), 'stay')} of {len(records.people)} people",
                *repairs.lines(),
            ]
        )
    )
    with as_user_error(
        f"argument --out: {options['--out']}: cannot be written", OSError, reason=short_reason
    ):
        written = rows.write(Path(options["--out"]), records, selection, template, fits)
    print(
        "\n".join(
            [
                *written,
                f"not targets: {selection.too_early} stays with fewer than {least} before them",
            ]
        )
    )


def fitting(config_file: str) -> prompt.Fits:
    """Return the test that a question fits in data.max_length, in tokens of the config's model."""
    from olora_ray.cluster.decide import length_of
    from olora_ray.config.command_line import resolved
    from olora_ray.config.load import load_config
    from olora_ray.pipeline.base import open_base

    config = resolved(load_config(config_file, {}), Path.cwd())
    return prompt.fits(open_base(config).spec, length_of(config))


def whole(options: Mapping[str, str], name: str, default: int) -> int:
    text = options.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UserError(f"argument {name}: expected a whole number from 0 on, not {text!r}")
    return int(text)


def row_limits(text: str) -> dict[str, int]:
    """Return the numbers of rows in `train=2000,test=600`; raises UserError for another form."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    if wrong := [name for name, _, _ in pairs if name not in rows.SPLITS]:
        raise UserError(
            f"argument --rows: {wrong[0]!r} is not a split; expected one like train=2000,eval=64,test=600"
        )
    return {name: whole({"--rows": count}, "--rows", 0) for name, _, count in pairs}


if __name__ == "__main__":
    command_line.run(main)
