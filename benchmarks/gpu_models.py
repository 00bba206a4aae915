"""The inputs of benchmarks/gpu.py: Llamas with random weights, chats of random tokens, and the peak of known cards."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import llama_shape
from multiplications import rates

from olora_ray.train.price import peak_of

Row = tuple[np.ndarray, np.ndarray]
"""(input_ids, supervised)."""


@dataclass(frozen=True)
class Size:
    shape: dict[str, int]
    """Arguments of LlamaConfig."""
    lengths: tuple[int, ...]
    """Lengths of packed sequences."""
    micro_tokens: int
    """Tokens per micro-batch."""
    step_tokens: int
    """Tokens per optimizer step."""
    pass_tokens: int
    """Tokens of a timed pass."""
    peft: tuple[tuple[int, bool], ...] = ((2, False), (4, True), (1, False), (8, True))
    """Settings to try with PEFT, the most promising first: (rows per batch, recompute activations)."""
    experts: bool = False


SIZES = {
    "tiny": Size(
        llama_shape(512, 64, 128, 2, 4, 2), (64, 128), 128, 256, 1024, ((2, False), (4, True))
    ),
    "tiny mixture": Size(
        llama_shape(512, 64, 128, 2, 4, 2)
        | {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
        (64, 128),
        *(128, 256, 512),
        experts=True,
    ),
    "135m": Size(llama_shape(49152, 576, 1536, 30, 9, 3), (2048, 8192), 16384, 65536, 131072),
    "1b": Size(llama_shape(128256, 2048, 8192, 16, 32, 8), (4096, 8192), 16384, 65536, 262144),
    "8b": Size(llama_shape(128256, 4096, 14336, 32, 32, 8), (4096, 8192), 8192, 32768, 131072),
    "70b": Size(llama_shape(128256, 8192, 28672, 80, 64, 8), (4096, 8192), 8192, 32768, 131072),
    "large mixture": Size(
        llama_shape(151936, 2048, 6144, 2, 32, 4)
        | {
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "head_dim": 128,
        },
        (4096, 8192),
        *(4096, 16384, 65536),
        experts=True,
    ),
}
"""Shapes of SmolLM2, Llama 3, and two layers of Qwen3-30B-A3B, and small ones for a test on a CPU."""


def facts(job: dict[str, Any]) -> dict[str, Any]:
    """Return the name of the device, the rate of a large product, and the operations per second that count as 100 %.

    For a card that is not in the table, a CPU or another precision, these are the measured rate.
    """
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    side = 8192 if device.type == "cuda" and job.get("size") != "tiny" else 512
    rate = max(rates([(side, side, side)], dtype, device).values())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    top = peak_of(name) if dtype is torch.bfloat16 else None
    source = "stated by the maker" if top else "measured: the largest product of torch.matmul"
    return {"name": name, "peak": top or rate, "source": source, "torch.matmul": rate}


def random_model(
    size: str, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"
) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    family: Any = Qwen3MoeConfig if SIZES[size].experts else LlamaConfig
    shape = family(
        **SIZES[size].shape, max_position_embeddings=16384, pad_token_id=0, rope_theta=500000.0
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            shape, dtype=dtype, attn_implementation=attention
        )
    return model.requires_grad_(False).eval()


def chats(size: str, length: int, tokens: int, seed: int = 0) -> list[Row]:
    """Return chats of random tokens, about `tokens` in total; lengths are log-normal with median `length` / 8."""
    generator = np.random.default_rng(seed)
    vocabulary, rows, left = SIZES[size].shape["vocab_size"], list[Row](), tokens
    while left > 0:
        count = int(np.clip(generator.lognormal(np.log(length / 8), 0.8), 8, length))
        rows.append(
            (
                generator.integers(3, vocabulary, count, dtype=np.int32),
                np.arange(count) >= count // 2,
            )
        )
        left -= count
    return rows
