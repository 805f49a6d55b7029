import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from peft_loramoe.analysis import score_answers
from tiny import VOCAB, loramoe, tiny_llama


PROMPTS = ["w3 w4 w5", "w6", "w7 w8 w9 w10 w11 w12", "w13 w14", "w40 w41 w42"]
ANSWERS = ["w20 w21", "w22 w23 w24 w25", "w26", "w27 w28 w29", "w50"]
TEXTS = [
    "Question: What is the capital of France? Answer: Paris",
    "Question: Who wrote Faust? Answer: Goethe",
    "in São Tomé 東京 京",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|assistant|>"]


def byte_level(vocab_size=500):
    """Of the kind of GPT-2, Llama 3 and Qwen: a token contains the space before its word."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return backend


def metaspace():
    """Of the kind of Llama 1 and 2: the space is a character of its word, and one is put before the text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    return backend


def fast(backend, adds="<s> $A"):
    backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 1), ("</s>", 2)])
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def expected_score(model, prompt_ids, answer_ids):
    """Whether each answer token is the most likely one, and the mean loss: one text, token by token."""
    ids, losses, correct = list(prompt_ids), [], True
    for token in answer_ids:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[token].item())
        correct &= logits.argmax().item() == token
        ids.append(token)
    return correct, sum(losses) / len(losses)


def check(scores, expected):
    assert [score.correct for score in scores] == [correct for correct, _ in expected]
    assert [score.loss for score in scores] == pytest.approx([loss for _, loss in expected], abs=1e-5)


