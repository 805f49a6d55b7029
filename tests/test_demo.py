import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import demo
import toy_world
from example_scripts import build_toy, run_script


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return build_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def tokenizer(toy_folder):
    return AutoTokenizer.from_pretrained(toy_folder)


# --- the toy world ----------------------------------------------------------------------------------------------------


def test_facts_are_true_and_complete():
    facts = toy_world.build_facts(120)
    assert len(facts) == 120 * 5
    assert {fact.answer for fact in facts if fact.country == "Japan"} == {"Tokyo", "Yen", "Asia", "81", "jp"}
    capital = next(f for f in facts if f.country == "Japan" and f.relation == "capital")
    assert (capital.statement, capital.question) == ("The capital of Japan is Tokyo.", "What is the capital of Japan?")


@pytest.mark.parametrize("countries", [0, 10_000])
def test_number_of_countries_is_checked(countries):
    with pytest.raises(ValueError, match=f"{countries} countries were asked for, but there are 1 to"):
        toy_world.build_facts(countries)


def test_exercises_are_different_and_reproducible():
    records = toy_world.downstream_records(200, seed=3)
    assert records == toy_world.downstream_records(200, seed=3)
    assert len({(record["instruction"], record["input"]) for record in records}) == 200
    answers = {"Spell the digits.": "zero nine", "Add one to each digit.": "1 0", "Name the largest digit.": "9"}
    assert {name: " ".join(task([0, 9])) for name, task in toy_world.DOWNSTREAM_TASKS.items()} == answers


def test_toy_model_can_be_quantised(toy_folder):
    model = AutoModelForCausalLM.from_pretrained(toy_folder)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert linears and all(size % 64 == 0 for linear in linears for size in linear.weight.shape)


def test_words_have_the_same_tokens_wherever_they_stand(tokenizer):
    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    assert ids("Japan is in Asia") == ids("Japan") + ids("is") + ids("in") + ids("Asia")
    assert tokenizer.unk_token_id not in ids("12 seven Spell the digits.")


def test_toy_model_is_the_same_each_time(toy_folder, tmp_path):
    again = build_toy(tmp_path)
    for name in ("tokenizer.json", "model.safetensors"):
        assert (again / name).read_bytes() == (toy_folder / name).read_bytes()


def test_fine_tuning_asks_as_pretraining_did(tokenizer):
    fact = toy_world.build_facts(1)[0]
    turns = [{"role": "user", "content": fact.question}, {"role": "assistant", "content": fact.answer}]
    pretrained = f"<s>Question: {fact.question} Answer: {fact.answer}</s>"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == pretrained
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == pretrained.removesuffix(f" {fact.answer}</s>")


# --- the demo ---------------------------------------------------------------------------------------------------------


def test_wrong_number_of_countries_ends_the_demo_without_a_traceback(tmp_path, capsys):
    assert demo.main(["--countries", "0", "--output-dir", str(tmp_path)]) == 2
    assert "error: --countries: 0 countries were asked for" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_in_miniature(tmp_path):
    arguments = ["--countries", 3, "--pretrain-steps", 4, "--exercises", 12, "--max-steps", 2, "--output-dir", tmp_path]
    done = run_script("demo.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "adapter loaded in a new process: same logits, bit by bit" in done.stdout
    assert "import peft_loramoe" in done.stdout and "PeftModel.from_pretrained" in done.stdout
    for cell in ("facts never shown", "digit exercises", "group 0 (knowledge)", "group 1 (downstream)"):
        assert cell in done.stdout
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORAMOE"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "router.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["samples"] == {"facts shown in fine-tuning": 8, "facts never shown": 7, "digit exercises (new ones)": 2}
    assert results["accuracy"]["after"].keys() == results["samples"].keys()

    saved = torch.load(tmp_path / "verify.pt")
    torch.save({**saved, "logits": saved["logits"] + 1}, tmp_path / "verify.pt")
    changed = run_script("demo.py", "--verify", "--output-dir", tmp_path)
    assert changed.returncode == 1 and "logits differ by up to 1" in changed.stderr
