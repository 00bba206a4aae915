"""The GGUF file of a merged model, for llama.cpp and the programs that are built on it.

llama.cpp's converter knows nearly all families, but no package has it: it is a script in llama.cpp's repository. It
also recognises a tokenizer by the ids of one text, and so refuses the tokenizer of a model that itself came from a
GGUF file, as the quickstart's. This module writes the families in which llama.cpp's tensors are those of transformers,
except for the order of rows, and refuses the others before the training.

llama.cpp has the rules that split a text before BPE in its code, and a file only names them. A wrong name gives other
tokens, without an error. Therefore the rules of the tokenizer itself are compared with those behind each name; a name
is never guessed from the model's family. llama.cpp skips Unicode normalisation (NFC, in Qwen's tokenizers).
"""

import json
import logging
import math
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open

from olora_ray.common.errors import UserError, as_user_error
from olora_ray.config.schema import AnyConfig
from olora_ray.model.folder import foreign, loaded_files
from olora_ray.model.load import tokenizer_in
from olora_ray.model.source import BaseModel
from olora_ray.pipeline.exporter import Exporter, Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_QKV = ("q_proj", "k_proj", "v_proj")
_FAMILIES = {
    "llama": (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": _QKV,
    "qwen3": _QKV,
}
"""Model type, which is also llama.cpp's name -> the layers that may have a bias there."""
_INSTEAD = (
    "export the merged model instead, and convert it with llama.cpp's script:"
    " python convert_hf_to_gguf.py MERGED --outtype {type}"
)
_QUANTIZE = "llama-quantize"
_LLAMA_CPP = ("q4_k_m",)
"""Precisions that the package gguf cannot write, and llama.cpp's own tool can."""
_BOUNDS = {"f32": 0.0, "f16": 1e-3, "bf16": 5e-3, "q8_0": 0.02, "q4_k_m": 0.2}
"""Precision -> the largest relative error of a tensor that its rounding explains."""
_ENDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = rf"{_ENDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}{_REST}"
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        _bytes(use_regex=False),
    ]


_SPLITS = {
    "gpt-2": [_bytes(use_regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)],
    "qwen2": _split(r"\p{N}"),
    "llama-bpe": _split(r"\p{N}{1,3}"),
}
"""llama.cpp's name -> the rules by which a tokenizer.json splits a text before BPE."""
_IGNORES_MERGES = ("llama-bpe",)
"""Names with which llama.cpp looks up a whole word in the vocabulary before it merges."""


def problem(
    base: BaseModel, model: "PreTrainedModel", config: AnyConfig, precision: str
) -> str | None:
    """Return why llama.cpp could not read a model like `base`, and what to do; None if it could."""
    folder = Path(base.folder)
    with as_user_error(
        "export.also.gguf: needs the package gguf: pip install 'olora-ray[gguf]'", ImportError
    ):
        import gguf  # noqa: F401
    with foreign(f"model.name: the tokenizer in {folder} does not load"):
        tokenizer = tokenizer_in(folder, config.model.trust_remote_code)
    why = _why_not(folder, model.config) or _why_other_tokens(tokenizer, model.config)
    if why:
        return f"{why}; {_INSTEAD.format(type=_written_as(precision))}"
    if precision in _LLAMA_CPP and not shutil.which(_QUANTIZE):
        return (
            f"{precision} is made by llama.cpp's {_QUANTIZE}, which is not on the PATH here; use f16, and then"
            f" where llama.cpp is: {_QUANTIZE} NAME-F16.gguf NAME-{precision.upper()}.gguf {precision.upper()}"
        )
    return None


def _written_as(precision: str) -> str:
    return "f16" if precision in _LLAMA_CPP else precision


def _why_not(folder: Path, shape: Any) -> str | None:
    family = shape.model_type
    if family not in _FAMILIES or getattr(shape, "auto_map", None):
        return f"{family} is none of the model types that it can write ({', '.join(_FAMILIES)})"
    kind = shape.rope_parameters.get("rope_type", "default")
    if kind != "default" and (kind, family) != ("llama3", "llama"):
        return f"it cannot write rotary positions of type {kind}"
    if any(layer != "full_attention" for layer in getattr(shape, "layer_types", None) or ()):
        return "it cannot write layers with a sliding window"
    if shape.hidden_act != "silu":
        return f"it cannot write the activation {shape.hidden_act}"
    names = _Names(shape)
    if unknown := [name for name, _ in _slices(folder, shape) if names.of(name) is None]:
        return f"it cannot write the tensor {unknown[0]}"
    return None


