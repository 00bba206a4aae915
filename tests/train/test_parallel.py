"""A base that is sharded over the workers trains and answers like a base that every worker holds."""

import pytest
import torch.distributed as dist

from olora_ray.train.generate import Question, answer, decoding
from olora_ray.train.held_out import evaluate
from olora_ray.train.sharded_reader import blocks_to_shard, decoder_layers
from tests import tiny
from tests.crew import Crews
from tests.families import zoo
from tests.families.variants import ALL
from tests.train.test_generate import likeliest

EOS = 1
QUESTIONS = [Question(tuple(range(5, 5 + length)), ()) for length in (4, 9, 2, 6, 3)]


def _answers(strategy: str, eos: int) -> list[list[list[int]]]:
    """Return answers before a step and after a few steps, with training in between."""
    rank = dist.get_rank()
    settings = tiny.decided(cluster__workers=2, train__micro_batch=1, train__lr=0.1)
    trainer = tiny.trainer(settings, strategy=strategy)
    evaluate(trainer, tiny.store(3), "segments")
    before = answer(trainer, QUESTIONS, 6, [eos], rank, 2, batch=2)
    list(tiny.steps(trainer, count=4))
    return [before, answer(trainer, QUESTIONS, 6, [eos], rank, 2, batch=2)]


def test_answers_are_the_same_for_both_strategies(crew: Crews) -> None:
    unlimited = crew(2).run(_answers, "ddp", EOS)
    assert unlimited[0] == unlimited[1]
    assert [len(part) for part in unlimited[0]] == [len(QUESTIONS)] * 2
    assert unlimited[0][0] != unlimited[0][1]
    # An end token that some answers meet early, so that workers are not ready together.
    stop = unlimited[0][0][0][1]
    ddp = crew(2).run(_answers, "ddp", stop)
    assert len({len(row) for row in ddp[0][0]}) > 1
    assert crew(2).run(_answers, "fsdp", stop) == ddp


def test_fewer_questions_than_workers(crew: Crews) -> None:
    one, two = crew(2).run(_one_question, "fsdp")
    assert one == two
    assert len(one) == 1


def _one_question(strategy: str) -> list[list[int]]:
    trainer = tiny.trainer(tiny.decided(cluster__workers=2), strategy=strategy)
    return answer(trainer, QUESTIONS[:1], 3, [EOS], dist.get_rank(), 2)


@pytest.mark.parametrize("attention", ["segments", "sdpa", "eager"])
def test_answers_are_greedy_whatever_their_batch_and_order(attention: str) -> None:
    trainer = tiny.trainer(tiny.decided(), attention)
    found = answer(trainer, QUESTIONS, 5, [EOS], batch=3)
    assert tiny.attention_of(trainer.loss.model) == attention
    with decoding(trainer.loss.model):
        alone = [likeliest(trainer.loss.model, question.prompt, 5) for question in QUESTIONS]
    assert found == alone


def test_the_layers_that_are_sharded_are_the_blocks_of_the_model() -> None:
    assert [type(layer).__name__ for layer in decoder_layers(tiny.llama())] == [
        "LlamaDecoderLayer"
    ] * 2
    assert [type(layer).__name__ for layer in decoder_layers(tiny.gpt2())] == ["GPT2Block"] * 2


def test_what_a_model_does_not_split_is_sharded_by_itself() -> None:
    kinds = [type(block).__name__ for block in blocks_to_shard(zoo.on_meta(ALL["gemma3"]))]
    tower = [
        "SiglipVisionEmbeddings",
        *["SiglipEncoderLayer"] * 3,
        "SiglipMultiheadAttentionPoolingHead",
    ]
    assert kinds == [*tower, *["Gemma3DecoderLayer"] * 2]
    for tied, names in (
        (
            True,
            {"LlamaDecoderLayer", "LlamaMLP", "Embedding"},
        ),  # a part of a block; a weight of two
        (True, {"LlamaRMSNorm"}),  # none of the blocks
        (True, None),
        (False, {"LlamaModel"}),  # all of the blocks
    ):
        model = tiny.llama(tie_word_embeddings=tied)
        model._no_split_modules = names
        assert blocks_to_shard(model) == decoder_layers(model)
