"""A base that is sharded over the workers trains and answers like a base that every worker holds."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from olora_ray.tokens.collate import collate
from olora_ray.train import parallel
from olora_ray.train.base_files import blocks_to_shard, decoder_layers
from olora_ray.train.generate import Question, answer, decoding
from olora_ray.train.loop import Trainer, evaluate
from olora_ray.train.self_test import bare, check_adapters, choose_attention
from tests import tiny
from tests.crew import Crew
from tests.families import zoo
from tests.families.variants import ALL

EOS = 1
QUESTIONS = [Question(tuple(range(5, 5 + length)), ()) for length in (4, 9, 2, 6, 3)]


def trained(strategy: str, steps: int = 2, tied: bool = False) -> tuple[Trainer, list[float], Tensor, Tensor]:
    """Return a trainer after some steps, the losses, the first gradient and the adapter after the first step."""
    settings = tiny.config(cluster__workers=2, cluster__strategy=strategy, train__micro_batch=1, train__clip=None)
    trainer = tiny.trainer(
        settings, model=tiny.llama(attention="segments", tie_word_embeddings=tied), strategy=strategy
    )
    gradients = tiny.gradients(trainer)
    losses, first = [], None
    for result in tiny.steps(trainer, count=steps):
        losses.append(result.loss)
        first = trainer.flat.vector.clone() if first is None else first
    assert first is not None
    return trainer, losses, gradients[0], first


def _train(strategy: str, tied: bool) -> tuple[list[float], Tensor, Tensor, float]:
    trainer, losses, gradient, adapter = trained(strategy, tied=tied)
    held_out = evaluate(trainer, tiny.store(5, seed=9), "segments", dist.get_rank(), 2)
    return losses, gradient, adapter, held_out


def _layout(strategy: str) -> tuple[list[str], list[str]]:
    """Return the type of every frozen weight, and the modules that are gathered one at a time."""
    trainer, *_ = trained(strategy, steps=1)
    kinds = [
        f"{type(p.data).__name__}, {'in a block' if '.layers.' in name else 'outside'}"
        for name, p in trainer.loss.named_parameters()
        if not p.requires_grad
    ]
    return kinds, [name for name, module in trainer.loss.named_modules() if isinstance(module, FSDPModule)]


def _answers(strategy: str, eos: int) -> list[list[list[int]]]:
    """Return answers before a step and after a few steps, with training in between."""
    rank = dist.get_rank()
    settings = tiny.config(cluster__workers=2, train__micro_batch=1, train__lr=0.1)
    trainer = tiny.trainer(settings, strategy=strategy)
    evaluate(trainer, tiny.store(3), "segments", rank, 2)
    before = answer(trainer, QUESTIONS, 6, [eos], rank, 2, batch=2)
    list(tiny.steps(trainer, count=4))
    return [before, answer(trainer, QUESTIONS, 6, [eos], rank, 2, batch=2)]


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_fsdp_equals_ddp(crew: Callable[[int], Crew], tied: bool) -> None:
    ddp, other = crew(2).run(_train, "ddp", tied)
    fsdp, other_fsdp = crew(2).run(_train, "fsdp", tied)
    for mine, theirs in ((ddp, other), (fsdp, other_fsdp)):
        assert mine[0] == theirs[0]
        assert all(torch.equal(a, b) for a, b in zip(mine[1:3], theirs[1:3], strict=True))
    assert (fsdp[0], fsdp[3]) == (ddp[0], ddp[3])
    assert all(torch.equal(a, b) for a, b in zip(fsdp[1:3], ddp[1:3], strict=True))


def _uneven(strategy: str, micro: int) -> tuple[float, Tensor, int]:
    """Return loss and gradient of a step of 3 sequences on 2 workers, and this worker's number of forward passes."""
    settings = tiny.config(
        train__global_batch=3, train__micro_batch=micro, train__clip=None, cluster__strategy=strategy
    )
    trainer = tiny.moved(tiny.trainer(settings, strategy=strategy))
    gradients = tiny.gradients(trainer)
    runs: list[int] = []
    trainer.loss.register_forward_hook(lambda *_: runs.append(1))
    result = next(tiny.steps(trainer, count=1))
    return result.loss, gradients[0], len(runs)


