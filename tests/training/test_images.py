"""Trainers on images and texts that a processor turns into batches: TRL's vision collator and one of a user."""

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_loramoe import balance_loss, collect_balance, layer_routing
from peft_loramoe.training import LoRAMoETrainerMixin, TaskTypeCollator, sample_anchors
from tiny import loramoe


WORDS = ["<pad>", "</s>", "<s>", *(f"w{i}" for i in range(3, 40))]
TILES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *TILES]
IMAGE = len(WORDS)
TEXT = dict(model_type="llama", vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)  # fmt: skip
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16)
CONFIGS = {
    "llava": dict(
        text_config=TEXT, vision_config={"model_type": "clip_vision_model", "patch_size": 8, **VISION},
        image_token_index=IMAGE,
    ),
    "idefics3": dict(
        text_config=TEXT, vision_config={"patch_size": 4, **VISION}, image_token_id=IMAGE, scale_factor=2,
        pad_token_id=0,
    ),
}  # fmt: skip
CHAT = """{% for message in messages %}{% if message['role'] == 'user' %}w3 {% endif %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> \
{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}\
{% if add_generation_prompt %}w4 {% endif %}"""
TYPES, IMAGES = [0, 1, 1, -1], [2, 0, 1, 3]
PROMPTS, ANSWERS = ["w5 w6", "w7", "w8 w9 w10", "w11"], ["w20", "w21 w22", "w23", "w24 w25 w26"]
ANCHORS = ["w30 w31 w32", "w33 w34"]
OPTIONS = dict(per_device_train_batch_size=4, max_steps=1, optim="sgd", max_grad_norm=0.0, report_to="none",
               use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True)  # fmt: skip


def processor_of(name):
    """LLaVA's processor makes 4 tokens of an image; Idefics3's cuts it into four tiles and a small copy of 4 each."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS + SPECIAL)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>", additional_special_tokens=SPECIAL,
        padding_side="left", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    if name == "llava":
        images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        return LlavaProcessor(
            images, tokenizer, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
            num_additional_image_tokens=1, chat_template=CHAT,
        )  # fmt: skip
    images = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT)


def model_of(name, **options):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[name](**CONFIGS[name]))
    return loramoe(model, num_experts=4, router_lr_multiplier=1.0, balance_loss_weight=0.5, **options)


def pictures(number, seed):
    pixels = torch.randint(0, 256, (number, 20, 30, 3), generator=torch.Generator().manual_seed(seed))
    return [Image.fromarray(array) for array in pixels.to(torch.uint8).numpy()]


def conversations(typed=True):
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": answer}],
            "images": pictures(number, seed),
        }
        for seed, (prompt, answer, number) in enumerate(zip(PROMPTS, ANSWERS, IMAGES))
    ]
    return Dataset.from_list([{**row, "task_type": kind} if typed else row for row, kind in zip(rows, TYPES)])


class Gradients(TrainerCallback):
    """Keeps the gradient of the step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.of = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(trainer_class, name, data, folder, model=None, **options):
    """A trainer after one step, and the gradient of the step."""
    with_term = type(f"LoRAMoE{trainer_class.__name__}", (LoRAMoETrainerMixin, trainer_class), {})
    gradients = Gradients()
    trainer = with_term(
        model=model_of(name) if model is None else model,
        train_dataset=data,
        processing_class=processor_of(name),
        callbacks=[gradients],
        **options,
    )
    trainer.train()
    return trainer, gradients.of


