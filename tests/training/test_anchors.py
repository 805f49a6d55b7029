"""Sampling anchors from a model, and the files they are kept in."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn

from peft_loramoe.training import anchors_from_texts, read_anchors, sample_anchors, write_anchors
from tiny import loramoe, tiny_llama, tiny_tokenizer


TEMPLATE = (
    "{% for m in messages %}{{ 'w2 w3 ' if m.role == 'user' else 'w2 w4 ' }}{{ m.content }}{{ ' w1 ' }}{% endfor %}{% "
    "if add_generation_prompt %}w2 w4 {% endif %}"
)
OPTIONS = {"max_tokens": 8, "batch_size": 4, "progress": False, "prefixes": ("w5", "w6 w7")}


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def sample(model=None, tokenizer=None, number=10, **options):
    model = tiny_llama().eval() if model is None else model
    return sample_anchors(model, tokenizer or tiny_tokenizer(), number, **{**OPTIONS, **options})


def texts(anchors, kind=None):
    return [anchor["text"] for anchor in anchors if kind in (None, anchor["kind"])]


def test_anchors_are_distinct_and_of_the_length_asked_for():
    anchors = sample()
    assert len(set(texts(anchors))) == 10 and all(anchor["kind"] == "prose" for anchor in anchors)
    assert all(1 < len(text.split()) <= 8 for text in texts(anchors))
    assert all(text.startswith(("w5", "w6 w7")) for text in texts(anchors))


def test_anchors_are_likely_under_the_model():
    tokenizer, model = tiny_tokenizer(), tiny_llama().eval()
    with torch.no_grad():
        model.lm_head.weight *= 20  # a model with an opinion
    anchors = sample(model, number=20, top_p=1.0)

    def loss(rows):
        losses = []
        for row in rows:
            ids = torch.tensor([tokenizer(row)["input_ids"]])
            losses.append(model(input_ids=ids, labels=ids).loss.item())
        return sum(losses) / len(losses)

    shuffled = [" ".join(reversed(text.split())) for text in texts(anchors)]
    assert loss(texts(anchors)) < 0.8 * loss(shuffled)


def test_a_template_without_an_opening_of_the_users_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} w1 {% endfor %}"
    with pytest.raises(ValueError, match="nothing before the user's turn.*set chat=0"):
        sample(tokenizer=tokenizer)


def test_half_are_chats_where_there_is_a_template():
    anchors = sample(tokenizer=chat_tokenizer(), number=9)
    assert len(texts(anchors, "prose")) == 5 and len(texts(anchors, "chat")) == 4
    for text in texts(anchors, "chat"):
        question, _, answer = text.removeprefix("w2 w3 ").partition(" w1 w2 w4 ")
        assert text.startswith("w2 w3 ") and question.strip() and answer.strip()


@pytest.mark.parametrize(("chat", "chats"), [(0, 0), (0.25, 2), (1, 8)])
def test_share_of_chats(chat, chats):
    assert len(texts(sample(tokenizer=chat_tokenizer(), number=8, chat=chat), "chat")) == chats


def test_texts_start_from_bos_where_the_tokenizer_adds_one():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "w2"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="w2 $A", special_tokens=[("w2", 2)])
    seen = []
    model = tiny_llama().eval()
    generate = model.generate
    model.generate = lambda **kwargs: seen.append(kwargs["input_ids"]) or generate(**kwargs)
    anchors = sample(model, tokenizer)
    rows = [[token for token in row if token] for row in seen[0].tolist()]
    assert [2] in rows and [2, 5] in rows
    assert not any("w2" in text.split()[:1] for text in texts(anchors))


def test_seed_decides():
    assert sample(seed=3) == sample(seed=3) != sample(seed=4)


def test_random_numbers_and_modes_are_left_alone():
    model = loramoe()
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sample(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trained


def test_the_base_model_writes():
    assert sample(loramoe()) == sample(tiny_llama().eval())
    model = loramoe()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        sample(model)
        torch.testing.assert_close(model(input_ids=torch.tensor([[5, 6, 7]])).logits, expected)


# files


def test_an_interrupted_run_goes_on(tmp_path):
    whole = sample(path=tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    assert read_anchors(tmp_path / "whole.jsonl") == whole
    (tmp_path / "part.jsonl").write_text("".join(lines[:4]) + lines[4][:9])  # killed while it wrote the second batch
    assert sample(path=tmp_path / "part.jsonl") == whole
    assert read_anchors(tmp_path / "part.jsonl") == whole
    assert sample(path=tmp_path / "part.jsonl") == whole


def test_a_second_writer_is_noticed(tmp_path):
    path, model = tmp_path / "anchors.jsonl", tiny_llama().eval()
    model.register_forward_hook(lambda *_: write_anchors(path, ["w9 w8 w7"], append=True))
    with pytest.raises(RuntimeError, match="anchors.jsonl was changed while anchors were written"):
        sample(model, path=path)
    assert set(texts(read_anchors(path))) == {"w9 w8 w7"}


def test_a_file_with_more_than_asked_for_is_refused(tmp_path):
    sample(path=tmp_path / "anchors.jsonl")
    with pytest.raises(ValueError, match="holds 10 anchors of kind prose, more than the 4 asked for"):
        sample(path=tmp_path / "anchors.jsonl", number=4)


def test_written_anchors_are_read(tmp_path):
    path = tmp_path / "anchors.jsonl"
    write_anchors(path, ["Größe", {"text": "two", "kind": "chat", "more": 1}])
    write_anchors(path, ["three"], append=True)
    assert [(a["text"], a["kind"]) for a in read_anchors(path)] == [
        ("Größe", "prose"),
        ("two", "chat"),
        ("three", "prose"),
    ]
    with pytest.raises(FileExistsError, match="exists already. Pass append=True"):
        write_anchors(path, ["four"])


BAD_FILES = {
    "empty": ("\n\n", "holds no anchor; write some with `peft-loramoe anchors`"),
    "no JSON": ('{"text": "a"}\n{"text"', "line 2: no valid JSON"),
    "no text": ('{"words": "a"}', "line 1: must be a record like"),
    "no record": ("[1]", "line 1: must be a record like"),
    "kind": ('{"text": "a", "kind": "song"}', "line 1: kind='song' must be one of prose, chat"),
    "no kind": ('{"text": "a", "kind": ""}', "line 1: kind='' must be one of prose, chat"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused(content, message, tmp_path):
    (tmp_path / "anchors.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_anchors(tmp_path / "anchors.jsonl")


def test_texts_of_ones_own():
    given = [f"w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(20, 30)]
    anchors = anchors_from_texts([*given, given[0], " "], tiny_tokenizer(), 8, max_tokens=3)
    assert len(set(texts(anchors))) == 8
    assert set(texts(anchors)) <= {" ".join(text.split()[:3]) for text in given}
    with pytest.raises(ValueError, match="give 10 distinct anchors .* fewer than number=11"):
        anchors_from_texts(given, tiny_tokenizer(), 11)


# bad options


WRONG = {
    "number": ({"number": 0}, ValueError, "number=0 must be at least 1"),
    "kind of number": ({"number": 2.5}, TypeError, "number=2.5 must be an integer"),
    "tokens": ({"max_tokens": 3}, ValueError, "max_tokens=3 must be at least 4"),
    "size of batches": ({"batch_size": True}, TypeError, "batch_size=True must be an integer"),
    "seed": ({"seed": "one"}, TypeError, "seed='one' must be an integer"),
    "chat without a template": ({"chat": 0.5}, ValueError, "chat=0.5 needs a chat template"),
    "chat": ({"chat": 2}, ValueError, r"chat=2 must be in \[0, 1\]: the share of chats"),
    "kind of chat": ({"chat": True}, TypeError, r"chat=True must be a number in \[0, 1\]: the share of chats"),
    "top_p": ({"top_p": 0}, ValueError, r"top_p=0 must be in \(0, 1\]"),
    "temperature": ({"temperature": "hot"}, TypeError, r"temperature='hot' must be a number in \(0, "),
    "no temperature": ({"temperature": float("nan")}, ValueError, r"temperature=nan must be in \(0, "),
    "one prefix": ({"prefixes": "Once"}, TypeError, "prefixes='Once' must be a list of openings"),
    "kind of prefix": ({"prefixes": ["w5", 6]}, TypeError, r"prefixes\[1\]=6 must be a string"),
    "a blank prefix": ({"prefixes": ["w5", " "]}, ValueError, r"prefixes\[1\]=' ' is blank; leave it out"),
    "progress": ({"progress": "no"}, TypeError, "progress='no' must be True or False"),
    "no folder": ({"path": "none/a.jsonl"}, FileNotFoundError, "path='none/a.jsonl': the folder none does not exist"),
    "no start": ({"prefixes": ()}, ValueError, "give prefixes that prose starts from"),
}


@pytest.mark.parametrize(("options", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        sample(**options)


class Monotonous(nn.Module):
    """Always writes the same."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, torch.full((len(input_ids), 4), 9)], dim=1)


