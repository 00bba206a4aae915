"""Show how the nights of a registered model went. This command asks MLflow
alone, from any machine, and writes nothing.

    python pipelines/nights.py MODEL [--within HOURS] [--tracking-uri URI]

MODEL           the registered model (registry.model)
--within        exit code 1 if the last good night is older than this many
                hours, or was never recorded
--tracking-uri  as for `olora-ray registry`

It prints the last good night, the champion with its verdict, loss and score,
how often the held-out rows were used, and the last decisions and failures. A
night is good if its call ended with exit code 0: promoted, refused or
unchanged.

Exit codes: 0 done; 1 no good night within --within; 2 an error that you can
fix; 75 MLflow is unreachable.
"""

import time

from olora_ray.common.errors import UserError
from olora_ray.common.logs import quiet_environment
from olora_ray.common.text import minute, paragraph, plural
from olora_ray.config import command_line
from olora_ray.tracking import old_versions, start
from olora_ray.tracking.aliases import registered

SHOWN = 5


def main(argv: list[str]) -> None:
    parsed = command_line.parse(
        argv or ["--help"], __doc__ or "", options=["--within", "--tracking-uri"]
    )
    if len(parsed.words) != 1:
        raise UserError("usage: olora-ray nights MODEL [--within HOURS] [--tracking-uri URI]")
    name = parsed.words[0]
    within = parsed.options.get("--within")
    if within is not None and not within.replace(".", "", 1).isdecimal():
        raise UserError(f"argument --within: {within!r}; expected a number of hours")
    quiet_environment()  # before MLflow is imported
    aliases = registered(start.chosen_uri(parsed.options.get("--tracking-uri")), name)
    from olora_ray.retrain.decision_run import nights

    found = nights(aliases)
    now = time.time()
    age = float("inf")
    if found.good:
        age = (now - found.good) / 3600
        print(f"last good night: {minute(found.good)}, {age:.1f} hours ago")
    else:
        print("last good night: none is recorded")
    if found.champion is None:
        print("champion:        none")
    else:
        verdict = found.champion.verdict or "set by another program"
        number = found.champion.number
        print(
            paragraph(
                f"champion:        version {number} since {minute(found.since)}: {verdict}", 17
            )
        )
        print(f"its loss:        {found.champion.losses or 'not measured'}")
        print(f"its score:       {found.champion.tags.get('olora.score') or 'not measured'}")
        size = old_versions.size(aliases, found.champion)
        count = plural(len(aliases.versions()), "version")
        print(f"its files:       {size:,} bytes in MLflow, which has {count}")
    if found.uses:
        days = plural(round((now - found.used_since) / 86400), "day")
        print(f"held-out rows:   {plural(found.uses, 'version')} decided on them in {days}")
    for run in found.decisions[:SHOWN]:
        version = run.get("olora.challenger", "").rpartition("/")[2]
        what = run["olora.decision"]
        if version:
            what += f" version {version}"
        print(paragraph(f"{minute(float(run['when']))} {what}: {run['olora.reason']}", 17))
    if within is not None and age > float(within):
        raise SystemExit(1)


if __name__ == "__main__":
    command_line.run(main)
