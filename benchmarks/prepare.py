"""Preparation of tokens: ours beside the tokenizer alone, and beside `datasets.map`, on the same rows.

The rows are short chats and longer texts in .jsonl files, all different, with the quickstart's tokenizer and
template. Our time is that of a complete preparation: scan of the file, template, mask of the answers, packing, and
shards with their digests. It is measured as in a run, whose Ray is already running, and shard by shard in one process.
Up to 32 MiB per core a run has processes of its own for that, and Ray Data for more.
`encode_batch` is the tokenizer's own call with the same number of threads, on rendered texts in memory; it writes
nothing. `datasets` loads the file and maps batches to the ids of the rendered texts; it makes neither masks nor
sequences. Medians of several rounds, each in its own process. Targets: 1.5 times the speed of `datasets.map` for 14 MB
of chats, 2.5 times for 58 MB.

    python benchmarks/prepare.py [--rows 30000 120000] [--rounds 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import MODEL, config, decided, machine, met, model_folder, table

CORPUS = Path(__file__).resolve().parent.parent / "pipelines" / "quickstart" / "train.jsonl"
PROCESSES = os.cpu_count() or 1
BATCH = 1000
"""Rows per call of a tokenizer: the default of datasets.map."""
LENGTH = 512
"""Tokens per sequence; a longer text becomes several, each starting with the last token of the previous one."""
TIMES = {30_000: 1.5, 120_000: 2.5}
"""Rows of chats -> target as a multiple of the speed of datasets.map."""
MOST = 12
"""Target in minutes for a billion tokens."""
Found = tuple[float, int]
"""(seconds, tokens)."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[*TIMES], help="chats; texts: a tenth of most"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, corpus, folder = args.child
        print(json.dumps(CONTESTANTS[name](corpus, folder)))
        return
    print(machine())
    with tempfile.TemporaryDirectory(prefix="olora-prepare-") as scratch:
        folder = model_folder(MODEL, scratch)
        kinds = [
            *((count, "messages", write_messages) for count in args.rows),
            (max(args.rows), "text", write_texts),
        ]
        for count, kind, write in kinds:
            corpus = Path(scratch) / f"{kind}.jsonl"
            rows = write(corpus, count)
            rounds = [
                {name: apart(name, corpus, folder) for name in CONTESTANTS}
                for _ in range(args.rounds)
            ]
            print(f"\n{rows:,} rows of {kind}, {corpus.stat().st_size / 1e6:.0f} MB")
            show(
                {name: [found[name] for found in rounds] for name in CONTESTANTS},
                rows,
                corpus.stat().st_size,
            )


def show(found: dict[str, list[Found]], rows: int, size: int) -> None:
    seconds = {
        name: statistics.median(each for each, _ in rounds) for name, rounds in found.items()
    }
    lines = [
        (
            name,
            f"{rows / seconds[name]:.0f}",
            f"{size / 1e6 / seconds[name]:.2f}",
            f"{rounds[0][1]}",
            f"{seconds[OF[name]] / seconds[name]:.2f}",
            f"{min(rounds)[0]:.1f} to {max(rounds)[0]:.1f}",
        )
        for name, rounds in found.items()
    ]
    print(table(("", "rows/s", "MB/s", "tokens", "of encode_batch", "seconds"), lines))
    ahead, target = seconds[MAP] / seconds[RAY], TIMES.get(rows)
    end = f" (target at least {target}: {met(ahead >= target)})" if target else ""
    print(f"{RAY}: {ahead:.2f} times the speed of {MAP}{end}")
    minutes = 1e9 / found[RAY][0][1] * seconds[RAY] / 60
    print(
        f"{RAY}: a billion tokens would take {minutes:.0f} minutes at this rate, target {MOST}: {met(minutes <= MOST)}"
    )


def contents() -> list[list[dict[str, str]]]:
    return [
        json.loads(line)["messages"] for line in CORPUS.read_text(encoding="utf-8").splitlines()
    ]


