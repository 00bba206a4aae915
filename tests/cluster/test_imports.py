"""What each process imports before it can do its work: the time to the first step is made of that."""

import sys

import pytest

from tests.pipelines import project
from tests.ran import ran

TORCH = ("torch", "transformers", "peft", "mlflow", "datasets", "sklearn")


@pytest.mark.parametrize(
    ("what", "modules", "unwanted"),
    [
        ("entry script", "pipelines.finetune", ("ray", "pandas", *TORCH)),
        ("table of runs", "olora_ray.pipeline.runs", ("ray", "pandas", *TORCH)),
        ("first look at the data", "olora_ray.data.detect", ("ray", "pandas", *TORCH)),
        ("channel", "olora_ray.cluster.channel", ("ray.train", "ray.data", "pandas", *TORCH)),
        (
            "Train's controller",
            "olora_ray.cluster.train_backend, ray.train.v2._internal.execution.controller.controller",
            TORCH,
        ),
        (
            "worker",
            "olora_ray.cluster.worker",
            ("torch.distributed.tensor", "olora_ray.pipeline.fit", *TORCH[1:]),
        ),
        (
            "driver",
            "olora_ray.pipeline.run",
            ("torch.distributed.tensor", "mlflow", "datasets", "peft", "sklearn"),
        ),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(
    what: str, modules: str, unwanted: tuple[str, ...]
) -> None:
    code = f"import {modules}, sys\nprint(*(name for name in {unwanted!r} if name in sys.modules))"
    done = ran([sys.executable, "-c", code], cwd=project.ROOT)
    assert done.stdout.split() == [], what
