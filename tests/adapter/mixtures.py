"""Tiny random mixtures of experts, one of each family that transformers keeps in a way of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import tiny

SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS = 4
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}


def _mixtral() -> tuple[str, dict[str, Any]]:
    return "Mixtral", {"num_local_experts": EXPERTS}


def _qwen2_moe() -> tuple[str, dict[str, Any]]:
    return "Qwen2Moe", {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    }


def _qwen3_moe() -> tuple[str, dict[str, Any]]:
    return "Qwen3Moe", {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}


def _olmoe() -> tuple[str, dict[str, Any]]:
    return "Olmoe", {"num_experts": EXPERTS, "num_experts_per_tok": 2}


def _gpt_oss() -> tuple[str, dict[str, Any]]:
    return "GptOss", {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 32,
        "layer_types": ["full_attention"] * 2,
    }


def _deepseek_v2() -> tuple[str, dict[str, Any]]:
    return "DeepseekV2", LATENT | {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
    }


def _deepseek_v3() -> tuple[str, dict[str, Any]]:
    return "DeepseekV3", LATENT | {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "n_group": 1,
        "topk_group": 1,
    }


def _glm4_moe() -> tuple[str, dict[str, Any]]:
    return "Glm4Moe", {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    }


def _granitemoe() -> tuple[str, dict[str, Any]]:
    return "GraniteMoe", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}


def _granitemoehybrid() -> tuple[str, dict[str, Any]]:
    return "GraniteMoeHybrid", {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 40,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    }


def _phimoe() -> tuple[str, dict[str, Any]]:
    return "Phimoe", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}


def _llama4() -> tuple[str, dict[str, Any]]:
    return "Llama4", {
        "num_local_experts": EXPERTS,
        "intermediate_size_mlp": 40,
        "head_dim": 8,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 64,
    }


FAMILIES: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    each.__name__.removeprefix("_"): each
    for each in (
        _mixtral,
        _qwen2_moe,
        _qwen3_moe,
        _olmoe,
        _gpt_oss,
        _deepseek_v2,
        _deepseek_v3,
        _glm4_moe,
        _granitemoe,
        _granitemoehybrid,
        _phimoe,
        _llama4,
    )
}


def make(family: str, dtype: torch.dtype = torch.float32, experts: str | None = None) -> Any:
    """A frozen model; `experts` is the implementation of transformers', None for its own choice."""
    import transformers

    name, changes = FAMILIES[family]()
    text = "Text" if family == "llama4" else ""
    shape = getattr(transformers, f"{name}{text}Config")(**(SIZES | changes))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = getattr(transformers, f"{name}ForCausalLM")(shape)
        for parameter in model.parameters():  # some families leave experts or routers at zero
            torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    model.set_attn_implementation("eager" if family == "gpt_oss" else "sdpa")
    if experts is not None and model._can_set_experts_implementation():
        model.set_experts_implementation(experts)
    return model.to(dtype).eval().requires_grad_(False)


def save(family: str, folder: Path) -> None:
    """A model folder with as much of a tokenizer as counts as one."""
    make(family).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
