import json

import pytest
from transformers import AutoTokenizer

from example_scripts import RECORD, build_toy, write_lines
from peft_loramoe import LoRAMoEConfig
from peft_loramoe.training.records import PLAIN_PROMPT, Record, check_records, read_records, tokenize_records


NAMES = ["facts", "skills"]
CHAT = [{"role": "user", "content": "Name the capital of France."}, {"role": "assistant", "content": "Paris"}]
TWO_ANSWERS = [*CHAT, {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "in Europe"}]
TEXT = {"prompt": "The capital of France is", "completion": " Paris.", "task_type": 1}


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return build_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def tokenizer(toy_folder):
    return AutoTokenizer.from_pretrained(toy_folder)


def tokenized(tokenizer, *records, **options):
    checked = check_records([(f"record {i}", record) for i, record in enumerate(records)], "file", LoRAMoEConfig())
    return tokenize_records(checked, tokenizer, **options)


def learned(row):
    return [token for token, label in zip(row["input_ids"], row["labels"]) if label != -100]


def answer(tokenizer, text):
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


# --- reading


def without(column):
    return {name: value for name, value in RECORD.items() if name != column}


def chat(*turns):
    return json.dumps({"messages": turns, "task_type": 0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no records"),
        ("[]", "there are no records"),
        (json.dumps(RECORD) + '\n\n{"instruction": }', r"line 3: no valid JSON \(Expecting value, column 17\)"),
        ('[\n{"instruction": "x"},\n]', r"line \d: no valid JSON"),
        (
            json.dumps({**RECORD, "images": ["cat.png"]}),
            "line 1: the column 'images' has images, which .* cannot have",
        ),
        (json.dumps(RECORD) + "\n" + json.dumps(without("output")), "line 2: the column 'output' is missing"),
        (
            json.dumps([RECORD, without("task_type")]),
            "record 2: task_type is missing, but .*record 1 has one; give all",
        ),
        (
            json.dumps([without("task_type"), RECORD]),
            "record 1: task_type is missing, but .*record 2 has one; give all",
        ),
        (json.dumps({"prompt": "x", "task_type": 0}), "line 1: the column 'completion' is missing"),
        (json.dumps({**RECORD, "output": 42}), "line 1: output is 42; write it as a string"),
        (json.dumps({**RECORD, "input": 0}), "line 1: input is 0; write it as a string"),
        (json.dumps({**RECORD, "instruction": False}), "line 1: instruction is False; write it as a string"),
        (json.dumps({**RECORD, "output": " "}), "line 1: output is ' '; give the answer"),
        (json.dumps({"text": "\n", "task_type": 0}), "line 1: text is .*; give the answer"),
        (json.dumps({**TEXT, "completion": ""}), "line 1: completion is ''; give the answer"),
        (json.dumps({**TEXT, "prompt": CHAT[:1]}), "line 1: prompt is .*; write it as a string"),
        ("17", "line 1: 17 is not an object"),
        (json.dumps({**RECORD, "task_type": "qa"}), "line 1: unknown task_type 'qa'; write one of 'facts', 'skills'"),
        (json.dumps({**RECORD, "task_type": 2}), "line 1: unknown task_type 2; .* an integer from 0 to 1"),
        (json.dumps({**RECORD, "task_type": True}), "line 1: unknown task_type True"),
        (chat(), r"line 1: messages is \[\]; write a list of turns"),
        (
            chat(CHAT[0], "Paris"),
            "line 1: messages: turn 2 is 'Paris'; write an object with the strings role and content",
        ),
        (chat(CHAT[0], {**CHAT[1], "tool_calls": [1]}), "line 1: messages: turn 2 is .*tool_calls.* no more"),
        (chat(CHAT[0], {"role": "assistant", "content": 3}), "line 1: messages: turn 2 is .*strings role and content"),
        (chat(*CHAT, CHAT[0]), "line 1: messages ends with a turn of 'user'; end with the assistant's answer"),
        (chat(CHAT[1]), "line 1: messages has one turn only; write what is asked"),
        (chat(CHAT[0], {"role": "assistant", "content": "\n"}), r"line 1: messages is '\\n'; give the answer"),
    ],
)
def test_errors_of_the_train_file_name_the_place(tmp_path, text, message):
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"train.jsonl[:,] ?{message}"):
        read_records(path, LoRAMoEConfig(task_type_names=NAMES))


def test_unknown_name_without_names_says_how_to_give_them(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", {**RECORD, "task_type": "qa"})
    with pytest.raises(ValueError, match="give task_type_names"):
        read_records(path, LoRAMoEConfig())


def test_names_and_numbers_are_task_types(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", *({**RECORD, "task_type": t} for t in ("skills", 0, -1)))
    records = read_records(path, LoRAMoEConfig(task_type_names=NAMES))
    assert [record.task_type for record in records] == [1, 0, -1]


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": CHAT},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"instruction": CHAT[0]["content"], "input": "", "output": "Paris"},
        {"instruction": CHAT[0]["content"], "output": "Paris"},
        {"instruction": "", "input": CHAT[0]["content"], "output": "Paris", "source": "ignored"},
    ],
)
def test_formats_say_the_same(columns):
    record = check_records([("here", {**columns, "task_type": 1})], "file", LoRAMoEConfig())[0]
    assert record == Record("here", CHAT[:1], CHAT[1:], 1)