def _why_other_tokens(tokenizer: Any, shape: Any) -> str | None:
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return "it cannot write a tokenizer without tokenizer.json"
    state = json.loads(backend.to_str())
    if _splitting(state) is None:
        return "llama.cpp has no known rules that split a text as this tokenizer does"
    if any(
        token["lstrip"] or token["rstrip"] or token["single_word"]
        for token in state["added_tokens"]
    ):
        return "it cannot write tokens that take in the spaces beside them"
    if max(tokenizer.get_vocab().values()) >= shape.vocab_size:
        return "the tokenizer has more tokens than the model"
    if frame(tokenizer) is None:
        return "it cannot write the tokens that the tokenizer puts around a text"
    return None


def _splitting(state: dict[str, Any]) -> str | None:
    """Return the name by which llama.cpp splits and merges like a tokenizer.json; None if there is none."""
    bpe, before, normalizer = state["model"], state["pre_tokenizer"] or {}, state["normalizer"]
    odd = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if (
        bpe["type"] != "BPE"
        or any(bpe.get(name) for name in odd)
        or normalizer not in (None, {"type": "NFC"})
    ):
        return None
    parts = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    # trim_offsets changes only the places of tokens in the text.
    rules = [
        {name: value for name, value in part.items() if name != "trim_offsets"} for part in parts
    ]
    name = next((name for name, known in _SPLITS.items() if known == rules), None)
    return name if bool(bpe.get("ignore_merges")) == (name in _IGNORES_MERGES) else None


def frame(tokenizer: Any) -> tuple[bool, bool] | None:
    """Return whether a text gets the token bos before it and eos after it; None if it gets others."""
    text, framed = (
        tokenizer("a", add_special_tokens=special).input_ids for special in (False, True)
    )
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    cases = ((first, last) for first in (False, True) for last in (False, True))
    return next((case for case in cases if bos * case[0] + text + eos * case[1] == framed), None)


def write(trained: Trained, merged: Path, folder: Path, precision: str) -> None:
    """Write the file into `folder`, under the name of the run; raise UserError if it has other weights."""
    write_file(trained, merged, folder / f"{trained.name}-{precision.upper()}.gguf", precision)


def write_file(trained: Trained, merged: Path, out: Path, precision: str) -> None:
    """Write the file `out`, and compare its tensors with those of the merged model; UserError if they differ."""
    logger.info(f"writing {out.name}")
    if precision in _LLAMA_CPP:
        plain = out.with_suffix(".f16")
        write_gguf(merged, plain, trained, "f16")
        _quantize(plain, out, precision)
        plain.unlink()
    else:
        write_gguf(merged, out, trained, precision)
    error, name = _largest_error(merged, out, trained.model.config)
    if not error <= _BOUNDS[precision]:
        raise UserError(
            f"{out.name}: the tensor {name} has a relative error of {error:.3g}, more than {precision} explains"
            f" ({_BOUNDS[precision]:g}); use another precision"
        )
    logger.info(
        f"{out.name}: each tensor is the merged model's with a relative error of at most {error:.2g}"
    )


