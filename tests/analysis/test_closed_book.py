import sys

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peft_loramoe.analysis import Question, answer_questions, score_answers
from peft_loramoe.analysis.closed_book import build_prompts, generate_answers
from tiny import VOCAB, loramoe, tiny_llama


LINE = 5  # the token of a line break
QUESTIONS = [Question(f"w{i} w{i + 1} " * (1 + i % 3), (f"w{i + 2}", "w9")) for i in range(20, 40)]
SHOTS = [Question("w41", ("w42", "w43")), Question("w44 w45", ("w46 w47",))]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{{ "
    "'thinking' if enable_thinking is not defined or enable_thinking }}{% endif %}"
)


def words(adds=None):
    """Words w0 to w63 and the line break."""
    vocabulary = {("<line>" if i == LINE else f"w{i}"): i for i in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.normalizer = normalizers.Replace("\n", " <line> ")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds:
        backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("w1", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.decode = lambda ids, **_: " ".join("\n" if i == LINE else f"w{i}" for i in map(int, ids))
    tokenizer.batch_decode = lambda rows, **_: [tokenizer.decode(row) for row in rows]
    return tokenizer


@pytest.fixture
def tokenizer():
    return words()


def greedy(model, ids, steps, ends=()):
    """Token by token, without a cache, to the end of the first line, or to an end token."""
    ids, start = list(ids), len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] in ends:
            return " ".join(f"w{i}" for i in ids[start:-1] if i != LINE)
        if ids[-1] == LINE and set(ids[start:]) != {LINE}:
            break
    return " ".join(f"w{i}" for i in ids[start:] if i != LINE)


def talkative(build=tiny_llama):
    """A model that writes line breaks often."""
    model = build().eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.get_output_embeddings().weight[LINE] *= 3
    return model


def prompt_tuned():
    """A model whose answers depend much on virtual tokens, and on how far away they are."""
    model = get_peft_model(
        tiny_llama(initializer_range=0.2), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(5)
    return model


MODELS = {"base": tiny_llama, "loramoe": loramoe, "prompt tuning": prompt_tuned}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_answers_are_the_first_lines_of_greedy_decoding(build, tokenizer):
    model = talkative(build)
    prompts = [question.question for question in QUESTIONS]
    expected = [greedy(model, tokenizer(prompt).input_ids, steps=6) for prompt in prompts]
    assert len({len(answer.split()) for answer in expected}) > 2, "the lines should differ in length"
    for batch_size in (1, 7, 64):
        assert generate_answers(model, tokenizer, prompts, 6, batch_size) == expected


ENDS = {"one end token": 40, "several": [2, *range(30, 50)]}


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_answers_end_before_an_end_token(ends, tokenizer):
    model = tiny_llama().eval()
    model.generation_config.eos_token_id = ends
    with torch.no_grad():
        model.get_output_embeddings().weight[40] *= 3
    prompts = [question.question for question in QUESTIONS]
    expected = [greedy(model, tokenizer(p).input_ids, 6, ends if isinstance(ends, list) else [ends]) for p in prompts]
    assert len({len(answer.split()) for answer in expected}) > 2, "the answers should differ in length"
    assert tokenizer.pad_token is None
    for batch_size in (1, 7, 64):
        assert generate_answers(model, tokenizer, prompts, 6, batch_size) == expected


# What a model's generation config may ask for; the suppressed tokens are all those that it would choose.
CONFIGS = {
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5},
    "penalties": {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
    "beams": {"num_beams": 3},
    "a shortest length": {"min_new_tokens": 6},
    "no end at first": {"begin_suppress_tokens": list(range(2, VOCAB))},
    "suppressed tokens": {"suppress_tokens": list(range(2, VOCAB))},
    "another output": {"return_dict_in_generate": True, "output_scores": True},
    "texts that end": {"stop_strings": ["w"]},
    "several answers": {"num_return_sequences": 2, "num_beams": 2},
}


@pytest.mark.parametrize("build", [tiny_llama, loramoe], ids=["base", "loramoe"])
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_settings_of_the_model_do_not_count(settings, build, tokenizer):
    model, prompts = build().eval(), [question.question for question in QUESTIONS]
    model.generation_config.eos_token_id = 40
    with torch.no_grad():
        model.get_output_embeddings().weight[40] *= 3
    expected = generate_answers(model, tokenizer, prompts, 6, 8)
    model.generation_config.update(**settings)
    own, before = model.generation_config, model.generation_config.to_dict()
    assert generate_answers(model, tokenizer, prompts, 6, 8) == expected
    assert model.generation_config is own and own.to_dict() == before


def test_an_error_leaves_the_settings_of_the_model(tokenizer):
    model = tiny_llama()
    own = model.generation_config
    model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_answers(model, tokenizer, ["w3"], 6, 8)
    assert model.generation_config is own


def test_the_chat_template_puts_all_special_tokens():
    results = []
    for tokenizer in (words(), words("w1 $A w1")):
        tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} w6 {% endfor %}"
        results.append(
            answer_questions(tiny_llama(), tokenizer, QUESTIONS, template="{question}", chat=True, max_new_tokens=3)
        )
    assert results[0] == results[1]


def test_an_end_token_that_the_tokenizer_adds_is_not_part_of_the_prompt(tokenizer):
    model, prompts = tiny_llama().eval(), ["w3 w4", "w5"]
    assert generate_answers(model, words("$A w1"), prompts, 3, 2) == generate_answers(model, tokenizer, prompts, 3, 2)


def test_responses_and_their_means(tokenizer):
    model = talkative()
    prompts = build_prompts(tokenizer, [question.question for question in QUESTIONS], SHOTS)
    answers = generate_answers(model, tokenizer, prompts, 3, 8)
    # Every second question is answered right, as far as its aliases tell.
    questions = [
        Question(q.question, (*q.answers, *([a] if i % 2 else []))) for i, (q, a) in enumerate(zip(QUESTIONS, answers))
    ]
    result = answer_questions(model, tokenizer, questions, SHOTS, max_new_tokens=3, batch_size=8)
    assert [r.given for r in result.responses] == answers
    assert [r.exact_match for r in result.responses] == [i % 2 == 1 for i in range(20)]
    assert [r.f1 for r in result.responses] == [q.f1(answer) for q, answer in zip(questions, answers)]
    losses = [score.loss for score in score_answers(model, tokenizer, prompts, [q.answers[0] for q in questions])]
    assert [r.loss for r in result.responses] == pytest.approx(losses, abs=1e-5)
    assert [(r.question, r.expected) for r in result.responses] == [(q.question, q.answers[0]) for q in questions]
    means = (result.exact_match, result.f1, result.loss)
    assert means == pytest.approx((0.5, sum(r.f1 for r in result.responses) / 20, sum(losses) / 20))


def test_the_modes_of_the_modules_are_restored(tokenizer):
    model = loramoe(lora_dropout=0.5).train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    first, second = (answer_questions(model, tokenizer, QUESTIONS, max_new_tokens=3) for _ in range(2))
    assert first == second and [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("build", [loramoe, prompt_tuned], ids=["loramoe", "prompt tuning"])
def test_a_disabled_adapter_leaves_the_base_model(build, tokenizer):
    model = build()
    with model.disable_adapter():
        before = answer_questions(model, tokenizer, QUESTIONS, max_new_tokens=3)
    after = answer_questions(model, tokenizer, QUESTIONS, max_new_tokens=3)
    base = tiny_llama(initializer_range=model.get_base_model().config.initializer_range)
    assert before == answer_questions(base, tokenizer, QUESTIONS, max_new_tokens=3) != after


def test_a_progress_bar_on_demand(tokenizer, capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    answer_questions(tiny_llama(), tokenizer, QUESTIONS, max_new_tokens=1)
    assert capfd.readouterr() == ("", "")
    answer_questions(tiny_llama(), tokenizer, QUESTIONS, max_new_tokens=1, progress=True)
    output, errors = capfd.readouterr()
    assert output == "" and "Answering" in errors


# options of build_prompts, and the prompt for the question "q {0}"
PROMPTS = {
    "no shots": ({}, "Question: q {0}\nAnswer:"),
    "shots": (
        {"shots": SHOTS},
        "Question: w41\nAnswer: w42\n\nQuestion: w44 w45\nAnswer: w46 w47\n\nQuestion: q {0}\nAnswer:",
    ),
    "a template": ({"template": "{question} ->"}, "q {0} ->"),
    "a template with a line break": ({"template": "{question}\n", "shots": SHOTS[:1]}, "w41\nw42\n\nq {0}\n"),
    "chat": ({"chat": True}, "<user>q {0}\nGive the answer only, in as few words as possible.</s><assistant>"),
    "chat with shots and a template": (
        {"chat": True, "template": "{question}", "shots": SHOTS[:1]},
        "<user>w41</s><assistant>w42</s><user>q {0}</s><assistant>",
    ),
}


@pytest.mark.parametrize("options, expected", PROMPTS.values(), ids=PROMPTS)
def test_prompts(options, expected, tokenizer):
    tokenizer.chat_template = CHAT
    assert build_prompts(tokenizer, ["q {0}"], **options) == [expected]


BAD = {
    "no questions": ({"questions": []}, "questions is empty"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    "batches of none": ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    "a shot that is asked": ({"shots": QUESTIONS[3:5]}, r"2 of the questions are also shots.*'w23 w24 "),
    "a template without the question": (
        {"template": "Question: {}"},
        r"template='Question: {}' must contain {question}",
    ),
    "a template that ends with a space": ({"template": "{question} "}, "must not end with a space"),
    "no chat template": ({"chat": True}, r"The tokenizer '' has no chat template, .*\(--tokenizer\)"),
}


def test_encoder_decoders_are_refused(tokenizer):
    model = loramoe()
    model.get_base_model().config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="LlamaForCausalLM is an encoder-decoder"):
        answer_questions(model, tokenizer, QUESTIONS)


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_input(options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        answer_questions(**{"model": tiny_llama(), "tokenizer": tokenizer, "questions": QUESTIONS, **options})