def test_a_model_that_repeats_itself_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match="wrote 2 distinct anchors of kind prose, and nothing new .* Raise temperature"
    ):
        sample(Monotonous(), path=tmp_path / "anchors.jsonl")
    assert len(read_anchors(tmp_path / "anchors.jsonl")) == 2  # what there is is kept
    assert json.loads((tmp_path / "anchors.jsonl").read_text().splitlines()[0])["text"] in (
        "w5 w9 w9 w9 w9",
        "w6 w7 w9 w9 w9 w9",
    )


@pytest.mark.parametrize("anchor", ["The sky is blue.", {"text": "The sky is blue."}], ids=["text", "record"])
def test_one_anchor_is_no_list_of_anchors(anchor, tmp_path):
    with pytest.raises(TypeError, match="anchors=.*The sky is blue.* must be a list of texts or records"):
        write_anchors(tmp_path / "anchors.jsonl", anchor)
    assert not (tmp_path / "anchors.jsonl").exists()


def test_a_word_is_no_switch(tmp_path):
    write_anchors(tmp_path / "anchors.jsonl", ["The sky is blue."])
    with pytest.raises(TypeError, match="append='no' must be True or False"):
        write_anchors(tmp_path / "anchors.jsonl", ["The sky is grey."], append="no")
    with pytest.raises(TypeError, match="torn='no' must be True or False"):
        read_anchors(tmp_path / "anchors.jsonl", torn="no")


WRONG_TEXTS = {
    "one text": ("w20 w21 w22", {}, TypeError, "texts='w20 w21 w22' must be a list of texts"),
    "splits": ({"train": ["w20 w21"]}, {}, TypeError, "texts=.*'train'.* must be a list of texts"),
    "records": ([{"text": "w20 w21"}], {}, TypeError, r"texts\[0\]=.*'text'.* must be a string"),
    "tokens": (["w20 w21"], {"max_tokens": 1}, ValueError, "max_tokens=1 must be at least 2"),
    "seed": (["w20 w21"], {"seed": None}, TypeError, "seed=None must be an integer"),
}


@pytest.mark.parametrize(("given", "options", "kind", "message"), WRONG_TEXTS.values(), ids=WRONG_TEXTS)
def test_wrong_texts_are_refused(given, options, kind, message):
    with pytest.raises(kind, match=message):
        anchors_from_texts(given, tiny_tokenizer(), 1, **options)
