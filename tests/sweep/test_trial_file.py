import errno
from dataclasses import replace
from pathlib import Path

import pytest

from olora_ray.common.errors import StoreUnavailable, TryAgain, UserError
from olora_ray.sweep import record as trial_file
from olora_ray.sweep.record import TrialRecord
from tests.said import said


def record(number: int = 3) -> TrialRecord:
    return TrialRecord(number, {"train.lr": 1e-3}, "unfinished")


def test_a_trial_that_begins_anew_keeps_what_led_to_its_checkpoint(tmp_path: Path) -> None:
    """Its training resumes from the checkpoint, and measures only later steps."""
    first = trial_file.TrialFile(str(tmp_path), record(), "min")
    for step, value in ((4, 0.5), (8, 1.0), (12, 0.8)):
        first.measured(step, value)
    second = trial_file.TrialFile(str(tmp_path), record(), "min")
    assert second.record.curve == ()  # the training reports the checkpoint's history again
    second.keep_curve(8)
    second.measured(16, 0.9)
    assert second.record.curve == ((4, 0.5), (8, 1.0), (16, 0.9))
    assert second.record.value == 0.5
    other = trial_file.TrialFile(str(tmp_path), replace(record(), params={"train.lr": 2e-3}), "min")
    other.keep_curve(16)
    assert other.record.curve == ()


def test_the_folder_of_a_record_is_where_it_lies(tmp_path: Path) -> None:
    """Regression: after a search was moved, the best trial was exported from the old folder."""
    trial_file.TrialFile(str(tmp_path / "old" / "trials" / "trial-003"), record(), "min").begin()
    (tmp_path / "old").rename(tmp_path / "new")
    [found] = trial_file.read_all(str(tmp_path / "new")).values()
    assert found.folder == f"{tmp_path}/new/trials/trial-003"


def test_a_process_that_comes_late_leaves_the_record_as_it_is(tmp_path: Path) -> None:
    """Tune may run a trial in a free process before the process that it started for the trial is ready."""
    kept = trial_file.TrialFile(str(tmp_path), record(), "min")
    kept.begin()
    kept.ended("failed", "step 2: the loss is not finite")
    late = trial_file.TrialFile(str(tmp_path), record(), "min")
    assert trial_file.read_record(str(tmp_path)) == kept.record
    late.begin()
    found = trial_file.read_record(str(tmp_path))
    assert found.status == "unfinished"


def test_a_storage_that_refuses_a_write_does_not_end_the_trial(tmp_path: Path) -> None:
    kept = trial_file.TrialFile(str(tmp_path), record(), "min")
    (tmp_path / "trial.json").mkdir()
    with said() as lines:
        kept.begin()
        kept.measured(4, 0.5)
    assert (
        lines
        == [
            f"warning: {tmp_path}/trial.json: cannot be written now (Is a directory); the trial continues"
        ]
        * 2
    )
    (tmp_path / "trial.json").rmdir()
    kept.measured(8, 0.4)
    found = trial_file.read_record(str(tmp_path))
    assert found.curve == ((4, 0.5), (8, 0.4))


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (StoreUnavailable("no answer"), TryAgain, 75),
        (OSError(errno.EIO, "Input/output error"), UserError, 2),
    ],
)
def test_a_record_that_cannot_be_read_now_does_not_count_as_missing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: OSError,
    kind: type[UserError],
    code: int,
) -> None:
    """Regression: a report silently lacked trials while the storage failed."""
    place = tmp_path / "trials" / "trial-003"
    trial_file.TrialFile(str(place), record(), "min").begin()

    def fail(_: str) -> bytes:
        raise error

    monkeypatch.setattr(trial_file.storage, "read_bytes", fail)
    with pytest.raises(OSError, match=str(error.args[-1])):
        trial_file.read_record(str(place))
    with pytest.raises(kind, match=r"trials: cannot read the records of the trials: ") as told:
        trial_file.read_all(str(tmp_path))
    assert told.value.exit_code == code
