"""A tiny model of each of transformers' causal families: the zoo's, otherwise from the family's own config."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.export_parts import save_tokenizer
from tests.families import zoo
from tests.families.check import check
from tests.families.row import Row
from tests.families.variants import ALL, IDS, Variant

# Names of size fields in configs -> their values in a tiny model; the first that fits.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_per_layer_input)?|(un)?padded_vocab_size|decoder_vocab_size", IDS["vocab_size"]),
    (r"(bos|decoder_start)_token_id", 0),
    (r"(eos|pad|sep|cls|mask)_token_id", 1),
    (r"forced_eos_token_id", 1),
    (r"\w+_token_(id|index)", 3),
    (
        r"hidden_size|d_model|n_embd|dim_model|emb_dim|embed_dim|embedding_(dim|size)|backbone_hidden_size",
        64,
    ),
    (r"hidden_size_\w+|\w*hidden_size|attention_hidden_size|input_size|out_hidden_size", 32),
    (r"(\w*_)?num_(hidden_)?layers|n_layers?|(en|de)coder_layers|depth|num_blocks", 2),
    (r"num_(en|de)coder_layers", 2),
    (r"(\w*_)?(num_key_value_heads|num_kv_heads)", 2),
    (r"(\w*_)?(num_attention_heads|attention_heads|num_heads|n_heads?)", 4),
    (
        r"(\w*_)?(intermediate_size|ffn_dim|ffn_hidden_size|dim_ff|dff|d_inner|d_ff|mlp_dim|feed_forward_size)\w*",
        96,
    ),
    (r"q_lora_rank|qk_head_dim", 24),
    (r"qk_rope_head_dim", 8),
    (r"(\w*_)?(head_dim|d_head|dim_head|attention_head_size|d_kv|kv_channels)|kv_lora_rank", 16),
    (r"(\w*_)?(num_local_experts|num_experts|n_routed_experts|moe_num_experts)", 4),
    (r"(\w*_)?(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts)", 2),
    (r"n_group|topk_group|num_expert_group", 2),
    (r"first_k_dense_replace", 1),
    (
        r"max_position_embeddings|n_positions|max_seq_len|model_max_length|context_length|max_\w+_positions",
        128,
    ),
    (r"image_size", 32),
    (r"patch_size", 8),
)

_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_INDEXER = {
    "indexer_head_dim": 16,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_budget": 16,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
}
_DOTS = {"head_dim": 24, "num_key_value_heads": 4, "per_layer_config": {}}
_MROPE = {"text_config.rope_parameters.mrope_section": [2, 3, 3]}
# Fields of a family's config that do not follow from their names.
_OF_A_FAMILY: Mapping[str, Mapping[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50, "cross_attn_k": 1},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {
        "attn_config.rope_theta": 1e4,
        "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8.0,
    },
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 16, "index_topk": 8, "hc_mult": 2},
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": [
            "sliding_attention",
            "mlp",
            "full_attention",
            "mlp",
            "full_attention",
            "mlp",
        ],
        **{f"n_{kind}_layers": 2 for kind in ("input", "recurrent", "output")},
    },
    "dots3_note": {
        **{f"text_config.{name}": value for name, value in _DOTS.items()},
        "vision_config.adapter_in_dim": 64,
        "vision_config.adapter_out_dim": 64,
        "audio_config.adapter_input_size": 64,
        "audio_config.adapter_out_dim": 64,
    },
    "dots3_note_text": _DOTS,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "text_config.num_kv_shared_layers": 2,
        "text_config.vocab_size_per_layer_input": 0,
        "text_config.hidden_size_per_layer_input": 0,
    },
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 2},
    "hrm_text": {"num_layers_per_stack": 1},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "kolibri1_1": {
        "index_layers": [1],
        "kv_source_layers": [0, 1],
        "index_num_heads": 2,
        "index_topk": 8,
        "mlp_only_layers": [0],
    },
    "longcat_flash": {"zero_expert_num": 2},
    "ministral": {"head_dim": 16},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v"), _MROPE),
    "qwen4_exp": {f"text_config.{name}": value for name, value in _INDEXER.items()},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": 2 * ["linear_attention", "linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """The types of models in transformers' mapping of causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# Vision families outside of that mapping: their language models are trained.
