"""Tiny random models of families that keep their layers in other ways than Llama does."""

from collections.abc import Callable
from typing import Any

from tests import tiny

SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


def build(name: str, **settings: Any) -> Any:
    """A model of transformers by the name of its class, with SIZES and these settings."""
    import transformers

    model_class = getattr(transformers, name)
    return tiny.build_model(model_class, model_class.config_class(**(SIZES | settings)), "eager")


def mixtral() -> Any:
    """Stored as w1, w3, w2 of each expert below block_sparse_moe."""
    return build("MixtralForCausalLM", num_local_experts=4)


def qwen3_moe() -> Any:
    """Stored as gate_proj, up_proj, down_proj of each expert; the first layer has an MLP."""
    return build("Qwen3MoeForCausalLM", mlp_only_layers=[0], **MOE)


def qwen2_moe() -> Any:
    """With a shared expert."""
    return build("Qwen2MoeForCausalLM", shared_expert_intermediate_size=40, **MOE)


def olmoe() -> Any:
    """Experts only."""
    return build("OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2)


def deepseek_v3() -> Any:
    """A dense first layer, shared experts, and compressed attention."""
    return build(
        "DeepseekV3ForCausalLM",
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
    )


def glm4_moe() -> Any:
    """A dense first layer and shared experts."""
    return build(
        "Glm4MoeForCausalLM",
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        head_dim=8,
    )


def gpt_oss() -> Any:
    """Experts as n x m."""
    return build("GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2, head_dim=8)


def granitemoe() -> Any:
    """Fused experts that are stored under other names."""
    return build("GraniteMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2)


def llama4() -> Any:
    """Experts as n x m that do not say so."""
    return build(
        "Llama4ForCausalLM",
        intermediate_size_mlp=48,
        num_local_experts=4,
        head_dim=8,
        moe_layers=[1],
        no_rope_layers=[1, 1],
        attention_chunk_size=64,
        layer_types=["full_attention", "full_attention"],
    )


def phi3() -> Any:
    """Fused projections."""
    return build("Phi3ForCausalLM")


def gemma3_multimodal() -> Any:
    """A language model beside a vision tower, stored as language_model.model..."""
    import transformers

    text = SIZES | {"head_dim": 8, "sliding_window": 64}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    shape = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return tiny.build_model(transformers.Gemma3ForConditionalGeneration, shape, "eager")


MIXTURES: dict[str, Callable[[], Any]] = {
    found.__name__: found
    for found in (mixtral, qwen3_moe, qwen2_moe, olmoe, deepseek_v3, glm4_moe, gpt_oss, granitemoe, llama4)
}