@pytest.mark.parametrize("micro", [1, 2])
def test_fsdp_equals_ddp_with_uneven_shares(crew: Callable[[int], Crew], micro: int) -> None:
    ddp, other = crew(2).run(_uneven, "ddp", micro)
    fsdp, other_fsdp = crew(2).run(_uneven, "fsdp", micro)
    assert torch.equal(fsdp[1], other_fsdp[1])
    assert fsdp[0] == other_fsdp[0] == pytest.approx(ddp[0], rel=1e-6)
    assert float((fsdp[1] - ddp[1]).norm() / ddp[1].norm()) < 2e-6
    assert (ddp[2], other[2]) == ((1, 2) if micro == 1 else (1, 1))
    assert fsdp[2] == other_fsdp[2] == other[2]  # the smaller share runs one for the sake of the other


def test_fsdp_shards_every_frozen_weight_of_the_blocks_and_ddp_none(crew: Callable[[int], Crew]) -> None:
    kinds, units = crew(2).run(_layout, "fsdp")[0]
    assert set(kinds) == {"DTensor, in a block", "Tensor, outside"}
    assert units == ["", "model.model.layers.0", "model.model.layers.1"]
    kinds, units = crew(2).run(_layout, "ddp")[0]
    assert set(kinds) == {"Tensor, in a block", "Tensor, outside"}
    assert units == []


def test_answers_are_the_same_for_both_strategies(crew: Callable[[int], Crew]) -> None:
    unlimited = crew(2).run(_answers, "ddp", EOS)
    assert unlimited[0] == unlimited[1]
    assert [len(part) for part in unlimited[0]] == [len(QUESTIONS)] * 2
    assert unlimited[0][0] != unlimited[0][1]
    # An end token that some answers meet early, so that workers are not ready together.
    stop = unlimited[0][0][0][1]
    ddp = crew(2).run(_answers, "ddp", stop)
    assert len({len(row) for row in ddp[0][0]}) > 1
    assert crew(2).run(_answers, "fsdp", stop) == ddp


def test_fewer_questions_than_workers(crew: Callable[[int], Crew]) -> None:
    one, two = crew(2).run(_one_question, "fsdp")
    assert one == two
    assert len(one) == 1


def _one_question(strategy: str) -> list[list[int]]:
    trainer, *_ = trained(strategy, steps=1)
    return answer(trainer, QUESTIONS[:1], 3, [EOS], dist.get_rank(), 2)


def one_by_one(trainer: Trainer, question: Question, tokens: int) -> list[int]:
    """Decode greedily without a cache, padding or transformers' generate."""
    ids, model = list(question.prompt), trainer.loss.model
    with decoding(model):
        for _ in range(tokens):
            logits: Any = model(input_ids=torch.tensor([ids]), use_cache=False).logits  # type: ignore[operator]
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(question.prompt) :]


def _tested(strategy: str) -> tuple[str, float, list[float]]:
    settings = tiny.config(cluster__workers=2, cluster__strategy=strategy, train__micro_batch=1)
    trainer = tiny.trainer(settings, model=tiny.llama(attention="segments"), strategy=strategy)
    packs: list[Any] = [tiny.pack(9, 7), tiny.pack(12)]
    with bare(trainer.loss.model):
        found = choose_attention(trainer.loss, packs, settings, trainer.device)
    missed, off = check_adapters(trainer.loss, trainer.adapted, packs, found.attention, trainer.device, new=True)
    assert found.differences is not None
    assert not missed
    assert off < 1e-6
    losses = [result.loss for result in tiny.steps(trainer, count=2, attention=found.attention)]
    return found.attention, found.differences.output, losses