@pytest.fixture(scope="module")
def tokenizer():
    """Words w0 to w63, and no special tokens."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


MODELS = {
    "base": tiny_llama,
    "loramoe": loramoe,
    "prompt tuning": lambda: get_peft_model(
        tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
    "prefix tuning": lambda: get_peft_model(
        tiny_llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_scores_are_those_of_each_text_alone(build, tokenizer):
    model = build().eval()
    ids = [(tokenizer(prompt).input_ids, tokenizer(answer).input_ids) for prompt, answer in zip(PROMPTS, ANSWERS)]
    expected = [expected_score(model, *pair) for pair in ids]
    for batch_size in (1, 2, 64):
        check(score_answers(model, tokenizer, PROMPTS, ANSWERS, batch_size), expected)


def test_correct_is_what_greedy_decoding_gives(tokenizer):
    model = tiny_llama().eval()
    model.generation_config.eos_token_id = None
    prompts, answers = [f"w{i} w{i + 1}" for i in range(40)], []
    for i, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)[
            0, ids.shape[1] :
        ]
        answer[2] = (answer[2] + i % 2) % VOCAB  # every second one is wrong in its last token
        answers.append(tokenizer.decode(answer))
    assert [score.correct for score in score_answers(model, tokenizer, prompts, answers)] == [
        i % 2 == 0 for i in range(40)
    ]


# A prompt, an answer, and the prompt's and the answer's parts of the text that is scored.
BOUNDARIES = {
    "a space is added": ("capital? Answer:", "Paris", "capital? Answer:", " Paris"),
    "a space is there": ("capital? Answer: ", "Paris", "capital? Answer:", " Paris"),
    "a new line": ("capital?\n", "Paris", "capital?\n", "Paris"),
    "a marker": ("capital?<|assistant|>", "Paris", "capital?<|assistant|>", "Paris"),
    "spaces around the answer": ("Answer:", " Paris\n", "Answer:", " Paris"),
    "several words": ("Answer:", "São Tomé", "Answer:", " São Tomé"),
    "characters of several bytes": ("Answer:", "東京", "Answer:", " 東京"),
    "no prompt": ("", "Paris", "", "Paris"),
    "a prompt with BOS": ("<s>Answer:", "Paris", "Answer:", " Paris"),
}


@pytest.mark.parametrize("prompt, answer, before, scored", BOUNDARIES.values(), ids=BOUNDARIES)
def test_only_the_answers_tokens_are_scored(prompt, answer, before, scored):
    tokenizer, model = fast(byte_level()), tiny_llama(vocab_size=500).eval()
    before, scored = (tokenizer(part, add_special_tokens=False).input_ids for part in (before, scored))
    check(score_answers(model, tokenizer, [prompt], [answer]), [expected_score(model, [1, *before], scored)])


def test_the_space_counts_where_it_is_part_of_the_first_token():
    tokenizer, model = fast(metaspace()), tiny_llama(vocab_size=200).eval()
    before, both = (tokenizer(text).input_ids for text in ("Answer:", "Answer: Paris"))
    assert both[: len(before)] == before
    check(
        score_answers(model, tokenizer, ["Answer:"], ["Paris"]), [expected_score(model, before, both[len(before) :])]
    )


def test_what_the_tokenizer_puts_after_the_text_is_not_scored():
    model = tiny_llama(vocab_size=500)
    with_end, without = (
        score_answers(model, fast(byte_level(), adds), ["Answer:"], ["Paris"]) for adds in ("<s> $A </s>", "<s> $A")
    )
    assert with_end == without


@pytest.mark.parametrize("prompt, before", [("Answer:", []), ("<s>Answer:", [1])], ids=["no BOS", "BOS in the prompt"])
def test_prompts_may_have_all_their_special_tokens(prompt, before):
    tokenizer, model = fast(byte_level(), adds="<s> $A </s>"), tiny_llama(vocab_size=500).eval()
    prompt_ids, answer_ids = (tokenizer(part, add_special_tokens=False).input_ids for part in ("Answer:", " Paris"))
    scores = score_answers(model, tokenizer, [prompt], ["Paris"], add_special_tokens=False)
    check(scores, [expected_score(model, before + prompt_ids, answer_ids)])


def test_logits_are_computed_only_where_they_are_needed(tokenizer):
    model, shapes = loramoe(), []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape))
    )
    score_answers(model, tokenizer, ["w3 w4 w5 w6", "w7 w8 w9"], ["w20 w21", "w22 w23 w24"])
    assert shapes == [(2, 3, VOCAB)]


def test_the_modes_of_the_modules_are_restored(tokenizer):
    model = loramoe(lora_dropout=0.5).train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    first, second = (score_answers(model, tokenizer, PROMPTS, ANSWERS) for _ in range(2))
    assert first == second and [module.training for module in model.modules()] == modes


def test_no_prompts_have_no_scores(tokenizer):
    assert score_answers(tiny_llama(), tokenizer, [], []) == []


class SlowTokenizer:
    is_fast, get_added_vocab = False, dict


BAD = {
    "numbers differ": ({"prompts": ["w3"]}, "1 prompts and 2 answers"),
    "empty answer": ({"answers": ["w3", " "]}, r"answers\[1\]=' ' is empty; the prompt is 'w5'"),
    "batch of none": ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    "slow tokenizer": ({"tokenizer": SlowTokenizer()}, "SlowTokenizer has no character offsets"),
    "nothing before the answer": ({"prompts": ["w3", ""]}, r"answers\[1\]='w7' is the text's first token"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_input(options, message, tokenizer):
    given = {"tokenizer": tokenizer, "prompts": ["w4", "w5"], "answers": ["w6", "w7"], **options}
    with pytest.raises(ValueError, match=message):
        score_answers(tiny_llama(), **given)


def tiny_t5():
    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


WRAPPERS = {
    "bare": lambda model: model,
    "adapted": lambda model: get_peft_model(model, LoraConfig(target_modules=["q"])),
    "wrapped": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_encoder_decoders_are_refused(wrap, tokenizer):
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder; only causal"):
        score_answers(wrap(tiny_t5()), tokenizer, PROMPTS, ANSWERS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value, tokenizer):
    model = tiny_llama()
    nn.init.constant_(model.get_output_embeddings().weight, value)
    with pytest.raises(
        ValueError, match=r"logits \(torch.float32\) are not finite: training diverged, or the model overflows"
    ):
        score_answers(model, tokenizer, PROMPTS, ANSWERS)


def test_an_answer_without_tokens():
    backend = byte_level()
    backend.normalizer = normalizers.Replace("?", "")
    with pytest.raises(ValueError, match=r"answers\[0\]='\?' has no tokens"):
        score_answers(tiny_llama(), fast(backend), ["Answer:"], ["?"])
