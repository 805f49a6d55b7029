"""The command `evaluate`, as `main` runs it."""

import dataclasses
import functools
import json
import shutil
import sys
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_loramoe.analysis import Question, answer_questions, compare_results
from peft_loramoe.cli import base_model, main
from peft_loramoe.cli.tables import show_evaluation
from perplexity_task import NAME, word_perplexity, write_task
from tiny import loramoe, tiny_llama, tiny_tokenizer


ASK = ["--template", "{question}", "--max-new-tokens", "2", "--device", "cpu", "--batch-size", "4"]
SIDES = {"hidden_size": 64, "intermediate_size": 64}  # what bitsandbytes can quantise
CHAT = "{% for m in messages %}{{ m.content }} w{{ 5 if m.role == 'user' else 6 }} {% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama whose attention has biases, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_llama(attention_bias=True, eos_token_id=1, **SIDES).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def loaded(base, adapter=None, **options):
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


@pytest.fixture(scope="module")
def adapters(base):
    """A mixture that changes some of the answers, and a LoRA that changes the base model's biases."""
    folders = {name: base.parent / name for name in ("loramoe", "lora")}
    model = loramoe(loaded(base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.mul_(0.2)
    model.save_pretrained(folders["loramoe"])
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False, bias="all", task_type="CAUSAL_LM")
    model = get_peft_model(loaded(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folders["lora"])
    return folders


def first_tokens(model, question):
    """Greedy decoding of two tokens, without a cache."""
    ids = tiny_tokenizer()(question).input_ids
    for _ in range(2):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == 1:  # the end token
            break
    return tiny_tokenizer().decode(ids[len(tiny_tokenizer()(question).input_ids) :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def questions(base):
    """Of every three questions the base model knows two."""
    model, file = loaded(base), base.parent / "questions.jsonl"
    texts = [f"w{i} w{i + 1}" for i in range(20, 50)]
    records = [
        {"question": q, "answer": [first_tokens(model, q) if i % 3 else "w3", "w4"]} for i, q in enumerate(texts)
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def call(*words):
    assert main(["evaluate", *(str(word) for word in words)]) == 0


def report(capsys, *words):
    """What the command prints as JSON."""
    capsys.readouterr()
    call(*words, "--json")
    return json.loads(capsys.readouterr().out)


def test_each_adapter_is_compared_with_the_base_model(base, adapters, questions, capsys):
    order = ["lora", "loramoe"]  # what the LoRA does to the base model's biases must not reach the mixture
    found = report(
        capsys, "--adapter", *(adapters[name] for name in order), "--questions", questions, "--shots", 0, *ASK
    )
    (asked,) = found["closed_book"]
    assert (asked["questions"], asked["count"], asked["shots"]) == (str(questions), 30, [])
    assert [model["adapter"] for model in asked["models"]] == [None, *(str(adapters[name]) for name in order)]
    records = [json.loads(line) for line in questions.read_text().splitlines()]
    right = {}
    for name, model in zip(["base", *order], asked["models"]):
        measured = loaded(base, adapters.get(name))
        given = [first_tokens(measured, record["question"]) for record in records]
        right[name] = [answer in record["answer"] for answer, record in zip(given, records)]
        assert [response["given"] for response in model["responses"]] == given
        assert model["exact_match"] == pytest.approx(sum(right[name]) / 30)
    assert 0 < sum(right["loramoe"]) < sum(right["base"]) and right["loramoe"] != right["lora"]
    assert asked["models"][0]["comparison"] is None
    for name, model in zip(order, asked["models"][1:]):
        pairs = list(zip(right["base"], right[name]))
        comparison = model["comparison"]
        assert comparison["known"] == sum(right["base"])
        assert (comparison["lost"], comparison["gained"]) == (pairs.count((True, False)), pairs.count((False, True)))


def test_the_report_says_how_it_came_about(base, questions, capsys):
    found = report(capsys, "--model", base, "--questions", questions, *ASK)
    assert found["versions"] == {name: version(name) for name in ("peft_loramoe", "peft", "transformers", "torch")}
    assert len(found["date"]) == 10 and found["lm_eval"] == []
    named = {"model": str(base), "adapter": [], "questions": [str(questions)], "lm_eval": [], "include_path": None}
    prompt = {
        "shots": 5,
        "shots_file": None,
        "template": "{question}",
        "chat": False,
        "max_new_tokens": 2,
        "limit": None,
    }
    running = {"batch_size": 4, "load_in_4bit": False, "dtype": "auto", "device": "cpu", "gguf_file": None}
    assert found["options"] == {**named, **prompt, **running, "tokenizer": None, "revision": "main"}


def in_the_file(questions):
    return [Question(r["question"], tuple(r["answer"])) for r in map(json.loads, questions.read_text().splitlines())]


# options of the command, options of the model, and of `answer_questions`
SETTINGS = {
    "examples": (["--shots", "3"], {}, {"shots": slice(0, 3), "asked": slice(3, None)}),
    "a part of the questions": (["--shots", "1", "--limit", "7"], {}, {"shots": slice(0, 1), "asked": slice(1, 8)}),
    "a template": (["--shots", "0", "--template", r"w7 {question}\n"], {}, {"template": "w7 {question}\n"}),
    "a conversation": (["--shots", "0", "--chat"], {}, {"chat": True}),
    "the number of tokens": (["--shots", "0", "--max-new-tokens", "1"], {}, {"max_new_tokens": 1}),
    "a dtype": (["--shots", "0", "--dtype", "bfloat16"], {"dtype": torch.bfloat16}, {}),
    "4 bits": (
        ["--shots", "0", "--load-in-4bit", "--dtype", "float32"],
        {
            "dtype": torch.float32,
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            ),
        },
        {},
    ),
}


@pytest.mark.parametrize("words, model_options, options", SETTINGS.values(), ids=SETTINGS)
def test_options_reach_the_questions(words, model_options, options, base, adapters, questions, capsys):
    found = report(capsys, "--adapter", adapters["loramoe"], "--questions", questions, *ASK, *words)
    every, options = in_the_file(questions), dict(options)
    shots, asked = every[options.pop("shots", slice(0))], every[options.pop("asked", slice(None))]
    expected = [
        answer_questions(
            loaded(base, adapter, **model_options),
            tiny_tokenizer_with_chat(),
            asked,
            shots,
            **{"template": "{question}", "max_new_tokens": 2, "batch_size": 4, **options},
        )
        for adapter in (None, adapters["loramoe"])
    ]
    (printed,) = found["closed_book"]
    assert [shot["question"] for shot in printed["shots"]] == [shot.question for shot in shots]
    for result, model in zip(expected, printed["models"]):
        assert model["responses"] == [dataclasses.asdict(response) for response in result.responses]
        assert (model["exact_match"], model["f1"], model["loss"]) == (result.exact_match, result.f1, result.loss)
    comparison = json.loads(json.dumps(dataclasses.asdict(compare_results(*expected))))
    assert printed["models"][1]["comparison"] == comparison


def tiny_tokenizer_with_chat():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def test_examples_from_another_file_are_not_asked(base, questions, tmp_path, capsys):
    first, *rest = questions.read_text().splitlines()
    (tmp_path / "shots.json").write_text(json.dumps([json.loads(rest[4]), {"question": "w9", "answer": "w8"}]))
    options = ["--shots-file", tmp_path / "shots.json", "--shots", 2]
    (asked,) = report(capsys, "--model", base, "--questions", questions, *ASK, *options)["closed_book"]
    assert [shot["answers"] for shot in asked["shots"]] == [json.loads(rest[4])["answer"], ["w8"]]
    texts = [json.loads(line)["question"] for line in (first, *rest[:4], *rest[5:])]
    assert [response["question"] for response in asked["models"][0]["responses"]] == texts


def test_a_table_is_printed_and_the_report_is_written(base, adapters, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "report.json"
    words = ["--adapter", adapters["lora"], "--questions", questions, questions, *ASK]
    output.write_text("{}")  # is replaced
    call(*words, "-o", output)
    printed = capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written == report(capsys, *words)
    assert printed.count("questions.jsonl: 25 questions, 5 examples in the prompt") == 2
    comparison = written["closed_book"][0]["models"][1]["comparison"]
    lost = f"{comparison['lost']} of {comparison['known']}"
    low, high = (f"{100 * value:+.1f}" for value in comparison["interval"])
    p_value = format(comparison["p_value"], ".2g")
    for part in (lost, p_value, f"{100 * comparison['difference']:+.1f}", f"{low} to {high}", f"Wrote {output}."):
        assert part in printed, printed


def test_what_was_measured_before_a_failure_is_in_the_file(base, paths, questions, tmp_path, capsys):
    output = tmp_path / "report.json"
    words = ["--adapter", paths["lora"], paths["no weights"], "--questions", questions, *ASK, "-o", output]
    assert main(["evaluate", *map(str, words)]) == 2
    written = json.loads(output.read_text())
    (expected,) = report(capsys, "--adapter", paths["lora"], "--questions", questions, *ASK)["closed_book"]
    assert written["closed_book"] == [expected] and written["options"]["adapter"][1] == str(paths["no weights"])


def test_a_tokenizer_of_choice(base, questions, tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT.replace("w6", "w9")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = ["--base-model", base, "--tokenizer", tmp_path / "tokenizer", "--questions", questions, "--chat", *ASK]
    found = report(capsys, *words)
    every = in_the_file(questions)
    expected = answer_questions(
        loaded(base), tokenizer, every[5:], every[:5], "{question}", chat=True, max_new_tokens=2
    )
    (asked,) = found["closed_book"]
    assert asked["models"][0]["loss"] == pytest.approx(expected.loss, abs=1e-6)
    assert found["options"]["tokenizer"] == str(tmp_path / "tokenizer")


REVISIONS = {
    "the adapter's": ([], "v2"),
    "with --model": (["--model", "{base}"], "v2"),
    "another folder's": (["--model", "{link}"], "v2"),
    "another model": (["--model", "{copy}"], "main"),
}


@pytest.mark.parametrize("words, expected", REVISIONS.values(), ids=REVISIONS)
def test_the_revision_of_the_base_model(words, expected, base, paths, questions, tmp_path, capsys, monkeypatch):
    (tmp_path / "link").symlink_to(base)
    shutil.copytree(base, tmp_path / "copy")
    asked = []
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        read = getattr(base_model, name).from_pretrained

        def from_pretrained(source, revision, read=read, **options):
            asked.append((str(source), revision))
            return read(source, **options)

        monkeypatch.setattr(getattr(base_model, name), "from_pretrained", from_pretrained)
    words = [word.format(base=base, link=tmp_path / "link", copy=tmp_path / "copy") for word in words]
    found = report(capsys, "--adapter", paths["revision"], *words, "--questions", questions, "--limit", 1, *ASK)
    assert asked == [(words[-1] if words else str(base), expected)] * 3 and found["options"]["revision"] == expected


def test_logits_that_are_not_finite_are_an_error(base, questions, tmp_path, capsys):
    model = loaded(base)
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    model.save_pretrained(tmp_path / "model")
    words = ["--model", tmp_path / "model", "--tokenizer", base, "--questions", questions, *ASK]
    assert main(["evaluate", *map(str, words)]) == 2
    assert "The model's logits (torch.float32) are not finite" in capsys.readouterr().err


def test_another_base_model_is_warned_about(base, adapters, questions, tmp_path, capsys, monkeypatch):
    (tmp_path / "copy").symlink_to(base)
    monkeypatch.chdir(base.parent)
    call("--model", "base", "--adapter", adapters["lora"], "--questions", questions, "--limit", 1, *ASK)
    assert "warning" not in capsys.readouterr().err
    tiny_llama(attention_bias=True, **SIDES).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    call("--model", tmp_path / "other", "--adapter", adapters["lora"], "--questions", questions, "--limit", 1, *ASK)
    assert (
        f"warning: '{adapters['lora']}' names '{base}' as its base model; it is evaluated on"
        in capsys.readouterr().err
    )


# --- lm-eval

TEXTS = ["w3 w4 w5 w6 w7", "w8 w9 w20", "w21 w22 w23 w24 w25 w26"]


@pytest.mark.slow
def test_tasks_of_lm_eval(base, adapters, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tasks = write_task(tmp_path / "tasks", TEXTS)
    words = ["--adapter", *adapters.values(), "--device", "cpu", "--lm-eval", NAME, "--include-path", tasks]
    found = report(capsys, *words)
    show_evaluation(found)
    table = capsys.readouterr().out
    assert found["versions"]["lm_eval"] == version("lm_eval") and found["closed_book"] == []
    for measured, adapter in zip(found["lm_eval"], (None, *adapters.values()), strict=True):
        expected = word_perplexity(loaded(base, adapter), TEXTS)
        assert measured["adapter"] == (adapter and str(adapter))
        assert measured["results"][NAME]["word_perplexity,none"] == pytest.approx(expected, rel=1e-5)
        assert f"{expected:.4g}" in table
    with pytest.raises(ValueError, match="--lm-eval: tiny_preplexity is not an lm-eval task"):
        main(["--traceback", "evaluate", "--model", str(base), "--lm-eval", "tiny_preplexity"])


@pytest.fixture
def task_of_lm_eval(tmp_path, monkeypatch):
    """The options for a task whose one text is scored."""
    from lm_eval import tasks

    # without the 14,000 files of its own tasks, which take longer to read than the rest of a test
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_task(tmp_path / "tasks", TEXTS)
    return ["--lm-eval", NAME, "--include-path", folder, "--limit", 1, "--device", "cpu"]


@pytest.mark.slow
def test_lm_eval_gets_a_tokenizer_of_its_own(base, task_of_lm_eval, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None  # lm-eval gives it one
    monkeypatch.setattr(base_model.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    call("--model", base, *task_of_lm_eval)
    assert tokenizer.pad_token is None


@pytest.mark.slow
def test_results_of_lm_eval_that_are_no_numbers(base, task_of_lm_eval, tmp_path, capsys):
    model = loaded(base)
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    model.save_pretrained(tmp_path / "model")
    found = report(capsys, "--model", tmp_path / "model", "--tokenizer", base, *task_of_lm_eval)
    assert found["lm_eval"][0]["results"][NAME]["word_perplexity,none"] is None
    show_evaluation(found)
    assert "word_perplexity" in capsys.readouterr().out


def test_tasks_need_lm_eval(base, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", "--model", str(base), "--lm-eval", "arc_easy"]) == 2
    assert '--lm-eval needs lm-eval: pip install "lm-eval[hf]"' in capsys.readouterr().err


# --- bad input

# (words, part of the message); {base}, {questions} and so on are replaced by paths.
BAD = {
    "nothing to do": ("--model {base}", "There is nothing to evaluate: pass --questions or --lm-eval tasks"),
    "no model": ("--questions {questions}", "Name the base model with --model: no adapter names one"),
    "an adapter without a base model": ("--adapter {homeless} --questions {questions}", "no adapter names one"),
    "two base models": (
        "--adapter {lora} {elsewhere} --questions {questions}",
        "--model: the adapters name '{base}' and 'gpt2'",
    ),
    "two revisions": (
        "--adapter {lora} {revision} --questions {questions}",
        "The adapters name the revisions 'main' and 'v2' of '{base}'; evaluate those of each revision",
    ),
    "two revisions of the model": (
        "--model {base} --adapter {lora} {revision} --questions {questions}",
        "The adapters name the revisions 'main' and 'v2' of '{base}'; evaluate those of each revision",
    ),
    "no adapter": ("--model {base} --adapter {nowhere} --questions {questions}", "nowhere"),
    "a classifier": (
        "--adapter {classifier} --questions {questions}",
        "has task_type='SEQ_CLS'; only causal language models",
    ),
    "no such model": ("--model {nowhere} --questions {questions}", "nowhere"),
    "no such questions": ("--model {base} --questions {nowhere}.json", "No such file or directory"),
    "the output is a folder": (
        "--model {base} --questions {questions} -o {base}",
        "--output {base}: is a folder; name a file",
    ),
    "the output has no folder": (
        "--model {base} --questions {questions} -o {nowhere}/a.json",
        "--output {nowhere}/a.json: the folder {nowhere} does not exist; create it first",
    ),
    "too few examples": (
        "--model {base} --questions {questions} --shots 31",
        "--shots 31: {questions} has 30 questions only",
    ),
    "too few in the other file": (
        "--model {base} --questions {questions} --shots-file {two} --shots 3",
        "{two} has 2 questions",
    ),
    "only examples": ("--model {base} --questions {two} --shots 2", "{two}: all questions are among the 2 examples"),
    "a negative number of examples": ("--model {base} --shots -1", "'-1' must be an integer, at least 0"),
    "a limit of nothing": ("--model {base} --limit 0", "'0' must be an integer, at least 1"),
    "an unknown dtype": ("--model {base} --dtype int8", "invalid choice: 'int8'"),
    "a template without the question": (
        "--model {base} --questions {questions} --template Q",
        "must contain {{question}}",
    ),
    "no chat template": (
        "--model {base} --tokenizer {plain} --chat --questions {questions}",
        "The tokenizer '{plain}' has no chat template",
    ),
    "examples without questions": (
        "--model {base} --lm-eval x --shots 2",
        "--shots 2 has no effect without --questions",
    ),
    "a file of examples without questions": (
        "--model {base} --lm-eval x --shots-file {two}",
        "--shots-file {two} has no effect without --questions",
    ),
    "a template without questions": (
        "--model {base} --lm-eval x --template Q",
        "--template Q has no effect without --questions",
    ),
    "a length without questions": (
        "--model {base} --lm-eval x --max-new-tokens 3",
        "--max-new-tokens 3 has no effect without --questions",
    ),
    "a folder of tasks without tasks": (
        "--model {base} --questions {questions} --include-path {base}",
        "--include-path {base} has no effect without --lm-eval",
    ),
    "no examples from a file": (
        "--model {base} --questions {questions} --shots 0 --shots-file {two}",
        "--shots-file {two} has no effect with --shots 0",
    ),
    "no folder of tasks": ("--model {base} --lm-eval x --include-path {two}", "--include-path {two} is not a folder"),
}


@pytest.fixture(scope="module")
def paths(base, adapters, questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    found = {
        "base": base,
        "questions": questions,
        "nowhere": folder / "nowhere",
        "two": folder / "two.jsonl",
        **adapters,
    }
    found["two"].write_text("\n".join(questions.read_text().splitlines()[:2]))
    changes = {
        "homeless": {"base_model_name_or_path": None},
        "elsewhere": {"base_model_name_or_path": "gpt2"},
        "classifier": {"task_type": "SEQ_CLS"},
        "revision": {"revision": "v2"},
        "no weights": {},
    }
    for name, change in changes.items():
        found[name] = folder / name
        found[name].mkdir()
        config = json.loads((adapters["lora"] / "adapter_config.json").read_text())
        (found[name] / "adapter_config.json").write_text(json.dumps({**config, **change}))
    shutil.copy(adapters["lora"] / "adapter_model.safetensors", found["revision"])
    found["plain"] = folder / "plain"
    tiny_tokenizer().save_pretrained(found["plain"])
    return found


@pytest.mark.parametrize("words, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(words, message, paths, capsys):
    try:
        code = main(["evaluate", *words.format(**paths).split()])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    output, errors = capsys.readouterr()
    errors = [line for line in errors.splitlines() if line.startswith("peft-loramoe")]
    assert (code, output, len(errors)) == (2, "", 1), errors
    assert ": error: " in errors[0] and message.format(**paths) in errors[0], errors
