"""The verdict: what is exact decides, and its words say where."""

import json
from dataclasses import replace

from olora_ray.adapter.merge import Worst
from olora_ray.adapter.parity import AsPeftReads, Difference, Logits, MergedFolder, Parity

LOGITS = Logits(115, 40.0, 2.0, 1e-5, 0.04, Difference(1e-5, 3e-4), Difference(0.0, 3e-4))
RIGHT = Parity(MergedFolder(Worst(0.99, "a.up", "bfloat16"), ()), AsPeftReads(7e-8, "a.up", ()), LOGITS)


def test_a_right_export_is_right_and_kept_as_json() -> None:
    assert RIGHT.ok
    stored = json.loads(json.dumps(RIGHT.to_json()))
    assert stored["ok"] is True
    assert stored["merged"]["weights"] == {"error": 0.99, "layer": "a.up", "stored": "bfloat16"}
    assert stored["logits"]["merged"]["bound"] == 3e-4


def test_a_run_without_merged_folder_or_logits_is_judged_by_the_adapter() -> None:
    assert Parity(None, RIGHT.peft, "too large").ok
    assert not Parity(None, replace(RIGHT.peft, error=2e-5), "too large").ok


def test_each_error_is_one_line_that_names_the_layer() -> None:
    wrong = Parity(
        MergedFolder(Worst(3.5, "a.up", "bfloat16"), ("x.safetensors: byte 9 (of norm) is not the base's",)),
        AsPeftReads(0.5, "a.down", ()),
        LOGITS,
    )
    first, second, third = wrong.problems()
    assert first == "merged folder: x.safetensors: byte 9 (of norm) is not the base's"
    assert "the merged weight of a.up is 3.5 roundings" in second
    assert "the change of a.down is off by 0.5 of its size" in third


def test_layers_that_peft_reads_otherwise_are_told_instead_of_an_error_of_theirs() -> None:
    wrong = replace(RIGHT, peft=AsPeftReads(float("inf"), "", ("PEFT does not adapt a.up",)))
    assert wrong.problems() == ["adapter folder: PEFT does not adapt a.up"]


def test_logits_refuse_only_what_else_seems_right() -> None:
    wrong = replace(RIGHT, logits=replace(LOGITS, merged=Difference(0.1, 3e-4)))
    assert wrong.problems() == [
        "logits of the merged model differ from the adapted model's by 0.1; rounding explains 0.0003"
    ]


def test_nan_is_no_parity() -> None:
    nan = float("nan")
    assert not replace(RIGHT, merged=MergedFolder(Worst(nan, "a", "float32"), ())).ok
    assert not replace(RIGHT, peft=AsPeftReads(nan, "a", ())).ok
    assert not replace(RIGHT, logits=replace(LOGITS, peft=Difference(nan, 1.0))).ok
