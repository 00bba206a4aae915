"""What answers to held-out prompts take beside the base and the adapter: above all their cache of keys and values.

No step runs beside them, but adapter and optimizer are there. As many prompts are answered at once as in
train/generate.py; how long they are is not known before they are tokenised, so each is taken to be as long as a
sequence may be. The model's own code runs with fake tensors, as for a step (train/step_memory.py).
"""

import inspect
from itertools import pairwise
from typing import Any

import torch

from olora_ray.config.schema import Config
from olora_ray.train.fake_model import FakeModel, GroupedProducts
from olora_ray.train.generate import AT_ONCE, decoding, wanted
from olora_ray.train.live_bytes import LiveBytes, at_blocks
from olora_ray.train.loop import train_mode


def answers_at_once(config: Config) -> int:
    """Held-out prompts that a worker answers together, at most."""
    return min(AT_ONCE, wanted(config.evaluation)) if config.data.holds_out() else 0


def answer_bytes(fake: FakeModel, config: Config) -> int:
    """Bytes that answers take at their most: while prompts are read, or at the last token."""
    rows, prompt = answers_at_once(config), config.data.max_length
    if not rows:
        return 0
    train_mode(fake.adapted, False)
    whole = prompt + config.evaluation.max_new_tokens
    with decoding(fake.loss.model), fake.mode, torch.no_grad():
        return max(_most(fake, rows, prompt, decode=False), _most(fake, rows, whole - 1, decode=True))


def cache_bytes(config: Config, model: Any, width: int) -> int:
    """The cache at the last token, from the model's sizes: where its code cannot be asked.

    Of a model without heads, what its hidden states would take: rather too much.
    """
    shape = model.config.get_text_config()
    asked = getattr(shape, "num_attention_heads", None) or 1
    heads = getattr(shape, "num_key_value_heads", None) or asked
    size = getattr(shape, "head_dim", None) or shape.hidden_size // asked
    tokens = answers_at_once(config) * (config.data.max_length + config.evaluation.max_new_tokens)
    return int(tokens * shape.num_hidden_layers * 2 * heads * size * width)


def _most(fake: FakeModel, rows: int, tokens: int, *, decode: bool) -> int:
    """The most that is alive while so many tokens are read; `decode`: while one more is, after these."""
    model: Any = fake.loss.model
    live = LiveBytes(fake.tensors())
    takes = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    name = "cache" if "cache" in takes else "past_key_values"  # its older word, and that of the output
    with at_blocks(fake.blocks, live) as before, live, GroupedProducts():
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        cache = model(ids, attention_mask=torch.ones_like(ids), use_cache=True, **last).past_key_values
        if decode:
            live.most = live.now
            mask = torch.ones(rows, tokens + 1, dtype=torch.int64)
            model(ids[:, :1], attention_mask=mask, use_cache=True, **{name: cache})
    kept = [stop - start for start, stop in pairwise(before[: len(fake.blocks) + 1])]
    return live.most + sum(more * kept[place] for place, more in fake.more.items())
