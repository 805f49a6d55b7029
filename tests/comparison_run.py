"""PEFT's comparison in miniature: `python comparison_run.py CHECKOUT FOLDER`.

The program is PEFT's. What it needs from outside is replaced: the accelerator by the CPU, the data sets by a few rows.
FOLDER holds the experiment and the anchors, and receives the log.
"""

import sys
from pathlib import Path

import datasets
import torch
from datasets import Dataset, DatasetDict


def rows(number):
    return [
        {"query": f"a b {i}", "original_question": "a", "response": f"b c The answer is: {i}", "type": "GSM_Rephrased"}
        for i in range(number)
    ]


def load_dataset(name, *_, **__):
    if name == "HuggingFaceFW/finewiki":
        return Dataset.from_list([{"text": "a b c a c b " * 4}] * 4).to_iterable_dataset()
    if name == "meta-math/MetaMathQA":
        return DatasetDict(train=Dataset.from_list(rows(16)))
    questions = [{"question": row["query"], "answer": "c #### 3"} for row in rows(4)]
    return DatasetDict(train=Dataset.from_list(questions), test=Dataset.from_list(questions))


def main(checkout, folder):
    sys.path[:0] = [str(checkout / "method_comparison" / "MetaMathQA"), str(checkout / "src")]
    import peft.utils

    datasets.load_dataset = load_dataset
    for name in ("reset_peak_memory_stats", "manual_seed_all", "max_memory_reserved", "memory_allocated"):
        setattr(torch.cpu, name, lambda *_: 0)
    for name in ("memory_reserved", "empty_cache", "get_device_name"):
        setattr(torch.cpu, name, lambda *_: 0)
    peft.utils.infer_device = lambda: "cuda"  # other devices are refused when utils.py is imported
    import utils

    peft.utils.infer_device = utils.infer_device = lambda: "cpu"
    utils.device = "cpu"
    (folder / "log").mkdir()
    for name in ("RESULT_PATH", "RESULT_PATH_TEST", "RESULT_PATH_CANCELLED"):
        setattr(utils, name, str(folder / "log"))

    from research.method_comparison.__main__ import main as run

    run([
        str(folder / "experiments" / "loramoe" / "tiny"), "--untested", "--clean",
        "--peft-checkout", str(checkout), "--anchors", str(folder / "anchors.jsonl"),
    ])  # fmt: skip


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
