import pytest

from olora_ray.pipeline.prometheus import Telemetry


def test_a_name_that_ray_refuses_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    watched = Telemetry(3)  # type: ignore[arg-type]
    watched.row({"train/loss": 1.0})
    assert "no longer exported to Prometheus" in caplog.text
