"""What a training on the cluster is given: Train's controller unpacks it without torch, half of its start."""

import sys
from pathlib import Path
from typing import Any

import cloudpickle

from olora_ray.cluster.group import ray_trainer
from olora_ray.cluster.spec import TrainSpec
from olora_ray.model.source import BaseModel
from tests import tiny
from tests.pipelines import project
from tests.ran import ran

UNPACK = """
import pickle, sys
import ray.train.v2._internal.execution.controller.controller
with open(sys.argv[1], "rb") as file:
    context, *rest = pickle.load(file)
print(context.backend_config.backend, context.backend_config.backend_cls.__name__, "torch" in sys.modules)
print(*(type(each).__name__ for each in rest[0]))
"""


def test_the_controller_needs_no_torch(tmp_path: Path) -> None:
    from ray.train.v2._internal.execution.failure_handling import create_failure_policy
    from ray.train.v2._internal.execution.scaling_policy import create_scaling_policy

    config = tiny.config(run__storage=str(tmp_path))
    nothing: Any = None
    spec = TrainSpec(
        config, BaseModel("tiny", str(tmp_path), "digest"), "digest", (0,), nothing, None
    )
    found = ray_trainer(spec, config.folder(), {"CPU": 1.0}, None, 2)
    given = (
        found.train_run_context,
        found._create_default_callbacks(),
        create_scaling_policy(found.scaling_config),
        create_failure_policy(found.run_config.failure_config),
    )
    (tmp_path / "given").write_bytes(cloudpickle.dumps(given))
    command = [sys.executable, "-c", UNPACK, str(tmp_path / "given")]
    done = ran(command, code=None, cwd=project.ROOT)
    first, callbacks = done.stdout.splitlines()
    assert first.split() == ["gloo", "TogetherBackend", "False"], done.stderr
    assert "BackendSetupCallback" in callbacks
    assert "DatasetsCallback" not in callbacks, "a process for datasets that there are not"
    assert "PlacementGroupCleaner" not in callbacks, (
        "a process that asks a dashboard which there is not"
    )