def write_messages(file: Path, count: int) -> int:
    found = contents()
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            system, question, answer = found[number % len(found)]
            other = found[(number * 7 + number // len(found)) % len(found)][1]["content"]
            text = f"{question['content']} Message {number}. {other.partition('.')[0]}."
            messages = [system, {**question, "content": text}, answer]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return count


def write_texts(file: Path, count: int) -> int:
    questions = [messages[1]["content"] for messages in contents()]
    with file.open("w", encoding="utf-8") as out:
        for number in range(count // 10):
            some = [
                questions[(number * 10 + 7 * part + number // 45) % len(questions)]
                for part in range(10)
            ]
            out.write(
                json.dumps({"text": f"Part {number}.\n" + "\n\n".join(some)}, ensure_ascii=False)
                + "\n"
            )
    return count // 10


def apart(name: str, corpus: Path, folder: str) -> Found:
    """Return the measurement of a contestant in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, corpus, folder],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds, tokens = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return seconds, tokens


def tokenizer_of(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def rendered(tokenizer: Any, row: dict[str, Any]) -> str:
    if "text" in row:
        return f"{row['text']}{tokenizer.eos_token}"
    text: str = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    return text


def raw(threads: int) -> Callable[[str, str], Found]:
    def run(corpus: str, folder: str) -> Found:
        os.environ.update(RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="true")
        tokenizer = tokenizer_of(folder)
        lines = Path(corpus).read_text(encoding="utf-8").splitlines()
        texts = [rendered(tokenizer, json.loads(line)) for line in lines]
        encode, tokens = tokenizer.backend_tokenizer.encode_batch, 0
        began = time.perf_counter()
        for start in range(0, len(texts), BATCH):
            tokens += sum(
                len(found.ids)
                for found in encode(texts[start : start + BATCH], add_special_tokens=False)
            )
        return time.perf_counter() - began, tokens

    return run


def mapped(corpus: str, folder: str) -> Found:
    import datasets

    datasets.disable_progress_bars()
    tokenizer = tokenizer_of(folder)

    def ids(batch: dict[str, Any]) -> dict[str, Any]:
        if "text" in batch:
            texts = [f"{text}{tokenizer.eos_token}" for text in batch["text"]]
        else:
            texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=cache)
        found = rows.map(
            ids,
            batched=True,
            batch_size=BATCH,
            num_proc=PROCESSES,
            remove_columns=rows.column_names,
        )
        seconds = time.perf_counter() - began
        return seconds, sum(len(batch["input_ids"].flatten()) for batch in found.data.to_batches())


def settings(corpus: str, folder: str, storage: str) -> Any:
    source = {"path": corpus, "format": Path(corpus).stem}
    data = {"train": [source], "max_length": LENGTH}
    return decided(config(storage, {"name": folder}, data=data))


def one_process(corpus: str, folder: str) -> Found:
    from olora_ray.data.tokenizer_spec import spec_from_pretrained
    from olora_ray.tokens import prepare
    from olora_ray.tokens import prepare as writer

    spec = spec_from_pretrained(tokenizer_of(folder), "model")
    with tempfile.TemporaryDirectory() as storage:
        cfg = settings(corpus, folder, storage)
        began = time.perf_counter()
        plan = prepare.plan_here(cfg, spec, "train")
        job = writer.StoreSpec(plan, f"{storage}/tokens", storage).for_tasks()
        made = [writer.make_shard(job, plan.part(number)) for number in range(len(plan.shards))]
        return time.perf_counter() - began, sum(each["tokens"] for each in made)


def through_ray(corpus: str, folder: str) -> Found:
    from olora_ray.common.logs import quiet_environment

    quiet_environment()
    from olora_ray.data.tokenizer_spec import spec_from_pretrained
    from olora_ray.pipeline.connection import connect
    from olora_ray.tokens.prepare import prepare

    spec = spec_from_pretrained(tokenizer_of(folder), "model")
    with tempfile.TemporaryDirectory() as storage:
        cfg = settings(corpus, folder, storage)
        with connect(cfg):
            began = time.perf_counter()
            store = prepare(cfg, spec, "train")
            return time.perf_counter() - began, sum(shard.tokens for shard in store.manifest.shards)


RAW_ONE, ONE = "encode_batch, 1 thread", "ours, one process"
RAW, RAY, MAP = (
    f"encode_batch, {PROCESSES} threads",
    "ours, as in a run",
    f"datasets.map, {PROCESSES} processes",
)
CONTESTANTS: dict[str, Callable[[str, str], Found]] = {
    RAW_ONE: raw(1),
    ONE: one_process,
    RAW: raw(PROCESSES),
    RAY: through_ray,
    MAP: mapped,
}
OF = {RAW_ONE: RAW_ONE, ONE: RAW_ONE, RAW: RAW, RAY: RAW, MAP: RAW}
"""Contestant -> the line to which it is compared."""

if __name__ == "__main__":
    main()