def test_a_file_without_task_types_holds_tasks(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", *[without("task_type")] * 2)
    assert [record.task_type for record in read_records(path, LoRAMoEConfig.retain())] == [1, 1]
    assert [record.task_type for record in read_records(path, LoRAMoEConfig(expert_groups=[6]))] == [0, 0]


def test_a_file_may_mix_formats(tmp_path):
    path = write_lines(
        tmp_path / "train.jsonl", RECORD, TEXT, {"messages": CHAT, "task_type": 1}, {"text": "x", "task_type": 0}
    )
    prompts = [record.prompt for record in read_records(path, LoRAMoEConfig())]
    assert prompts == [CHAT[:1], TEXT["prompt"], CHAT[:1], ""]


def test_columns_that_a_data_set_filled_with_none_are_absent():
    row = {"messages": None, "prompt": "x", "completion": "y", "text": None}
    assert check_records([("here", row)], "file", LoRAMoEConfig())[0] == Record("here", "x", "y", 1)


# --- tokens


def test_only_the_answer_is_learned(tokenizer):
    row = tokenized(tokenizer, {**RECORD, "input": "1 2"}).dataset[0]
    assert tokenizer.decode(row["input_ids"]).startswith("<s>")
    assert learned(row) == answer(tokenizer, "Paris")
    assert row["task_type"] == 0


def test_prompts_are_learned_without_answers_only(tokenizer):
    row = tokenized(tokenizer, RECORD, answers_only=False).dataset[0]
    assert row["labels"] == row["input_ids"]


def test_each_record_is_read_by_its_own_kind(tokenizer):
    records = (RECORD, TEXT, {"text": "Paris is a city.", "task_type": 0})
    mixed = tokenized(tokenizer, *records).dataset
    alone = [tokenized(tokenizer, record).dataset[0] for record in records]
    assert [dict(row) for row in mixed] == alone


def test_text_prompts_are_used_as_they_are(tokenizer):
    row = tokenized(tokenizer, TEXT).dataset[0]
    assert row["input_ids"] == [*tokenizer(TEXT["prompt"] + TEXT["completion"]).input_ids, tokenizer.eos_token_id]
    assert learned(row) == row["input_ids"][len(tokenizer(TEXT["prompt"]).input_ids) :]


def test_a_text_is_learned_whole(tokenizer):
    row = tokenized(tokenizer, {"text": "Paris is a city.", "task_type": 0}).dataset[0]
    assert row["input_ids"] == [*tokenizer("Paris is a city.").input_ids, tokenizer.eos_token_id]
    assert row["labels"] == row["input_ids"]


def test_questions_without_a_chat_template_have_a_plain_prompt(tokenizer):
    tokenizer.chat_template = None
    row = tokenized(tokenizer, RECORD).dataset[0]
    prompt = tokenizer(PLAIN_PROMPT.format(RECORD["instruction"])).input_ids
    assert row["input_ids"][: len(prompt)] == prompt
    assert learned(row) == row["input_ids"][len(prompt) :] and row["input_ids"][-1] == tokenizer.eos_token_id


def test_conversations_need_a_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="record 0: the tokenizer has no chat template"):
        tokenized(tokenizer, {"messages": TWO_ANSWERS, "task_type": 0})


@pytest.mark.parametrize("record", [TEXT, {"text": "Paris"}, RECORD], ids=["prompt", "text", "plain prompt"])
def test_texts_need_an_eos_token(record, tokenizer):
    tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="record 0: the tokenizer has no EOS token .* set tokenizer.eos_token"):
        tokenized(tokenizer, record)


WRONG_OPTIONS = {
    "length": ({"max_length": -1}, ValueError, "max_length=-1 must be at least 1"),
    "kind of length": ({"max_length": 2.5}, TypeError, "max_length=2.5 must be an integer"),
    "answers": ({"answers_only": "no"}, TypeError, "answers_only='no' must be True or False"),
    "template": ({"marked_template": True}, TypeError, "marked_template=True must be a string"),
    "progress": ({"progress": True}, TypeError, "progress=True must be a string"),
}


@pytest.mark.parametrize(("options", "kind", "message"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_wrong_options_are_refused(options, kind, message, tokenizer):
    with pytest.raises(kind, match=message):
        tokenized(tokenizer, RECORD, **options)


def test_a_conversation_that_the_template_refuses_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"record 0: the chat template refuses the conversation \(no system role\)"):
        tokenized(tokenizer, RECORD)


def test_every_answer_is_learned_with_a_template_that_marks_them(tokenizer):
    record = {"messages": TWO_ANSWERS, "task_type": 0}
    every = tokenized(tokenizer, record, marked_template=tokenizer.chat_template).dataset[0]
    last = tokenized(tokenizer, record).dataset[0]
    assert learned(every) == [*answer(tokenizer, "Paris"), *answer(tokenizer, "in Europe")]
    assert learned(last) == answer(tokenizer, "in Europe") and last["input_ids"] == every["input_ids"]


def test_max_length_cuts_and_leaves_out(tokenizer):
    long_answer, long_prompt = {**RECORD, "output": "1 " * 50}, {**RECORD, "input": "1 " * 50}
    result = tokenized(tokenizer, RECORD, long_answer, long_prompt, max_length=40)
    assert (len(result.dataset), result.cut, result.left_out) == (2, 1, 1)
    assert len(result.dataset[1]["input_ids"]) == len(result.dataset[1]["labels"]) == 40