SEEING = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "smolvlm",
    "idefics",
    "idefics2",
    "idefics3",
    "internvl",
    "paligemma",
    "aya_vision",
    "glm4v",
    "lfm2_vl",
)


def others() -> list[str]:
    """The causal families without a variant in the zoo, and some vision families."""
    known = {each.model_type for each in ALL.values()}
    return [family for family in (*families(), *SEEING) if family not in known]


def row(family: str) -> Row:
    """The result for a tiny model of a family, in float32."""
    variant = variant_of(family)
    with tempfile.TemporaryDirectory() as folder:
        return check(variant, "fp32", Path(folder), _build)


def _build(variant: Variant, folder: Path, dtype: torch.dtype) -> None:
    """The model; a folder with its config only if transformers cannot build it, for example without a package."""
    from transformers import AutoConfig

    try:
        zoo.build(variant, folder, dtype)
    except (ImportError, AttributeError, ValueError):
        AutoConfig.for_model(variant.model_type, **variant.sizes).save_pretrained(folder)
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        save_tokenizer(folder)


def variant_of(family: str) -> Variant:
    """The family's first variant of the zoo, otherwise one from its default config."""
    for each in ALL.values():
        if each.model_type == family:
            return each
    return small(family)


def small(family: str) -> Variant:
    """The family's default config with the sizes of tiny models."""
    from transformers import AutoConfig

    shape = AutoConfig.for_model(
        family, **({"text_config": _ASSISTANT} if family == "gemma4_assistant" else {})
    )
    sizes = _small(shape.to_dict())
    for path, value in _OF_A_FAMILY.get(family, {}).items():
        *parts, name = path.split(".")
        part = sizes
        for each in parts:
            part = part[each]
        part[name] = value
    return Variant(family, family, sizes, chat=False)


_NOT_GIVEN = (
    "transformers_version",
    "architectures",
    "dtype",
    "_name_or_path",
    "id2label",
    "label2id",
    "model_type",
)


def _small(tree: Mapping[str, Any]) -> dict[str, Any]:
    layers = next(
        (tree[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if tree.get(name)), 0
    )
    kept = list(_of_each_kind(tree, layers))
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if name in _NOT_GIVEN:
            continue
        if name == "per_layer_config":
            found[name] = {
                kept.index(int(layer)): _small(own)
                for layer, own in value.items()
                if int(layer) in kept
            }
        elif isinstance(value, dict):
            found[name] = _small(value) if "model_type" in value else value
        elif isinstance(value, list) and layers and len(value) == layers:
            found[name] = [_size(name, value[layer]) for layer in kept]
        elif (
            type(value) is int
            and name in ("num_hidden_layers", "n_layer", "num_layers")
            and value == layers
        ):
            found[name] = len(kept)
        else:
            found[name] = _size(name, value)
    for one, other in (
        ("head_dim", "qk_rope_head_dim"),
        ("num_key_value_heads", "num_attention_heads"),
    ):
        if tree.get(one) is not None and tree[one] == tree.get(other):
            found[one] = found[other]
    return found


def _size(name: str, value: Any) -> Any:
    if type(value) is not int or value < 0:
        return value
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)


def _of_each_kind(tree: Mapping[str, Any], layers: int) -> Iterator[int]:
    """The first layer of each type, as the config lists types; two at least."""
    lists = [value for value in tree.values() if isinstance(value, list) and len(value) == layers]
    lists = [value for value in lists if len(set(map(str, value))) < 5]  # not the numbers of layers
    kinds = [str([each[layer] for each in lists]) for layer in range(layers)]
    firsts = sorted({kinds.index(kind) for kind in kinds})
    yield from firsts if len(firsts) > 1 else range(min(2, layers))
