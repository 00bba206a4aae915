"""Pictures of the pages of a world outside, by a real browser: python -m tests.outside.pictures FOLDER."""

import os
import sys
from pathlib import Path

from tests import browser
from tests.demos import page

ALIASES = {"candidate": "1"}


def main(folder: Path) -> None:
    """Paint Prometheus' graph of the loss, and MLflow's page of the registered model."""
    query = "g0.expr=ray_olora_loss&g0.tab=graph&g0.range_input=10m"
    browser.screenshot(f"http://head:9090/query?{query}", folder / "prometheus.png", patience=15)
    account = (os.environ["USER_NAME"], os.environ["PASSWORD"])
    page.show("http://mlflow.internal:5000", account, "small", ALIASES, folder / "mlflow.png")
    print("pictures:", *sorted(each.name for each in folder.iterdir()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
