"""An export runs within a memory limit that the whole model would exceed."""

import subprocess
import sys
from pathlib import Path

import pytest

LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from olora_ray.model import stored
from olora_ray.pipeline import merge
from olora_ray.pipeline.parity import check_adapter
from olora_ray.adapter.peft_folder import write_adapter
from olora_ray.config.schema import Adapter
from tests.export_parts import random_adapter, skeleton_of

torch.set_num_threads(1)
MIB = 2**20


def write_base(folder, layers):
    # Zeros that take no room on the disk: the header, and a file of the right size.
    LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    header, place = {}, 0
    for name, part in skeleton_of(folder).state_dict().items():
        end = place + 2 * part.numel()
        header[name] = {"dtype": "BF16", "shape": list(part.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    return place


def export(folder):
    base, model, settings = folder / "base", skeleton_of(folder / "base"), Adapter(rank=2, alpha=4)
    names = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name != "lm_head"]
    adapter = {name: random_adapter(model, name, 2, i) for i, name in enumerate(names)}
    merge.write_merged(base, adapter, settings.scale(), folder / "merged", model)
    write_adapter(adapter, settings, "base", folder / "adapter", model)
    found = stored.groups(base, model, adapter)
    worst = merge.check_weights(base, folder / "merged", found, adapter, settings.scale())
    assert worst.error <= 1 and not merge.changed(base, folder / "merged", found)
    assert check_adapter(folder / "adapter", model, adapter, settings.scale()).ok


first, second = (Path(sys.argv[1]) / name for name in ("small", "large"))
for folder, layers in ((first, 1), (second, 16)):
    (folder / "base").mkdir(parents=True)
    size = write_base(folder / "base", layers)
export(first)  # imports, and what else is kept
used = next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((used + 160) * MIB,) * 2)
export(second)
print(size // MIB)
try:
    model = AutoModelForCausalLM.from_pretrained(second / "base")
    print(float(sum(part.double().sum() for part in model.parameters())))
except (RuntimeError, MemoryError, OSError):
    print("too large")
"""


@pytest.mark.slow
def test_a_model_is_exported_and_checked_in_less_memory_than_it_has(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        env={
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    size, loaded = answer.stdout.split(maxsplit=1)
    assert int(size) > 2 * 160, "the limit is less than half of the model"
    assert loaded.strip() == "too large"
