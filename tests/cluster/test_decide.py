"""Decisions are functions of the config, of facts, and of what a run keeps."""

from typing import Any

import pytest

from olora_ray.cluster.decide import DataFacts, Lengths, decide_data, decide_evaluation
from olora_ray.cluster.preflight import ClusterFacts
from olora_ray.config.decided import Kept
from olora_ray.config.load import override
from olora_ray.config.schema import Config
from olora_ray.config.section import Source
from tests import tiny
from tests.refused import refused
from tests.tokens import helpers

AUTO = {"data.max_length": "auto", "data.packing": "auto"}


def asked(**changes: Any) -> Config:
    return override(tiny.config(), AUTO | changes)


def lengths(longest: int, over: int = 0) -> Lengths:
    return Lengths(longest, rows=9, exact=True, over=over, most=1024)


@pytest.mark.parametrize(("longest", "number"), [(10, 256), (300, 320), (2000, 1024)])
def test_the_length_is_enough_for_the_longest_row(longest: int, number: int) -> None:
    found = decide_data(asked(), helpers.spec(), DataFacts(lengths=lengths(longest)))
    assert found.config.data.max_length == number
    assert "9 rows" in found.decisions["data.max_length"].why


def test_plain_text_has_no_longest_row() -> None:
    with refused("data.max_length"):
        decide_data(asked(), helpers.spec(), DataFacts(lengths=lengths(0)))


@pytest.mark.parametrize("apart", [None, "has a convolution"])
def test_examples_are_packed_unless_the_model_would_mix_them(apart: str | None) -> None:
    spec = helpers.spec(apart=apart)
    found = decide_data(asked(), spec, DataFacts(lengths=lengths(300)))
    assert found.config.data.packing is (apart is None)
    said = decide_data(asked(**{"data.packing": False}), spec, DataFacts(lengths=lengths(300)))
    assert (said.config.data.packing, "data.packing" in said.decisions) == (False, False)


def test_the_chat_of_completions_follows_from_the_model_and_that_of_other_formats_stays() -> None:
    source = Source(path="a.jsonl", format="prompt_completion", fields={"prompt": "q"})
    facts = DataFacts({"data.train.0": source}, lengths(300))
    found = decide_data(asked(), helpers.spec(), facts)
    (train,) = found.config.data.train
    assert (train.format, train.fields, train.chat) == (
        "prompt_completion",
        {"prompt": "q"},
        helpers.spec().has_template,
    )
    tokens = DataFacts({"data.train.0": Source(path="a.jsonl", format="tokens")}, lengths(300))
    assert decide_data(asked(), helpers.spec(), tokens).config.data.train[0].chat == "auto"


def test_a_resumed_run_keeps_what_its_bytes_depend_on() -> None:
    """Without looking at its rows, which may be gone; of an older version it reads config.yaml."""
    kept = Kept(
        {
            "data.max_length": 704,
            "data.packing": "auto",
            "data.train.0.format": "alpaca",
            "data.train.0.fields.output": "answer",
        }
    )
    found = decide_data(asked(), helpers.spec(), DataFacts(), kept).config
    assert (found.data.max_length, found.data.packing) == (704, True)
    assert found.data.train[0].format == "alpaca"
    assert found.data.train[0].fields == {"output": "answer"}


def test_an_evaluation_decides_without_a_training() -> None:
    config = override(tiny.config(), {"cluster.workers": "auto", "train.micro_batch": "auto"})
    alone = decide_evaluation(config, ClusterFacts((), False, 1, 1))
    assert (alone.cluster.workers, alone.cluster.gpus_per_worker) == (2, 0.0)
    assert (alone.train.micro_batch, alone.train.activation_checkpointing) == (4, False)
    many = decide_evaluation(config, ClusterFacts((), True, 3, 8))
    assert (many.cluster.workers, many.cluster.gpus_per_worker) == ((3, 8), 1.0)
    with refused("data.max_length"):
        decide_evaluation(asked(), ClusterFacts((), False, 1, 1))
