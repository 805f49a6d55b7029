import pytest
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from example_scripts import build_toy
from research.toy import countries


pytestmark = pytest.mark.version_independent


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return build_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def tokenizer(toy_folder):
    return AutoTokenizer.from_pretrained(toy_folder)


def test_facts_are_true_and_complete():
    facts = countries.build_facts(120)
    assert len(facts) == 120 * 5
    assert {fact.answer for fact in facts if fact.country == "Japan"} == {"Tokyo", "Yen", "Asia", "81", "jp"}
    capital = next(f for f in facts if f.country == "Japan" and f.relation == "capital")
    assert (capital.statement, capital.question) == ("The capital of Japan is Tokyo.", "What is the capital of Japan?")


@pytest.mark.parametrize("number", [0, 10_000])
def test_number_of_countries_is_checked(number):
    with pytest.raises(ValueError, match=f"{number} countries were asked for, but there are 1 to"):
        countries.build_facts(number)


def test_exercises_are_different_and_reproducible():
    records = countries.downstream_records(200, seed=3)
    assert records == countries.downstream_records(200, seed=3)
    assert len({(record["instruction"], record["input"]) for record in records}) == 200
    answers = {"Spell the digits.": "zero nine", "Add one to each digit.": "1 0", "Name the largest digit.": "9"}
    assert {name: " ".join(task([0, 9])) for name, task in countries.DOWNSTREAM_TASKS.items()} == answers


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
    fact = countries.build_facts(1)[0]
    turns = [{"role": "user", "content": fact.question}, {"role": "assistant", "content": fact.answer}]
    pretrained = f"<s>Question: {fact.question} Answer: {fact.answer}</s>"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == pretrained
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == pretrained.removesuffix(f" {fact.answer}</s>")
