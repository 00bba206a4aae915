import logging

import pytest

from olora_ray.tracking.prometheus import Telemetry


def test_what_goes_wrong_is_told_once_and_never_raised(caplog: pytest.LogCaptureFixture) -> None:
    watched = Telemetry("small")
    watched._metrics.clear()
    with caplog.at_level(logging.WARNING):
        watched.row({"train/loss": 1.0})
        watched.started(2, again=True)
    (record,) = caplog.records
    assert "no more metrics" in record.getMessage()


def test_a_name_that_ray_refuses_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    watched = Telemetry(3)  # type: ignore[arg-type]
    watched.row({"train/loss": 1.0})
    assert "no more metrics" in caplog.text
