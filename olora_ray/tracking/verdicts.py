"""Verdicts on a version in its description: what the gate and people have decided, for the readers of MLflow's page.

What counts are the version's tags and the model's aliases; these lines only tell of them.
"""

from olora_ray.tracking.client import connect, reachable
from olora_ray.tracking.models import DESCRIPTION_LENGTH

HEADING = "### Verdicts"
_LONGEST = 2000
"""Characters of all verdicts on a version; of more the latest are kept."""


def add(tracking_uri: str, name: str, number: str, line: str) -> None:
    """Add a line to a version's description, unless it is the last already; raises TrackingUnavailable."""
    with reachable(tracking_uri):
        client = connect(tracking_uri)
        text = client.get_model_version(name, number).description or ""
        client.update_model_version(name, number, with_line(text, line))


def with_line(description: str, line: str) -> str:
    """The description with one more verdict at its end."""
    body, _, verdicts = description.partition(HEADING)
    lines = [each for each in verdicts.split("\n") if each]
    new = "- " + " ".join(line.split())[:_LONGEST]
    if lines[-1:] != [new]:
        lines.append(new)
    while sum(map(len, lines)) + len(lines) > _LONGEST and len(lines) > 1:
        del lines[0]
    section = "\n".join([HEADING, "", *lines])
    return f"{body.rstrip()[: DESCRIPTION_LENGTH - len(section) - 2]}\n\n{section}".lstrip()
