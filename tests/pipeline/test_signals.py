"""Signals: a wish while somebody listens, an end at once elsewhere."""

import os
import signal
import threading
from collections.abc import Callable

import pytest

from olora_ray.cluster.connection import Stop
from olora_ray.common.errors import Stopped


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_at_once(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with Stop(), pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code
    name = {143: "SIGTERM", 130: "Ctrl+C"}[code]
    assert (
        capfd.readouterr().err == f"{name}: stopping at once\n"
    )  # the end of Ray may take a while
    assert str(caught.value) == f"stopped ({name}); run the same command again to resume"


def test_while_training_a_signal_is_a_wish_and_a_second_ctrl_c_an_end() -> None:
    with Stop() as stop:
        stop.gentle = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == "SIGTERM"
        granted = stop.stopped("stopped after step 3 of 8")
        assert (
            str(granted)
            == "stopped after step 3 of 8 (SIGTERM); run the same command again to resume"
        )
        assert granted.exit_code == 143
        os.kill(os.getpid(), signal.SIGTERM)  # the same one, through a second process
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.ray
def test_a_signal_ends_a_wait_for_ray(ray_with: Callable[[int], None]) -> None:
    """Ray drops an exception of a handler while it waits, unless it is a KeyboardInterrupt."""
    import ray

    ray_with(1)
    never = ray.remote(num_cpus=64)(lambda: None).remote()
    for number in (signal.SIGTERM, signal.SIGINT):
        timer = threading.Timer(1.0, os.kill, (os.getpid(), number))
        timer.start()
        with pytest.raises(Stopped) as caught, Stop():
            ray.get(never, timeout=30)
        assert caught.value.exit_code == 128 + number
