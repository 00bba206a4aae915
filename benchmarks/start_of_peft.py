"""The peer of benchmarks/start.py: PEFT's OLoRA and transformers' Trainer, to the end of the first step.

python benchmarks/start_of_peft.py FOLDER DTYPE      (prints when that was, in seconds since 1970; start.py starts it)
"""

import os
import sys
import tempfile
import time

import numpy as np
from peers import model_of_peft, pad

ROWS, LENGTH = 2, 512
"""Size of the step: as many sequences as ours."""


def main() -> None:
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    ids = np.random.default_rng(0).integers(3, 40_000, (ROWS, LENGTH))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    model = model_of_peft(sys.argv[1], getattr(torch, sys.argv[2]), rank=16)
    with tempfile.TemporaryDirectory() as scratch:
        told = TrainingArguments(
            output_dir=scratch,
            max_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=ROWS,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, told, data_collator=pad, train_dataset=Dataset.from_list(rows)).train()
    print(time.time(), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