def _quantize(plain: Path, out: Path, precision: str) -> None:
    command = [_QUANTIZE, str(plain), str(out), precision.upper()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise UserError(f"{' '.join(command)} failed: {last}")


def _largest_error(merged: Path, out: Path, shape: Any) -> tuple[float, str]:
    """Return the largest relative error (Frobenius norm) of a tensor in the file `out`, and the tensor's name."""
    from gguf import GGUFReader, quants

    stored = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    names = _Names(shape)
    worst = (0.0, "")
    for (name, _), exact in zip(_slices(merged, shape), _tensors(merged, shape), strict=True):
        tensor = stored[str(names.of(name))]
        read = quants.dequantize(tensor.data, tensor.tensor_type).reshape(exact.shape)
        size = float(np.linalg.norm(exact)) or 1.0
        error = float(np.linalg.norm(read - exact)) / size
        if not error <= worst[0]:
            worst = (error, name)
        if math.isnan(error):
            break
    return worst


def write_gguf(merged: Path, out: Path, trained: Trained, precision: str) -> None:
    """Write the merged model with its tokenizer and template to the file `out`.

    `problem` must have found nothing. Memory holds one tensor at a time.
    """
    from gguf import GGML_QUANT_SIZES, GGUFWriter, quants
    from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType, LlamaFileType

    shape: Any = trained.model.config
    label = precision.upper()
    writer = GGUFWriter(out, shape.model_type)
    writer.add_name(trained.name)
    writer.add_file_type(
        LlamaFileType.ALL_F32 if label == "F32" else LlamaFileType[f"MOSTLY_{label}"]
    )
    writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_shape(writer, shape)
    tokenizer = tokenizer_in(merged, trained.config.model.trust_remote_code)
    _add_tokenizer(writer, tokenizer, shape.vocab_size, trained.eos)

    names, wanted, types = _Names(shape), GGMLQuantizationType[label], []
    for name, stored in _slices(merged, shape):
        size = stored.get_shape()
        fits = size[-1] % GGML_QUANT_SIZES[wanted][0] == 0
        # llama.cpp computes with vectors in float32 only.
        kind = (
            GGMLQuantizationType.F32
            if len(size) == 1
            else wanted
            if fits
            else GGMLQuantizationType.F16
        )
        block, bytes_per_block = GGML_QUANT_SIZES[kind]
        length = math.prod(size) // block * bytes_per_block
        writer.add_tensor_info(str(names.of(name)), size, np.dtype(np.float32), length, kind)
        types.append(kind)
    divisors = _divisors(shape)
    if divisors is not None:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in zip(_tensors(merged, shape), types, strict=True):
        writer.write_tensor_data(quants.quantize(tensor, kind))
    if divisors is not None:
        writer.write_tensor_data(divisors)
    writer.close()


def _add_shape(writer: Any, shape: Any) -> None:
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(_head(shape))


def _add_tokenizer(writer: Any, tokenizer: Any, size: int, ends: Collection[int]) -> None:
    from gguf import TokenType

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    texts = [f"[PAD{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    for text, number in state["model"]["vocab"].items():
        texts[number], types[number] = text, TokenType.NORMAL
    for token in state["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(_splitting(state))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    first, last = frame(tokenizer) or (False, False)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    ordered = sorted(ends, key=lambda token: (token != tokenizer.eos_token_id, token))
    fields = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(fields, ordered, strict=False):
        add(token)
    if more := tokenizer.convert_ids_to_tokens(ordered[len(fields) :]):
        logger.warning(
            f"export.also.gguf: the file has no field for the end tokens {more}; set them as stop strings"
        )
    template = tokenizer.chat_template
    if template := template.get("default") if isinstance(template, dict) else template:
        writer.add_chat_template(template)


def _tensors(folder: Path, shape: Any) -> Iterator[np.ndarray]:
    for name, stored in _slices(folder, shape):
        tensor = stored[:].float()
        heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}.get(
            name.split(".")[-2]
        )
        if heads and shape.model_type == "llama":
            # transformers rotates row i of a head with row i + half, llama.cpp a row with the next one.
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        yield tensor.contiguous().numpy()


def _slices(folder: Path, shape: Any) -> Iterator[tuple[str, Any]]:
    for file in loaded_files(folder):
        with safe_open(file, "pt") as stored:
            for name in sorted(stored.keys()):
                tied = name == "lm_head.weight" and shape.tie_word_embeddings
                if not tied and not name.endswith("rotary_emb.inv_freq"):
                    yield name, stored.get_slice(name)


class _Names:
    def __init__(self, shape: Any) -> None:
        from gguf import MODEL_ARCH, get_tensor_name_map

        self._biased = _FAMILIES[shape.model_type]
        self._map = get_tensor_name_map(
            MODEL_ARCH[shape.model_type.upper()], shape.num_hidden_layers
        )

    def of(self, name: str) -> str | None:
        """Return llama.cpp's name of a tensor; None if its models of this type have no such tensor."""
        if name.endswith(".bias") and name.split(".")[-2] not in self._biased:
            return None
        found: str | None = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        return found


def _head(shape: Any) -> int:
    return int(getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)


def _divisors(shape: Any) -> np.ndarray | None:
    """Return the numbers that divide the frequencies of Llama 3's rotary positions; None for plain ones."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if shape.rope_parameters.get("rope_type", "default") == "default":
        return None
    head = _head(shape)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](shape, torch.device("cpu"))
    plain = shape.rope_parameters["rope_theta"] ** -(torch.arange(0, head, 2).float() / head)
    divisors: np.ndarray = (plain / scaled).numpy()
    return divisors


EXPORTER = Exporter(
    label="GGUF (llama.cpp)",
    needs="merged",
    options=tuple(_BOUNDS),
    problem=problem,
    write=write,
)