def expected(model, batch, types, anchors=None):
    """The gradient of the model's loss, the balance term and the anchors' loss."""
    with collect_balance(model):
        loss = model.train()(**batch, task_types=types).loss
        if anchors is not None:
            labels = anchors["input_ids"].masked_fill(anchors["attention_mask"] == 0, -100)
            loss = loss + 0.4 * model(**anchors, labels=labels, task_types=[0, 0]).loss
    (loss + balance_loss(model)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def placeholders(batch):
    return (batch["input_ids"] == IMAGE).sum(1).tolist()


@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["defaults", "all linears"])
@pytest.mark.parametrize("name", CONFIGS)
def test_trls_sft_trainer(name, targets, tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(str(tmp_path), max_length=None, **OPTIONS)
    model = model_of(name, target_modules=targets)
    trainer, found = trained(trl.SFTTrainer, name, conversations(), tmp_path, model, args=args)
    batch = trainer.data_collator([dict(row) for row in conversations(typed=False)])
    assert placeholders(batch) == [number * (4 if name == "llava" else 20) for number in IMAGES]
    torch.testing.assert_close(found, expected(model_of(name, target_modules=targets), batch, TYPES))
    records = layer_routing(trainer.model)
    assert all(sorted(record.task_types.tolist()) == sorted(TYPES) for record in records)
    assert {"vision" in record.layer for record in records} == {False}


@pytest.mark.parametrize("name", CONFIGS)
def test_anchors_beside_images(name, tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(str(tmp_path), max_length=None, **OPTIONS)
    data, anchors = conversations(typed=False), {"anchors": ANCHORS, "anchors_per_batch": 2}
    anchors |= {"anchor_loss_weight": 0.4, "anchor_kl_weight": 0.0}
    trainer, found = trained(trl.SFTTrainer, name, data, tmp_path, args=args, **anchors)
    batch = trainer.data_collator([dict(row) for row in data])
    anchors = processor_of(name).tokenizer(ANCHORS, padding=True, padding_side="right", return_tensors="pt")
    torch.testing.assert_close(found, expected(model_of(name), batch, [1, 1, 1, 1], anchors))


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_trainer_with_a_collator_that_calls_the_processor(name, tmp_path):
    processor = processor_of(name)

    def collate(examples):
        texts = [example["text"] for example in examples]
        images = [example["images"] for example in examples]
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(
            (batch["attention_mask"] == 0) | (batch["input_ids"] >= IMAGE), -100
        )
        return batch

    rows = [
        {"text": f"{' <image>' * number} {prompt} {answer} </s>", "images": pictures(number, seed), "task_type": kind}
        for seed, (number, prompt, answer, kind) in enumerate(zip(IMAGES, PROMPTS, ANSWERS, TYPES))
    ]
    args = TrainingArguments(str(tmp_path), remove_unused_columns=False, **OPTIONS)
    _, found = trained(Trainer, name, Dataset.from_list(rows), tmp_path, args=args, data_collator=collate)
    torch.testing.assert_close(found, expected(model_of(name), collate(rows), TYPES))


@pytest.mark.parametrize("name", CONFIGS)
def test_generating_from_a_processors_batch(name):
    model, processor = model_of(name).eval(), processor_of(name)
    messages = [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": i} for i in pictures(n, s)), {"type": "text", "text": t}],
            }
        ]
        for s, (n, t) in enumerate(zip(IMAGES, PROMPTS))
    ]

    def generate(messages):
        batch = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, padding=True
        )
        texts = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        return texts[:, batch["input_ids"].shape[1] :]

    together = generate(messages)
    assert together.shape == (4, 4)
    assert torch.equal(together, torch.cat([generate([message]) for message in messages]))


PREFERENCES = [
    {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": answer}],
        "rejected": [{"role": "assistant", "content": "w39 w38"}],
        "images": pictures(max(number, 1), seed),
        "task_type": kind,
    }
    for seed, (prompt, answer, number, kind) in enumerate(zip(PROMPTS, ANSWERS, IMAGES, TYPES))
]
OF_WORD = {int(prompt.split()[0][1:]): kind for prompt, kind in zip(PROMPTS, TYPES)}


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
@pytest.mark.parametrize("name", CONFIGS)
def test_preferences_and_rewards_with_images(name, kind, tmp_path):
    trl = pytest.importorskip("trl")
    if kind == "GRPO" and Version(trl.__version__) < Version("1.16"):
        pytest.skip("before 1.16, TRL's GRPO fails on these models without an adapter, too")
    if kind == "DPO":
        args = trl.DPOConfig(str(tmp_path), max_length=None, **OPTIONS)
        data, options = PREFERENCES, {}
    else:
        args = trl.GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=4, **OPTIONS)
        data = [{key: row[key] for key in ("prompt", "images", "task_type")} for row in PREFERENCES]
        options = {"reward_funcs": lambda completions, **_: [float(i % 2) for i in range(len(completions))]}
    model, calls = model_of(name), []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"]) if module.training else None, with_kwargs=True
    )
    trainer, found = trained(
        getattr(trl, f"{kind}Trainer"), name, Dataset.from_list(data), tmp_path, model, args=args, **options
    )
    words = [next(i for i in row.tolist() if i in OF_WORD) for row in calls[-1]]
    for record in layer_routing(trainer.model):
        assert record.task_types.tolist() == [OF_WORD[word] for word in words]
    assert all(gradient.any() for gradient in found.values())


def test_evaluation_has_no_term(tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(str(tmp_path), max_length=None, **OPTIONS)
    data = conversations()
    trainer, _ = trained(trl.SFTTrainer, "llava", data, tmp_path, args=args, eval_dataset=data)
    batch = trainer.data_collator([dict(row) for row in conversations(typed=False)])
    with torch.no_grad():
        loss = trainer.model.eval()(**batch).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_several_types_in_an_example_with_images():
    collator = TaskTypeCollator(
        lambda examples: {"input_ids": torch.ones(4, 9)}, model_of("llava").peft_config["default"]
    )
    with pytest.raises(
        ValueError, match="columns prompt, completion, images, task_type.*Give every example one task_type"
    ):
        collator([{**row, "task_type": [0, 1]} for row in conversations()])


@pytest.mark.parametrize("chat", [0.0, None], ids=["prose", "chats too"])
def test_anchors_sampled_with_a_processor(chat):
    model, processor = model_of("llava").eval(), processor_of("llava")
    anchors = sample_anchors(model, processor, 4, max_tokens=8, chat=chat, prefixes=("w5",), progress=False)
    assert [anchor["kind"] for anchor in anchors].count("chat") == (0 if chat == 0 else 2)
    assert all(" w4 " in anchor["text"] for anchor in anchors if anchor["kind"] == "chat")  # the opening of the answer
