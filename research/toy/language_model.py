"""The toy language models: their tokenizer, the untrained model, and its pretraining."""

import random
from collections.abc import Callable, Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


# The way the model is asked and answers, in pretraining and in fine-tuning.
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message.role == "user" %}Question: {{ message.content }} Answer:{% else %} \
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
PACKED_TOKENS = 64


def train_tokenizer(texts: list[str], vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """A BPE tokenizer for which a word has the same tokens wherever it stands, and digits are words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # Words are marked by a character of their own: the ids of an end_of_word_suffix would differ from run to run.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    special_tokens = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(tokenizer: PreTrainedTokenizerFast, **sizes: int) -> PreTrainedModel:
    """An untrained Llama, or Qwen3-MoE if `num_experts` is among the sizes.

    The sides of the linears, if not given, are multiples of 64, the block size of NF4.
    """
    sparse = "num_experts" in sizes
    config_class, model_class = (Qwen3MoeConfig, Qwen3MoeForCausalLM) if sparse else (LlamaConfig, LlamaForCausalLM)
    config = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "initializer_range": 0.08,  # with the usual 0.02 a model this narrow needs twice the steps
        **sizes,
    }
    return model_class(
        config_class(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **config,
        )
    )


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    skill_text: Callable[[random.Random], str],
    steps: int,
    generator: random.Random,
    *,
    learning_rate: float = 2e-3,
    rows: int = 32,
    skills_per_text: float = 0.25,
    progress: bool = True,
) -> None:
    """Train on batches of `rows` packed rows: all texts in a new order each time, mixed with texts of skills.

    On a GPU the model computes in bfloat16, with float32 weights.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    batches = _packed_batches(texts, skill_text, tokenizer, generator, rows, skills_per_text)
    bar = tqdm(zip(range(steps), batches), total=steps, desc="pretraining the toy model", disable=not progress)
    for _, batch in bar:
        input_ids, position_ids = (tensor.to(model.device) for tensor in batch)
        labels = input_ids.masked_fill((position_ids == 0) | (input_ids == tokenizer.pad_token_id), -100)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            # Without a cache and a mask, transformers keeps packed texts apart by their positions.
            loss = model(input_ids=input_ids, position_ids=position_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if progress:
            bar.set_postfix(loss=f"{loss.item():.2f}")


def _packed_batches(
    texts: list[str],
    skill_text: Callable[[random.Random], str],
    tokenizer: PreTrainedTokenizerFast,
    generator: random.Random,
    rows: int,
    skills_per_text: float,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and positions, each (rows, PACKED_TOKENS)."""

    def encode(text: str) -> list[int]:
        return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]

    encoded = [encode(text) for text in texts]
    batch, ids, positions = [], [], []
    while True:
        epoch = encoded + [encode(skill_text(generator)) for _ in range(round(skills_per_text * len(encoded)))]
        generator.shuffle(epoch)
        for text in epoch:
            if len(ids) + len(text) > PACKED_TOKENS:
                padding = PACKED_TOKENS - len(ids)
                batch.append((ids + [tokenizer.pad_token_id] * padding, positions + list(range(padding))))
                ids, positions = [], []
                if len(batch) == rows:
                    rows_of_ids, rows_of_positions = zip(*batch)
                    yield torch.tensor(rows_of_ids), torch.tensor(rows_of_positions)
                    batch = []
            ids = ids + text
            positions = positions + list(range(len(text)))
