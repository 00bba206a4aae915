"""A small GGUF file: a random Llama of one layer with a byte-level tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

WIDTH, INNER, HEADS, KEYS = 32, 64, 4, 2


def write(
    file: Path,
    theta: float = 10000.0,
    scaling: Mapping[str, str | float] | None = None,
    more: Mapping[str, Sequence[float]] | None = None,
    architecture: str = "llama",
    head: int | None = None,
    window: int | None = None,
) -> Path:
    """Write the file, always with the same bytes.

    `scaling` are values of rope.*, `more` are tensors beside the model's. With another `architecture` only the header
    is right.
    """
    import gguf
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "ab"]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)
    for name, value in (scaling or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{architecture}.rope.{name}", value)
    if head is not None:
        writer.add_key_length(head)
    if window is not None:
        writer.add_sliding_window(window)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(tokens), WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (len(tokens), WIDTH),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (WIDTH, WIDTH),
        "blk.0.attn_k.weight": (WIDTH * KEYS // HEADS, WIDTH),
        "blk.0.attn_v.weight": (WIDTH * KEYS // HEADS, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.ffn_gate.weight": (INNER, WIDTH),
        "blk.0.ffn_up.weight": (INNER, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, INNER),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, random.normal(0, 0.1, shape).astype(np.float32))
    for name, numbers in (more or {}).items():
        writer.add_tensor(name, np.array(numbers, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
