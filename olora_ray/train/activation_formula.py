"""What a backward pass keeps, reckoned from the sizes of layers: where the model's code cannot be asked.

That is whole families (train/step_memory.py says which), and experts that are not run there: those whose code goes from
one to the next and looks at which tokens are sent to each.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from olora_ray.adapter.candidates import HEAD, Candidate
from olora_ray.adapter.parts import other_parts, part_of
from olora_ray.adapter.targets import Selection, Target
from olora_ray.config.schema import Config
from olora_ray.train.fake_model import Held
from olora_ray.train.loss import CHUNK_LOGITS


def held_by_experts(
    config: Config, model: Any, found: Mapping[str, Candidate], selection: Selection
) -> dict[str, Held]:
    """Module of experts -> about what its rows take, of which a token has as many as experts see it.

    With I numbers inside an expert and H outside, transformers' experts keep 4 I + 2 H of a row (8 I with a gate of the
    family's own, which limits and shifts), and what adapters add to that; their backward pass moves 4 H.
    """
    parts, shape = other_parts(model), model.config.get_text_config()
    kept: Counter[str] = Counter()
    rows: dict[str, int] = {}
    for name, item in found.items():
        if item.target.experts is None or part_of(name, parts):
            continue
        inside = sum(size for size in item.target.shape if size != shape.hidden_size)  # 3 I of all stacks
        rows[item.module_name] = tokens(config) * _experts_a_token(shape, item.target)
        kept[item.module_name] += inside * (8 if _has_own_gate(item.target.module) else 4) // 3
        if name in selection.targets:
            kept[item.module_name] += 2 * config.adapter.largest_rank()
            # What is left of the input, and which numbers those are.
            kept[item.module_name] += item.target.shape[1] * 3 // 2 if config.adapter.dropout else 0
    hidden = int(shape.hidden_size)
    return {name: Held(count * (kept[name] + 2 * hidden), count * 4 * hidden) for name, count in rows.items()}


def _has_own_gate(experts: Any) -> bool:
    """Whether the family's code says how the two halves of an expert's inside are multiplied."""
    gate = getattr(type(experts), "_apply_gate", None)
    return gate is not None and gate.__module__ == type(experts).__module__


def by_formula(config: Config, model: Any, found: Mapping[str, Candidate], selection: Selection, width: int) -> int:
    """Rather too much: input and output of each linear layer, adapted or not, norms and sums of blocks; and half more.

    Families whose activation functions are written out (GPT-2) keep more than that sum.
    """
    shape, parts, linear = model.config.get_text_config(), other_parts(model), 0
    for name, item in found.items():
        if item.refused is HEAD or part_of(name, parts):
            continue
        kept = sum(item.target.shape) + (2 * config.adapter.largest_rank() if name in selection.targets else 0)
        linear += kept * (1 if item.target.experts is None else _experts_a_token(shape, item.target))
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    of_blocks, head = tokens(config) * (linear + layers * hidden * 8) * width * 3 // 2, 3 * 4 * CHUNK_LOGITS
    if config.train.activation_checkpointing is True:
        of_blocks = min(of_blocks, tokens(config) * layers * hidden * width + of_blocks // layers * 2)
    return int(of_blocks + head)


def tokens(config: Config) -> int:
    """Of a micro-batch, at most."""
    return config.train.micro_batch * config.data.max_length


def _experts_a_token(shape: Any, target: Target) -> int:
    """Experts that see a token: as many as the config says, or all where a module takes no choice."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "num_selects")
    chosen = next((int(value) for name in names if isinstance(value := getattr(shape, name, None), int)), None)
    # Experts outside of transformers' interface may compute every token and leave most of it unused (Llama 4).
    known = chosen is not None and hasattr(target.module, "has_gate")
    assert target.experts is not None
    return min(chosen, target.experts) if known and chosen is not None else target.experts
