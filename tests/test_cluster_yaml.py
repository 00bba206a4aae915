import json
from pathlib import Path

import jsonschema
import ray.autoscaler
import yaml


def test_cluster_yaml_is_valid_for_rays_launcher() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((Path(__file__).parents[1] / "cluster.yaml").read_text()), schema)
