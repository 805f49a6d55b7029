"""A task of lm-eval that needs no download: the perplexity of a few texts."""

import json
import math

import torch

from tiny import tiny_tokenizer


NAME = "tiny_perplexity"
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


def write_task(folder, texts):
    """A folder for lm-eval's --include-path, with the task and its texts, for `tiny_tokenizer`."""
    folder.mkdir()
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "task.yaml").write_text(TASK.format(name=NAME, file=file))
    return folder


def word_perplexity(model, texts):
    """What the task asks for, computed here: each text after the end token."""
    tokenizer, total, words = tiny_tokenizer(), 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
        with torch.no_grad():
            total += torch.nn.functional.cross_entropy(
                model(ids[None, :-1]).logits[0], ids[1:], reduction="sum"
            ).item()
        words += len(text.split())
    return math.exp(total / words)
