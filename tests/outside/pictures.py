"""Pictures of the pages of a world outside, by a real browser: python -m tests.outside.pictures FOLDER."""

import os
import re
import sys
from pathlib import Path

from tests import browser
from tests.outside import page

ALIASES = {"candidate": "1"}


def main(folder: Path) -> None:
    """Paint Prometheus' graph of the loss, and MLflow's page of the registered model."""
    # The page that Debian packages.
    graph = "http://head:9090/classic/graph?g0.expr=ray_olora_loss&g0.tab=0&g0.range_input=10m"
    assert re.search("Total time series: [1-9]", browser.dom(graph, patience=15)), "Prometheus' graph shows no series"
    browser.screenshot(graph, folder / "prometheus.png", patience=15)
    account = (os.environ["USER_NAME"], os.environ["PASSWORD"])
    page.show("http://mlflow.internal:5000", account, "small", ALIASES, folder / "mlflow.png")
    print("pictures:", *sorted(each.name for each in folder.iterdir()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
