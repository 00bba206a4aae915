"""What programs compare of a version is one tag, and is read from versions of before too."""

import json

import pytest

from olora_ray.pipeline.run_folder import TAGS
from olora_ray.retrain.decision_run import DETAILS
from olora_ray.retrain.recipe import AGAINST
from olora_ray.tracking import checksums

ENTRIES = {"olora.base_digest": "b", "olora.data_digest": "d", "olora.checksums": "c"}
SHOWN = {"olora.method": "olora", "olora.gate": "passed"}


def test_folded_and_unfolded_are_the_same_tags() -> None:
    folded = checksums.folded({**ENTRIES, **SHOWN})
    assert folded.keys() == {*SHOWN, checksums.RECORD_TAG}
    assert checksums.unfolded(folded) == {**ENTRIES, **SHOWN}
    assert checksums.folded(SHOWN) == SHOWN


def test_tags_of_versions_of_before_count_as_they_are() -> None:
    assert checksums.unfolded({**ENTRIES, **SHOWN}) == {**ENTRIES, **SHOWN}
    both = {**checksums.folded(ENTRIES), "olora.data_digest": "of before"}
    assert checksums.unfolded(both) == ENTRIES


def test_entries_of_before_stay_and_other_tags_are_not_written_again() -> None:
    before = checksums.folded({**ENTRIES, **SHOWN})
    after = checksums.folded({"olora.data_digest": "new", "olora.rank": "4"}, before)
    assert checksums.unfolded(after) == {**ENTRIES, "olora.data_digest": "new", "olora.rank": "4"}


def test_what_the_gate_has_decided_is_one_tag() -> None:
    first = checksums.folded({AGAINST: "1", DETAILS: "{}", "olora.gate": "passed"})
    assert first.keys() == {checksums.GATE_TAG, "olora.gate"}
    assert checksums.unfolded({**first, AGAINST: "of before"})[AGAINST] == "1"
    assert checksums.folded({"olora.rank": "4"}, first) == {"olora.rank": "4"}, "registering again says nothing of it"


@pytest.mark.parametrize(
    "text", ["", "nothing", "[]", "3", '{"olora.gate": "passed", "olora.checksums": 3}', "[" * 9999]
)
def test_a_record_that_somebody_has_written_is_none(text: str) -> None:
    assert checksums.unfolded({checksums.RECORD_TAG: text, **SHOWN}) == SHOWN


def test_what_is_compared_is_in_the_record() -> None:
    assert {*TAGS.values(), checksums.TAG, checksums.RUN} == checksums.ENTRIES[checksums.RECORD_TAG]
    assert {AGAINST, DETAILS} == checksums.ENTRIES[checksums.GATE_TAG]
    assert json.loads(checksums.folded(ENTRIES)[checksums.RECORD_TAG]) == ENTRIES