def test_the_self_test_of_a_sharded_base_is_that_of_a_whole_one(crew: Callable[[int], Crew]) -> None:
    (whole, _), (sharded, other) = crew(2).run(_tested, "ddp"), crew(2).run(_tested, "fsdp")
    assert whole[0] == sharded[0] == other[0] == "segments"
    assert max(whole[1], sharded[1], other[1]) < 1e-6
    assert sharded[2] == other[2] == pytest.approx(whole[2], rel=1e-5)


@pytest.mark.parametrize("attention", ["segments", "sdpa", "eager"])
def test_answers_are_greedy_whatever_their_batch_and_order(attention: str) -> None:
    trainer = tiny.trainer(tiny.config(), attention)
    found = answer(trainer, QUESTIONS, 5, [EOS], batch=3)
    assert tiny.attention_of(trainer.loss.model) == attention
    assert found == [one_by_one(trainer, question, 5) for question in QUESTIONS]


def test_a_family_without_sdpa_answers_too() -> None:
    gemma = zoo.make(ALL["gemma2"])
    trainer = tiny.trainer(tiny.config(), model=gemma)
    assert answer(trainer, QUESTIONS[:2], 3, [EOS]) == [one_by_one(trainer, asked, 3) for asked in QUESTIONS[:2]]


def test_an_answer_ends_before_its_end_token() -> None:
    trainer = tiny.trainer(tiny.config())
    whole = one_by_one(trainer, QUESTIONS[0], 5)
    (found,) = answer(trainer, QUESTIONS[:1], 5, [whole[2]])
    assert found == whole[: whole.index(whole[2])]


def test_without_an_end_token_answers_have_the_most_tokens() -> None:
    trainer = tiny.trainer(tiny.config())
    whole = [one_by_one(trainer, question, 5) for question in QUESTIONS]
    model: Any = trainer.loss.model
    model.generation_config.eos_token_id = whole[0][1]  # what the model's folder says does not count
    assert answer(trainer, QUESTIONS, 5, [], batch=2) == whole


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_answers_of_a_sharded_base_may_come_before_any_loss(group_of_one: None) -> None:
    whole, sharded = (tiny.trainer(tiny.config()) for _ in range(2))
    parallel.shard(sharded.loss, sharded.device)
    batch = collate([tiny.pack(9, 7)], "segments")
    for _ in range(2):
        assert answer(sharded, QUESTIONS, 4, [EOS], batch=2) == answer(whole, QUESTIONS, 4, [EOS], batch=2)
        for trainer in (whole, sharded):
            trainer.loss(batch).backward()
        assert torch.equal(sharded.flat.grad, whole.flat.grad)
    assert not hasattr(sharded.loss, "nothing")
    frozen = {name: part.data for name, part in sharded.loss.named_parameters() if not part.requires_grad}
    assert all(isinstance(part, DTensor) is (".layers." in name) for name, part in frozen.items())


def test_the_layers_that_are_sharded_are_the_blocks_of_the_model() -> None:
    assert [type(layer).__name__ for layer in decoder_layers(tiny.llama())] == ["LlamaDecoderLayer"] * 2
    assert [type(layer).__name__ for layer in decoder_layers(tiny.gpt2())] == ["GPT2Block"] * 2


def test_what_a_model_does_not_split_is_sharded_by_itself() -> None:
    kinds = [type(block).__name__ for block in blocks_to_shard(zoo.on_meta(ALL["gemma3"]))]
    tower = ["SiglipVisionEmbeddings", *["SiglipEncoderLayer"] * 3, "SiglipMultiheadAttentionPoolingHead"]
    assert kinds == [*tower, *["Gemma3DecoderLayer"] * 2]
    for tied, names in (
        (True, {"LlamaDecoderLayer", "LlamaMLP", "Embedding"}),  # a part of a block; a weight of two
        (True, {"LlamaRMSNorm"}),  # none of the blocks
        (True, None),
        (False, {"LlamaModel"}),  # all of the blocks
    ):
        model = tiny.llama(tie_word_embeddings=tied)
        model._no_split_modules = names
        assert blocks_to_shard(model) == decoder_layers(model)
