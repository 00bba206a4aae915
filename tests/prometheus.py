"""A real Prometheus, and what the shipped panels and alerts find in it."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.ray_head import ROOT, free_port
from tests.waiting import until

RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
MINUTE = 60
CONFIG = f"""
global: {{scrape_interval: 60s, scrape_timeout: 30s}}
rule_files: [{RULES}]
scrape_configs: [{{job_name: test, static_configs: [{{targets: TARGETS}}]}}]
"""


def panels() -> dict[str, str]:
    """Return the queries of all panels, over all runs, by title and letter."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "olora_ray.json").read_text())
    return {
        f"{panel['title']} {target['refId']}": target["expr"].replace("$run", ".*")
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }


def alerts() -> dict[str, str]:
    """Return the alerts' conditions by name, such that they are 0 and not absent while an alert is silent."""
    found = {}
    for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]:
        condition = rule["expr"].replace(" > ", " > bool ")
        found[rule["alert"]] = re.sub(r"^absent\((.*)\)$", r"\1", condition)
    return found


def about(part: str) -> dict[str, str]:
    """Return the queries of panels and alerts on metrics in whose names `part` occurs."""
    queries = panels() | alerts()
    return {name: text for name, text in queries.items() if part in text}


@dataclass(frozen=True)
class Prometheus:
    url: str

    def ask(self, path: str, **words: Any) -> Any:
        answer = requests.get(f"{self.url}/api/v1/{path}", params=words, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def numbers(self, query: str, first: float, last: float) -> dict[str, list[float]]:
        """Return the numbers that a query gives at each minute, by the labels' values of the series."""
        found = self.ask("query_range", query=query, start=first, end=last, step=MINUTE)["result"]
        numbers = {}
        for series in found:
            values = [float(value) for _, value in series["values"]]
            numbers[" ".join(series["metric"].values())] = [
                value for value in values if not math.isnan(value)
            ]
        return numbers

    def blank(self, queries: Mapping[str, str], first: float, last: float) -> list[str]:
        """Return those of the queries that have no number at some minute from `first` to `last`."""
        minutes = int((last - first) // MINUTE) + 1
        return [
            name
            for name, text in queries.items()
            if minutes > max(map(len, self.numbers(text, first, last).values()), default=0)
        ]


@contextmanager
def prometheus(folder: Path, *targets: str, samples: str = "") -> Iterator[Prometheus]:
    """Run a server that scrapes HOST:PORT of each target once a minute; skip the test where none is installed.

    `samples` in OpenMetrics, with timestamps, are what it has scraped before.
    """
    server, tool = shutil.which("prometheus"), shutil.which("promtool")
    if not (server and tool):
        pytest.skip("Prometheus is not installed")
    data, config, address = folder / "data", folder / "prometheus.yaml", f"127.0.0.1:{free_port()}"
    config.write_text(CONFIG.replace("TARGETS", json.dumps(targets)))
    subprocess.run([tool, "check", "config", config], check=True)
    if samples:
        (folder / "samples").write_text(f"{samples}# EOF\n")
        words = [tool, "tsdb", "create-blocks-from", "openmetrics", folder / "samples", data]
        subprocess.run(words, check=True)
    command = [server, f"--config.file={config}", f"--storage.tsdb.path={data}"]
    # A value counts until the next scrape, not for five minutes.
    command += [f"--web.listen-address={address}", "--query.lookback-delta=75s"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            ready = [tool, "check", "ready", f"--url=http://{address}"]
            until(lambda: subprocess.run(ready, check=False).returncode == 0, pause=0.5)
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()
