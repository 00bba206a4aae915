"""MLflow's database without a run: its tables are made once a process, which takes a second, and then copied."""

import tempfile
from functools import cache
from pathlib import Path


def place(folder: Path) -> Path:
    """The folder, which is made if needed, with an mlflow.db that has all tables and nothing in them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mlflow.db").write_bytes(_empty())
    return folder


@cache
def _empty() -> bytes:
    from mlflow.store.db import utils

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mlflow.db"
        engine = utils.create_sqlalchemy_engine(f"sqlite:///{file}")
        utils._initialize_tables(engine)
        engine.dispose()
        return file.read_bytes()
