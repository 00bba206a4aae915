"""The families of the zoo and the sizes of their tiny models.

NAMED are the 56 variants that a review of November 2026 looked at one by one; MORE are others. Each has two layers, or
as many as it takes for every kind of layer to occur, and matrices that take an adapter of rank 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests import tiny

# Fields of a family's config.
Sizes = Mapping[str, Any]

# Most tokens of a sequence, the run's data.max_length.
LONGEST = 64
IDS: Sizes = {
    "vocab_size": tiny.VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
COMMON: Sizes = {**IDS, "hidden_size": 64, "num_hidden_layers": 2}
# A decoder whose config names its sizes like Llama's.
DENSE: Sizes = {
    **COMMON,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT: Sizes = {**IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
# A window longer than any sequence, so without effect.
WIDE: Sizes = {"sliding_window": 128}
NARROW: Sizes = {"sliding_window": 16}
BOTH: Sizes = {"layer_types": ["sliding_attention", "full_attention"]}
HEADS: Sizes = {"head_dim": 16}
GEMMA: Sizes = {**DENSE, **HEADS, **BOTH, "query_pre_attn_scalar": 16}
GRANITE: Sizes = {
    **DENSE,
    "embedding_multiplier": 4.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
FEW: Sizes = {"num_experts_per_tok": 2}
SMALL_EXPERTS: Sizes = {"moe_intermediate_size": 24}
EXPERTS: Sizes = {**FEW, "num_experts": 4}
LOCAL_EXPERTS: Sizes = {**FEW, "num_local_experts": 4}
ROUTED: Sizes = {**FEW, **SMALL_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1}
GROUPS: Sizes = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 2}
# Latent attention: the head of a query (24) is larger than that of a value (16).
MLA: Sizes = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
SSM: Sizes = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
# Linear attention by the gated delta rule.
DELTA: Sizes = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
VISION: Sizes = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Variant:
    """A tiny model of a family."""

    name: str
    model_type: str
    sizes: Sizes = field(hash=False)
    # True if its tokenizer has a chat template.
    chat: bool = True


def variant(
    name: str, *parts: Sizes, kind: str | None = None, chat: bool = True, **more: Any
) -> Variant:
    """A variant whose config has the fields of all parts, later ones over earlier ones; `kind` is its model type."""
    sizes = {key: value for part in (*parts, more) for key, value in part.items()}
    return Variant(name, kind or name, sizes, chat)


def _by_name(*variants: Variant) -> dict[str, Variant]:
    return {each.name: each for each in variants}


# The variants of the review.
NAMED = _by_name(
    # Dense decoders.
    variant("llama", DENSE),
    variant("llama tied", DENSE, kind="llama", tie_word_embeddings=True),
    variant("qwen2", DENSE),
    variant("qwen3", DENSE, HEADS),
    variant("mistral", DENSE, sliding_window=None),
    variant("gemma", DENSE, HEADS),
    variant("gemma3_text", GEMMA, WIDE),
    variant("phi3", DENSE, original_max_position_embeddings=128),
    variant("phi", DENSE, chat=False),
    variant("gpt2", GPT, chat=False),
    variant("opt", DENSE, ffn_dim=96, word_embed_proj_dim=64, chat=False),
    variant(
        "opt 350m",
        DENSE,
        kind="opt",
        ffn_dim=96,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
        chat=False,
    ),
    variant("gpt_neox", DENSE, chat=False),
    variant("gptj", GPT, rotary_dim=8, chat=False),
    variant("gpt_bigcode", GPT, multi_query=True, chat=False),
    variant("starcoder2", DENSE, sliding_window=None),
    variant("granite", GRANITE),
    variant("cohere", DENSE, logit_scale=0.25),
    variant("cohere2", DENSE, HEADS, WIDE, BOTH, logit_scale=0.25),
    variant("olmo", DENSE, clip_qkv=2.0),
    variant("olmo2", DENSE),
    variant("olmo3", DENSE, WIDE, BOTH),
    variant("smollm3", DENSE),
    variant("glm4", DENSE, HEADS),
    variant("exaone4", DENSE, HEADS, WIDE, BOTH),
    variant("stablelm", DENSE),
    variant("nemotron", DENSE),
    variant("hyperclovax", GRANITE),
    # Positions or masks of their own kind.
    variant("falcon", COMMON, num_attention_heads=4, chat=False),
    variant(
        "falcon alibi",
        COMMON,
        kind="falcon",
        num_attention_heads=4,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        chat=False,
    ),
    variant("mistral window", DENSE, NARROW, kind="mistral"),
    variant("gemma3_text window", GEMMA, NARROW, kind="gemma3_text"),
    variant("gemma2", GEMMA, WIDE, final_logit_softcapping=2.0, attn_logit_softcapping=1.0),
    variant("gpt_oss", DENSE, HEADS, WIDE, BOTH, LOCAL_EXPERTS),
    variant("bloom", COMMON, n_head=4, n_layer=2, chat=False),
    variant(
        "mpt",
        IDS,
        d_model=64,
        n_heads=4,
        n_layers=2,
        expansion_ratio=2,
        max_seq_len=128,
        chat=False,
    ),
    variant(
        "gpt_neo",
        COMMON,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=128,
        max_position_embeddings=128,
        intermediate_size=96,
        chat=False,
    ),
    # Mixtures of experts.
    variant("mixtral", DENSE, LOCAL_EXPERTS),
    variant("qwen3_moe", DENSE, HEADS, EXPERTS, SMALL_EXPERTS),
    variant("olmoe", DENSE, EXPERTS),
    variant("granitemoe", GRANITE, LOCAL_EXPERTS),
    variant("deepseek_v2", DENSE, ROUTED, GROUPS, MLA),
    variant("deepseek_v3", DENSE, ROUTED, GROUPS, MLA, num_mtp_layers=0),
    variant("glm4_moe", DENSE, HEADS, ROUTED, GROUPS, num_mtp_layers=0),
    variant("qwen2_moe", DENSE, EXPERTS, SMALL_EXPERTS, shared_expert_intermediate_size=32),
    variant(
        "llama4_text",
        DENSE,
        HEADS,
        LOCAL_EXPERTS,
        num_experts_per_tok=1,
        intermediate_size_mlp=96,
        interleave_moe_layer_step=2,
        attention_chunk_size=128,
        no_rope_layers=[1, 0],
    ),
    variant("phimoe", DENSE, LOCAL_EXPERTS),
    # State: convolutions, recurrences, linear attention.
    variant(
        "falcon_h1", DENSE, HEADS, SSM, mamba_d_ssm=128, lm_head_multiplier=0.5, key_multiplier=0.8
    ),
    variant(
        "recurrent_gemma",
        DENSE,
        num_hidden_layers=3,
        num_key_value_heads=1,
        lru_width=64,
        logits_soft_cap=2.0,
        attention_window_size=128,
    ),
    variant("bamba", DENSE, SSM, attn_layer_indices=[1]),
    variant(
        "granitemoehybrid",
        GRANITE,
        SSM,
        LOCAL_EXPERTS,
        shared_intermediate_size=32,
        layer_types=["mamba", "attention"],
    ),
    variant("lfm2", DENSE, layer_types=["conv", "full_attention"], block_multiple_of=16),
    variant(
        "mamba2",
        COMMON,
        num_heads=4,
        head_dim=32,
        state_size=16,
        n_groups=1,
        chunk_size=16,
        chat=False,
    ),
    variant("mamba", COMMON, state_size=8, time_step_rank=8, chat=False),
    variant(
        "qwen3_next",
        DENSE,
        HEADS,
        DELTA,
        EXPERTS,
        SMALL_EXPERTS,
        shared_expert_intermediate_size=32,
    ),
    # Trained on text, with a part for pictures.
    variant(
        "gemma3",
        text_config={**GEMMA, **WIDE},
        vision_config=dict(VISION),
        mm_tokens_per_image=4,
        boi_token_index=93,
        eoi_token_index=94,
        image_token_index=95,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    ),
)

# Families that the review does not name.
MORE = _by_name(
    variant("ernie4_5", DENSE, HEADS),
    variant(
        "ernie4_5_moe", DENSE, SMALL_EXPERTS, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1
    ),
    variant("seed_oss", DENSE, HEADS),
    variant("arcee", DENSE),
    variant("hunyuan_v1_dense", DENSE, HEADS),
    variant("apertus", DENSE),
    variant("helium", DENSE, HEADS),
    variant("persimmon", DENSE, chat=False),
    variant("codegen", GPT, rotary_dim=8, chat=False),
    variant("biogpt", DENSE, chat=False),
    variant(
        "xglm",
        IDS,
        d_model=64,
        ffn_dim=96,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=128,
    ),
    variant("smollm3 nope", DENSE, kind="smollm3", no_rope_layers=[1, 0]),
    variant(
        "qwen3_moe mlp", DENSE, HEADS, EXPERTS, SMALL_EXPERTS, kind="qwen3_moe", mlp_only_layers=[0]
    ),
    variant("dots1", DENSE, ROUTED, GROUPS, sliding_window=None),
    variant(
        "lfm2_moe",
        DENSE,
        EXPERTS,
        SMALL_EXPERTS,
        layer_types=["conv", "full_attention"],
        num_dense_layers=1,
    ),
    variant(
        "jamba",
        DENSE,
        EXPERTS,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=8,
    ),
    variant(
        "nemotron_h",
        DENSE,
        HEADS,
        ROUTED,
        num_hidden_layers=4,
        layers_block_type=["mamba", "moe", "attention", "mlp"],
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=32,
        n_groups=1,
        chunk_size=16,
        moe_shared_expert_intermediate_size=32,
    ),
    variant(
        "zamba2",
        DENSE,
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid"],
        mamba_d_state=16,
        n_mamba_heads=4,
        chunk_size=16,
        adapter_rank=8,
    ),
    variant(
        "minimax",
        DENSE,
        HEADS,
        LOCAL_EXPERTS,
        layer_types=["linear_attention", "full_attention"],
        block_size=16,
    ),
    variant("qwen3_5_text", DENSE, HEADS, DELTA),
    variant("olmo_hybrid", DENSE, DELTA),
)

ALL = NAMED | MORE

# Mixtures of experts without a state, one for each way in which transformers stores experts.
MIXTURES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe mlp",
    "olmoe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
    "phimoe",
    "llama4_text",
)
