"""`peft-loramoe anchors` and `label`, as `main` runs them."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_loramoe.cli import main
from peft_loramoe.training import read_anchors, sample_anchors
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_anchors_are_those_of_sample_anchors(base, tmp_path, capsys):
    command = [
        "anchors",
        "--model",
        base,
        "--number",
        "6",
        "-o",
        str(tmp_path / "a.jsonl"),
        "--seed",
        "3",
        "--device",
        "cpu",
    ]
    assert main([*command, "--max-tokens", "8", "--batch-size", "4"]) == 0
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    expected = sample_anchors(model, tiny_tokenizer(), 6, max_tokens=8, seed=3, batch_size=4, progress=False)
    assert read_anchors(tmp_path / "a.jsonl") == expected
    assert "holds 6 anchors, 0 of them chats" in capsys.readouterr().out
    assert main([*command, "--max-tokens", "8", "--batch-size", "4"]) == 0  # goes on, with nothing to do
    assert read_anchors(tmp_path / "a.jsonl") == expected


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.txt"])
def test_anchors_from_texts(name, base, tmp_path):
    texts = [f"w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(20, 30)]
    lines = [json.dumps({"text": text}) if name.endswith("jsonl") else text for text in texts]
    (tmp_path / name).write_text("\n".join(lines) + "\n\n")
    command = [
        "anchors",
        "--model",
        base,
        "--number",
        "5",
        "-o",
        str(tmp_path / "a.jsonl"),
        "--texts",
        str(tmp_path / name),
    ]
    assert main([*command, "--max-tokens", "3"]) == 0
    cut = {" ".join(text.split()[:3]) for text in texts}
    assert len(read_anchors(tmp_path / "a.jsonl")) == 5
    assert all(anchor["text"] in cut for anchor in read_anchors(tmp_path / "a.jsonl"))


WRONG = {
    "too few": (["--texts", "texts.jsonl", "--number", "3"], "fewer than --number 3"),
    "no text": (["--texts", "other.jsonl", "--number", "1"], "line 1: must have a text"),
    "chat": (["--texts", "texts.jsonl", "--number", "1", "--chat", "1"], "--chat 1.0 has no effect with texts"),
    "a share": (["--number", "1", "--chat", "2"], "error: --chat 2.0 must be in [0, 1]: the share of chats"),
    "no device": (["--number", "1", "--device", "gpu"], "--device gpu: write cpu, cuda"),
    "no memory": (["--number", "1", "--device", "meta"], "--device meta has no memory for weights"),
    "no data set": (["--dataset", "", "--number", "1"], "--dataset '' must have the form NAME[:CONFIG[:SPLIT]]"),
    "four parts": (["--dataset", "a:b:c:d", "--number", "1"], "--dataset 'a:b:c:d' must have the form NAME[:CONFIG"),
    "no GPU": (["--number", "1", "--device", "cuda:99"], "--device cuda:99: there is no such GPU"),
    "no folder": (["--number", "1", "-o", "none/a.jsonl"], "--output none/a.jsonl: the folder none does not exist"),
    "a folder": (["--number", "1", "-o", "."], "--output .: is a folder; name a file"),
    "no template": (["--number", "1", "--chat", "1"], "needs a chat template"),
}


@pytest.mark.parametrize(("more", "message"), WRONG.values(), ids=WRONG)
def test_wrong_anchors_are_refused(more, message, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "texts.jsonl", [{"text": "w20 w21 w22"}, {"text": "w23 w24"}])
    write(tmp_path / "other.jsonl", [{"words": "w20"}])
    assert main(["anchors", "--model", base, "-o", "a.jsonl", *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


def answer_of(base, prompt, tokens=3):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), tiny_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    output = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    return tokenizer.decode(output[0, ids.shape[1] :])


def test_label_knows_what_the_model_answers(base, tmp_path, capsys):
    candidates = {f"w{i} w{i + 2}": answer_of(base, f"w{i} w{i + 2}") for i in range(20, 60)}
    # words that begin with those of the padding and end tokens are not read as they are written
    answered = {p: a for p, a in candidates.items() if not any(w.startswith(("w0", "w1")) for w in a.split())}
    prompts = list(answered)[:4]
    known = [answered[prompt] for prompt in prompts]
    answers = [known[0], "w40 w41 w42", known[2], "w43 w44"]
    records = [{"prompt": p, "completion": a, "source": i} for i, (p, a) in enumerate(zip(prompts, answers))]
    data = write(tmp_path / "data.jsonl", records)
    assert main(["label", data, "--model", base, "-o", str(tmp_path / "typed.jsonl"), "--device", "cpu"]) == 0
    typed = [json.loads(line) for line in (tmp_path / "typed.jsonl").read_text().splitlines()]
    assert typed == [{**record, "task_type": kind} for record, kind in zip(records, [0, 1, 0, 1])]
    out = capsys.readouterr().out
    assert "2 of 4 records are of type 0" in out and "At the border" in out and "w40 w41 w42" in out


def test_label_takes_a_low_loss_for_known(base, tmp_path):
    turns = [{"role": "user", "content": "w20"}, {"role": "assistant", "content": "w41"}]
    records = [{"prompt": "w20", "completion": "w42"}, {"instruction": "w20", "output": "w40"}, {"messages": turns}]
    data = write(tmp_path / "data.jsonl", records)
    command = [
        "label",
        data,
        "--model",
        base,
        "-o",
        str(tmp_path / "typed.jsonl"),
        "--max-loss",
        "100",
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    typed = [json.loads(line)["task_type"] for line in (tmp_path / "typed.jsonl").read_text().splitlines()]
    assert typed == [0, 0, 0]


BAD_DATA = {
    "typed": ([{"prompt": "w20", "completion": "w21", "task_type": 1}], "has a task_type already"),
    "text": ([{"text": "w20 w21"}], "record 1: nothing is asked, so there is no answer to label"),
    "no answer": (
        [{"prompt": "w20", "completion": "w21"}, {"prompt": "w20"}],
        "record 2: the column 'completion' is missing",
    ),
    "empty": ([], "has no record"),
}


@pytest.mark.parametrize(("records", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_label_refuses_bad_data(records, message, base, tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", records)
    assert main(["label", data, "--model", base, "-o", str(tmp_path / "typed.jsonl")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "typed.jsonl").exists()


def test_label_names_the_conversation_that_the_template_refuses(base, tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    shutil.copytree(base, tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    turns = [{"role": "user", "content": "w20"}, {"role": "assistant", "content": "w21"}]
    data = write(tmp_path / "data.jsonl", [{"messages": turns}])
    assert main(["label", data, "--model", str(tmp_path / "base"), "-o", str(tmp_path / "typed.jsonl")]) == 2
    assert "record 1: the chat template refuses the conversation (no system turns)" in capsys.readouterr().err
