"""Row results give metrics whose bootstrap rows are the same numbers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from olora_ray.adapter.peft_folder import write_adapter
from olora_ray.common.errors import UserError
from olora_ray.evaluation import held_out
from olora_ray.evaluation.held_out import Measurer
from olora_ray.evaluation.rows import RowResults, compare
from olora_ray.model.source import BaseModel
from olora_ray.train.generate import questions
from tests import tiny

ORIGINS = ((0, 0), (0, 1), (1, 0))
ROWS = RowResults("store", (2, 3, 5), (4.0, 3.0, 20.0), {"exact_match": {0: 1.0, 2: 0.0}}, ORIGINS)
BETTER = RowResults("store", (2, 3, 5), (2.0, 3.0, 15.0), {"exact_match": {0: 1.0, 2: 1.0}}, ORIGINS)


def test_metrics_are_means_over_tokens_and_over_answers() -> None:
    assert ROWS.metric("eval/loss") == pytest.approx(2.7)
    assert ROWS.metric("eval/perplexity") == pytest.approx(math.exp(2.7))
    assert ROWS.metric("eval/exact_match") == 0.5
    assert ROWS.names() == ["eval/loss", "eval/perplexity", "eval/exact_match"]


@pytest.mark.parametrize("name", ["eval/bleu", "exact_match", "train/loss"])
def test_an_unknown_metric_is_named_with_those_there_are(name: str) -> None:
    with pytest.raises(UserError, match=f"metric {name}: .*eval/loss, eval/perplexity, eval/exact_match"):
        ROWS.metric(name)


@pytest.mark.parametrize("name", ROWS.names())
def test_the_middle_of_a_comparison_is_the_difference_of_the_metrics(name: str) -> None:
    found = compare(name, BETTER, ROWS).interval
    assert found.mean == pytest.approx(BETTER.metric(name) - ROWS.metric(name))
    assert found.low <= found.mean <= found.high


def test_other_tokens_are_not_compared() -> None:
    with pytest.raises(UserError, match="other held-out tokens"):
        compare("eval/loss", ROWS, RowResults("other", (2,), (1.0,), {}, ((0, 0),)))


def test_results_read_back() -> None:
    assert RowResults.from_json(ROWS.to_json()) == ROWS


@pytest.mark.parametrize("damage", ['"origins"', '"scores"', '"tokens": [2'])
def test_what_is_no_result_is_an_error_that_its_reader_expects(damage: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        RowResults.from_json(ROWS.to_json().replace(damage, '"x": [1'))


def test_some_of_the_rows() -> None:
    part = ROWS.only([2, 0])
    assert (part.tokens, part.losses, part.origins) == ((5, 2), (20.0, 4.0), ((1, 0), (0, 0)))
    assert part.scores == {"exact_match": {1: 1.0, 0: 0.0}}
    assert ROWS.only([1]).scores == {"exact_match": {}}
    assert math.isnan(ROWS.only([1]).metric("eval/exact_match"))


def test_rows_of_the_store_that_come_from_one_row_of_a_file_are_one_group() -> None:
    """A chat that its template splits gives an example an answer, a long text several pieces."""
    whole = compare("eval/loss", BETTER, ROWS)
    assert (whole.rows, whole.groups) == (3, 3)
    same = [
        RowResults(one.data, one.tokens, one.losses, one.scores, ((0, 0), (0, 0), (1, 0))) for one in (BETTER, ROWS)
    ]
    assert compare("eval/loss", *same).groups == 2
    assert compare("eval/loss", *same, groups=[0, 0, 0]).groups == 1


@pytest.mark.parametrize("attention", ["segments", "sdpa"])
def test_each_example_has_the_loss_it_has_alone(model_folder: Path, attention: str) -> None:
    measurer = Measurer(
        base(model_folder), None, tiny.config(model__attention=attention, model__dtype="float32"), (1,), TRIED
    )
    packs = [tiny.pack(40, 30, 25, seed=1), tiny.pack(50, seed=2)]
    found = measurer(tuple(packs))
    assert found == pytest.approx([plain_loss(measurer.model, item) for item in tiny.unpacked(packs)], rel=1e-5)


def test_answers_of_an_adapter_are_those_of_the_adapted_model(model_folder: Path, tmp_path: Path) -> None:
    settings = tiny.config(model__dtype="float32", evaluation__max_new_tokens=6)
    trainer = tiny.trainer(settings, "segments", held_out.load(base(model_folder), None, settings, torch.device("cpu")))
    trainer.flat.vector.copy_(0.1 * torch.randn(trainer.flat.vector.shape, generator=torch.Generator().manual_seed(0)))
    weights = {name: layer.weights() for name, layer in trainer.adapted.items()}
    write_adapter(weights, settings.adapter, str(model_folder), tmp_path / "adapter", trainer.loss.model)

    store: Any = tiny.store(2)
    packs, asked = tuple(store[i] for i in range(2)), tuple(questions(store, 5))
    measurer = Measurer(base(model_folder), str(tmp_path / "adapter"), settings, (1,), TRIED)
    plain = Measurer(base(model_folder), None, settings, (1,), TRIED)
    expected = [plain_loss(trainer.loss.model, item) for item in tiny.unpacked(packs)]
    assert measurer(packs) == pytest.approx(expected, rel=1e-4)
    assert plain(packs) != pytest.approx(expected, rel=1e-2)
    assert measurer(asked) == [one_by_one(trainer.loss.model, item.prompt, 6) for item in asked]


def test_an_adapter_without_its_files_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter .*: no adapter_config\.json"):
        Measurer(base(model_folder), str(tmp_path), tiny.config(), (1,), TRIED)


TRIED = [tiny.pack(9, 7), tiny.pack(12)]


def base(folder: Path) -> BaseModel:
    return BaseModel(str(folder), str(folder), "")


def plain_loss(model: Any, example: Any) -> float:
    """Summed over the supervised tokens of one example, from all logits of the model itself."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    chosen = torch.from_numpy(example.supervised[1:])
    return float(F.cross_entropy(logits[chosen].float(), ids[0, 1:][chosen], reduction="sum"))


def one_by_one(model: Any, prompt: tuple[int, ...], limit: int) -> list[int]:
    """The most probable token again and again, until the end token (1)."""
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == 1:
            break
        ids.append(token)
    return ids[len(prompt) :]
