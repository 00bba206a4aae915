import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from olora_ray.adapter import export
from olora_ray.adapter.factors import AdapterWeights, Factors
from olora_ray.common.errors import UserError
from olora_ray.config.schema import Adapter
from tests import tiny
from tests.export_parts import Case, logits, make_case, save_tokenizer

METHODS = [
    Adapter(method="olora", rank=4, alpha=6),
    Adapter(method="olora", rank=4, alpha=6, rank_stabilized=True),
    Adapter(method="lora", rank=4, alpha=6),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # Tiny matrices: a second thread only waits, for long on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    return make_case(tmp_path / "base", tiny.llama(), METHODS[0])


@pytest.fixture
def gpt2(tmp_path: Path) -> Case:
    return make_case(tmp_path / "base", tiny.gpt2(), METHODS[0])


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def from_peft(case: Case, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(load(case.base), folder).eval())


def merge(case: Case, out: Path) -> Path:
    export.write_merged(case.base, case.adapter, case.scale, out, transposed=case.transposed)
    return out


def plain(case: Case, out: Path) -> Path:
    export.write_adapter(case.adapter, case.settings, "org/base", out, transposed=case.transposed)
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", METHODS, ids=lambda item: f"{item.method}-{item.rank_stabilized}")
def test_both_exports_say_what_the_adapted_model_says(tmp_path: Path, family: str, settings: Adapter) -> None:
    case = make_case(tmp_path / "base", getattr(tiny, family)(), settings)
    assert (case.logits - logits(load(case.base))).abs().mean() > 1e-3, "the adapter changes something"
    torch.testing.assert_close(logits(load(merge(case, tmp_path / "merged"))), case.logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(from_peft(case, plain(case, tmp_path / "adapter")), case.logits, atol=2e-5, rtol=0)


def test_the_adapter_folder_is_what_peft_itself_writes(llama: Case, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = plain(llama, tmp_path / "adapter")
    PeftModel.from_pretrained(load(llama.base), folder).save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert set(ours) <= set(theirs)
    assert (ours["r"], ours["lora_alpha"], ours["use_rslora"]) == (8, 12, False)
    assert ours["target_modules"] == list(llama.adapter), "full names: nothing else can match"


def test_weights_are_rounded_once_to_the_stored_precision(tmp_path: Path) -> None:
    case = make_case(tmp_path / "base", tiny.llama(dtype=torch.bfloat16), METHODS[0])
    before = load_file(case.base / "model.safetensors")
    after = load_file(merge(case, tmp_path / "merged") / "model.safetensors")
    changed = {f"{name}.weight" for name in case.adapter}
    for name, weight in before.items():
        assert after[name].dtype == torch.bfloat16
        if name in changed:
            delta = case.adapter[name.removesuffix(".weight")].delta(case.scale)
            assert torch.equal(after[name], (weight.float() + delta).bfloat16())
            assert not torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], weight)


def test_shards_keep_their_layout_and_other_files_come_along(tmp_path: Path) -> None:
    case = make_case(tmp_path / "base", tiny.llama(), METHODS[0], shard="100KB")
    save_tokenizer(case.base)
    for name in ("pytorch_model.bin", "README.md", "extra.safetensors", "LICENSE"):
        (case.base / name).write_bytes(b"x")
    out = merge(case, tmp_path / "merged")
    shards = sorted(path.name for path in case.base.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    names = {path.name for path in out.iterdir()} - set(shards)
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"}
    assert names.isdisjoint({"pytorch_model.bin", "README.md"})
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (out / "model.safetensors.index.json").read_bytes() == (
        case.base / "model.safetensors.index.json"
    ).read_bytes()
    with safe_open(out / shards[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    torch.testing.assert_close(logits(load(out)), case.logits, atol=2e-5, rtol=0)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path / "base", tiny.llama(), METHODS[0], shard="100KB")
    index = case.base / "model.safetensors.index.json"
    shard = min(case.base.glob("model-*.safetensors"))
    shard.rename(tmp_path / shard.name)
    index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    with pytest.raises(UserError, match=r"index\.json names '\.\./model-.*not a file in that folder"):
        merge(case, tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists()


def test_everyone_may_read_the_files(llama: Case, tmp_path: Path) -> None:
    (llama.base / "model.safetensors").chmod(0o600)
    for folder in (merge(llama, tmp_path / "merged"), plain(llama, tmp_path / "adapter")):
        assert folder.stat().st_mode & 0o755 == 0o755
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_a_checkpoint_without_the_models_prefix(gpt2: Case, tmp_path: Path) -> None:
    # As gpt2 lies on the hub: h.0.attn.c_attn.weight for transformer.h.0.attn.c_attn.
    file = gpt2.base / "model.safetensors"
    short = {name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}
    save_file(short, file, metadata={"format": "pt"})
    out = merge(gpt2, tmp_path / "merged")
    torch.testing.assert_close(logits(load(out)), gpt2.logits, atol=2e-5, rtol=0)


def rewrite(case: Case, change: dict[str, str | None]) -> None:
    """Rename (or drop) tensors of the base, by part of the name."""
    file = case.base / "model.safetensors"
    tensors = load_file(file)
    for old, new in change.items():
        weight = tensors.pop(old)
        if new is not None:
            tensors[new] = weight
    save_file(tensors, file)


Q = "model.layers.0.self_attn.q_proj.weight"


def test_a_missing_weight_is_named(llama: Case, tmp_path: Path) -> None:
    rewrite(llama, {Q: None})
    with pytest.raises(UserError, match=r"cannot merge model\.layers\.0\.self_attn\.q_proj: .* has no weight"):
        merge(llama, tmp_path / "merged")


def test_a_weight_that_fits_twice_is_named(llama: Case, tmp_path: Path) -> None:
    rewrite(llama, {Q: "a." + Q, "model.norm.weight": "b." + Q})
    with pytest.raises(UserError, match="has its weight twice"):
        merge(llama, tmp_path / "merged")


def test_a_tied_weight_is_named(llama: Case, tmp_path: Path) -> None:
    config = json.loads((llama.base / "config.json").read_text())
    (llama.base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with_head = {**llama.adapter, "lm_head": llama.adapter["model.layers.0.self_attn.q_proj"]}
    with pytest.raises(UserError, match="cannot merge lm_head: its weight is tied"):
        export.write_merged(llama.base, with_head, 1.0, tmp_path / "merged")


def test_two_layers_on_one_weight_are_named(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"h.0.up.weight": torch.zeros(2, 2)}, base / "model.safetensors")
    item = AdapterWeights(Factors(torch.ones(1, 2), None), torch.ones(1, 2), torch.ones(2, 1))
    with pytest.raises(UserError, match=r"cannot merge b\.h\.0\.up: its weight is tied to another layer"):
        export.write_merged(base, {"a.h.0.up": item, "b.h.0.up": item}, 1.0, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_quantised_weight_is_named(llama: Case, tmp_path: Path) -> None:
    file = llama.base / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {Q: tensors[Q].to(torch.int8)}, file)
    with pytest.raises(UserError, match=rf"cannot merge {re.escape(Q)}: it is stored as I8"):
        merge(llama, tmp_path / "merged")


def test_another_shape_is_named(llama: Case, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    item = llama.adapter[name]
    turned = AdapterWeights(replace(item.factors, a0=item.db.T, b0=item.da.T), item.db.T, item.da.T)
    with pytest.raises(UserError, match=r"its shape is \(112, 64\), the adapter's \(64, 112\)"):
        export.write_merged(llama.base, {name: turned}, 1.0, tmp_path / "merged")


def test_a_base_without_safetensors(llama: Case, tmp_path: Path) -> None:
    (llama.base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors; merging needs"):
        merge(llama, tmp_path / "merged")


def test_an_old_export_stays_until_the_new_one_is_complete(llama: Case, tmp_path: Path) -> None:
    out = merge(llama, tmp_path / "merged")
    (out / "mark").write_text("old")
    rewrite(llama, {Q: None})
    with pytest.raises(UserError):
        merge(llama, out)
    broken = {**llama.adapter, "model.layers.1.mlp.up_proj": llama.adapter["model.layers.1.mlp.down_proj"]}
    with pytest.raises(UserError):
        export.write_merged(llama.base, {n: w for n, w in broken.items() if "q_proj" not in n}, 1.0, out)
    assert (out / "mark").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"], "no leftovers"
    (tmp_path / ".merged.partial").mkdir()  # a killed process left it
    rest = {n: w for n, w in llama.adapter.items() if "q_proj" not in n}
    export.write_merged(llama.base, rest, 1.0, out)
    assert not (out / "mark").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]


MEMORY = """
import json, resource, sys
from pathlib import Path
import torch
from olora_ray.adapter import export, parity
from olora_ray.adapter.factors import AdapterWeights, Factors

folder = Path(sys.argv[1])
names = [f"model.layers.{i}.up" for i in range(12)]
base = folder / "base"
base.mkdir()
(base / "config.json").write_text("{}")
size = 1024 * 2048 * 4  # one file of 96 MiB zeros, made without holding it
header = {
    f"{name}.weight": {"dtype": "F32", "shape": [1024, 2048], "data_offsets": [i * size, (i + 1) * size]}
    for i, name in enumerate(names)
}
text = json.dumps(header).encode()
with (base / "model.safetensors").open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + 12 * size)
a, b = torch.ones(1, 2048), torch.ones(1024, 1)
adapter = {name: AdapterWeights(Factors(a, None), a, b) for name in names}
export.write_merged(base, {names[0]: adapter[names[0]]}, 0.5, folder / "once")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export.write_merged(base, adapter, 0.5, folder / "merged")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
print([module for module in ("mlflow", "ray", "peft", "transformers") if module in sys.modules])
"""


def test_merging_holds_one_weight_in_memory_and_imports_little(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    grown, imported = subprocess.check_output(command, text=True).split(maxsplit=1)
    assert int(grown) < 40, f"{grown} MiB more for 12 weights of 8 MiB than for one"
    assert imported.strip() == "[]"
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert {float(file.get_tensor(f"model.layers.{i}.up.weight").unique()) for i in range(12)} == {1.0}
