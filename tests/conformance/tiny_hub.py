"""A hub on the disk: tiny randomly initialised models under the ids that PEFT's tests ask for.

PEFT's tests load models such as ``peft-internal-testing/tiny-random-OPTForCausalLM`` from the hub. Here a folder with
the layout of the hub's own cache is filled with models built from configs, and the tests run with ``HF_HUB_OFFLINE=1``
on it, so that transformers, PEFT and huggingface_hub find everything by their ordinary code paths and nothing of them
is patched. The ids are not listed: every ``"owner/name"`` in the test files that names a known architecture gets a
model.

Adapter repositories (``...-lora``) hold LoRAMoE adapters; they are rebuilt in every run, since they depend on the
package.

    python -m conformance.tiny_hub TEST_FILE ...      (HF_HOME must point to the folder to fill)
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path


VOCAB = 300
TOKENIZER_EXTRA = 5  # tokens added in the "extended vocabulary" repositories

# model_type -> (config keyword arguments, default model class)
ARCHITECTURES = {
    "opt": (
        dict(
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=16,
            max_position_embeddings=512,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        ),
        "OPTForCausalLM",
    ),
    "gpt2": (
        dict(n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=98, eos_token_id=98),
        "GPT2LMHeadModel",
    ),
    "gptj": (
        dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=512, bos_token_id=98, eos_token_id=98),
        "GPTJForCausalLM",
    ),
    "gpt_bigcode": (
        dict(n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=98, eos_token_id=98),
        "GPTBigCodeForCausalLM",
    ),
    "gpt_neox": (
        dict(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=2,
        ),
        "GPTNeoXForCausalLM",
    ),
    "bloom": (
        dict(hidden_size=32, n_layer=5, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=3),
        "BloomForCausalLM",
    ),
    "llama": (
        dict(
            hidden_size=16,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=98,
            eos_token_id=99,
        ),
        "LlamaForCausalLM",
    ),
    "mistral": (
        dict(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=98,
            eos_token_id=99,
        ),
        "MistralForCausalLM",
    ),
    "qwen2": (
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        ),
        "Qwen2ForCausalLM",
    ),
    "qwen3": (
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
        ),
        "Qwen3ForCausalLM",
    ),
    "gemma3_text": (
        dict(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
        ),
        "Gemma3ForCausalLM",
    ),
    "bart": (
        dict(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        ),
        "BartForConditionalGeneration",
    ),
    "t5": (
        dict(d_model=32, d_kv=8, d_ff=37, num_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0),
        "T5ForConditionalGeneration",
    ),
    "whisper": (
        dict(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            num_mel_bins=8,
            max_source_positions=30,
            max_target_positions=32,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
            decoder_start_token_id=3,
            begin_suppress_tokens=None,
            suppress_tokens=None,
        ),
        "WhisperForConditionalGeneration",
    ),
    "bert": (
        dict(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        "BertModel",
    ),
    "roberta": (
        dict(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
        "RobertaModel",
    ),
    "deberta": (
        dict(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            type_vocab_size=0,
        ),
        "DebertaModel",
    ),
    "deberta-v2": (
        dict(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            type_vocab_size=0,
        ),
        "DebertaV2Model",
    ),
    "clip_text_model": (
        dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, projection_dim=32),
        "CLIPTextModel",
    ),
    "resnet": (
        dict(embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], num_labels=3),
        "ResNetForImageClassification",
    ),
    "falcon_mamba": (
        dict(hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=32, time_step_rank=4),
        "FalconMambaForCausalLM",
    ),
    "nemotron_h": (
        dict(
            hidden_size=32,
            intermediate_size=32,
            layers_block_type=["mamba", "attention", "mlp"],
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=1,
            ssm_state_size=4,
        ),
        "NemotronHForCausalLM",
    ),
    "llava": (None, "LlavaForConditionalGeneration"),
}

# (pattern on the lower-case id, model_type); the first match counts, so the more special names come first
ID_RULES = [
    (r"falcon-mamba", "falcon_mamba"),
    (r"nemotronh", "nemotron_h"),
    (r"gptneox", "gpt_neox"),
    (r"gptbigcode|bigcode", "gpt_bigcode"),
    (r"gptj", "gptj"),
    (r"gpt2", "gpt2"),
    (r"whisper", "whisper"),
    (r"llava", "llava"),
    (r"deberta-?v2", "deberta-v2"),
    (r"deberta", "deberta"),
    (r"roberta", "roberta"),
    (r"bert", "bert"),
    (r"bart", "bart"),
    (r"bloom", "bloom"),
    (r"mistral", "mistral"),
    (r"qwen2(?!_5|\.5|-?vl|.*moe)", "qwen2"),
    (r"qwen3(?!.*moe)", "qwen3"),
    (r"gemma3", "gemma3_text"),
    (r"clip-text", "clip_text_model"),
    (r"resnet", "resnet"),
    (r"llama(?!4)", "llama"),
    (r"(^|[^a-z])opt", "opt"),
    (r"t5", "t5"),
]

# repositories that need something else than the plain tiny model of their architecture
SPECIAL_CONFIG = {
    # the tests need more than MIN_TARGET_MODULES_FOR_OPTIMIZATION targeted modules, and 12 layers like the original
    "opt-125m": dict(num_hidden_layers=12),
    "tiny-random-OPTForCausalLM": dict(num_hidden_layers=5),
    "tiny-LlamaForSequenceClassification-3.2": dict(num_labels=1),
}
SPECIAL_CLASS = {"tiny-random-BertModel": "BertForPreTraining"}  # with the head, which must not be random at each load
REVISIONS = {"tiny-random-BertModel": ["v2.0.0"]}

# adapter repositories: (pattern on the id, task type, base model id, auto class); base None: the same architecture's
# tiny model
ADAPTERS = [
    (r"opt-lora-revision", "CAUSAL_LM", "peft-internal-testing/tiny-random-OPTForCausalLM", "AutoModelForCausalLM"),
    (
        r"test-st-lora|test-lora-subfolder",
        "CAUSAL_LM",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "AutoModelForCausalLM",
    ),
    (r"OPTForCausalLM-lora", "CAUSAL_LM", "peft-internal-testing/tiny-random-OPTForCausalLM", "AutoModelForCausalLM"),
    (
        r"OPTForCausalLM-extended-vocab|opt-tokenizer-revision",
        "CAUSAL_LM",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "AutoModelForCausalLM",
    ),
    (r"gpt2-lora", "CAUSAL_LM", "peft-internal-testing/tiny-random-GPT2LMHeadModel", "AutoModelForCausalLM"),
    (
        r"T5ForSeq2SeqLM-lora",
        "SEQ_2_SEQ_LM",
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
    ),
    (
        r"OPTForSequenceClassification-lora",
        "SEQ_CLS",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "AutoModelForSequenceClassification",
    ),
    (
        r"GPT2ForTokenClassification-lora",
        "TOKEN_CLS",
        "peft-internal-testing/tiny-random-GPT2LMHeadModel",
        "AutoModelForTokenClassification",
    ),
    (
        r"OPTForQuestionAnswering-lora",
        "QUESTION_ANS",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "AutoModelForQuestionAnswering",
    ),
    (
        r"OPTForFeatureExtraction-lora",
        "FEATURE_EXTRACTION",
        "peft-internal-testing/tiny-random-OPTForCausalLM",
        "AutoModel",
    ),
    (
        r"WhisperForConditionalGeneration-lora",
        None,
        "peft-internal-testing/tiny-random-WhisperForConditionalGeneration",
        "WhisperForConditionalGeneration",
    ),
    (r"BertModel-lora", "CAUSAL_LM", "hf-internal-testing/tiny-random-BertModel", "AutoModelForCausalLM"),
]
ADAPTER_REVISIONS = {
    "tiny-opt-lora-revision": ["test"],
    "tiny-random-BertModel-lora": ["v1.2.3"],
    "opt-tokenizer-revision": ["my-revision"],
}
ADAPTER_SUBFOLDER = {"test-lora-subfolder": "test"}

ID = re.compile(r"""["']([A-Za-z0-9][\w.-]*/[\w.-]+|gpt2|bert-base-(?:un)?cased)["']""")


def ids_in(test_files):
    """All hub ids that the test files name and for which a model or an adapter is known."""
    found = set()
    for path in test_files:
        found.update(ID.findall(Path(path).read_text(encoding="utf-8")))
    adapters = {i for i in found if adapter_rule(i)}
    models = {i for i in found - adapters if model_type_of(i)}
    models.update(rule[2] for rule in map(adapter_rule, adapters) if rule)
    return sorted(models), sorted(adapters)


def adapter_rule(repo_id):
    return next((rule for rule in ADAPTERS if re.search(rule[0], repo_id)), None)


def model_type_of(repo_id):
    name = repo_id.lower()
    return next((model_type for pattern, model_type in ID_RULES if re.search(pattern, name)), None)


def repo_folder(hub, repo_id):
    return Path(hub) / ("models--" + repo_id.replace("/", "--"))


def publish(hub, repo_id, source, revisions=("main",)):
    """Puts the files of ``source`` into the hub cache as the given revisions of ``repo_id``."""
    folder = repo_folder(hub, repo_id)
    for revision in revisions:
        commit = hashlib.sha1(f"{repo_id}@{revision}".encode()).hexdigest()
        target = folder / "snapshots" / commit
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        ref = folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


def make_tokenizer(extra=0):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate(specials + alphabet)}
    for i in range(VOCAB - len(vocab) + extra):
        vocab[f"<extra_{i}>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
    )


def make_config(repo_id):
    import transformers

    model_type = model_type_of(repo_id)
    kwargs, _ = ARCHITECTURES[model_type]
    if model_type == "llava":
        text = transformers.LlamaConfig(vocab_size=VOCAB, **ARCHITECTURES["llama"][0])
        vision = transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=30,
            patch_size=15,
            projection_dim=16,
        )
        return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=10)
    kwargs = dict(kwargs)
    if model_type != "resnet":
        kwargs["vocab_size"] = VOCAB
        kwargs.setdefault("pad_token_id", 0)
    for name, special in SPECIAL_CONFIG.items():
        if repo_id.endswith(name):
            kwargs.update(special)
    return transformers.CONFIG_MAPPING[model_type](**kwargs)


def make_model(repo_id, seed=0):
    import torch
    import transformers

    config = make_config(repo_id)
    special = SPECIAL_CLASS.get(repo_id.split("/")[-1])
    named = re.search(r"[A-Z]\w*?(?:For[A-Z]\w+|LMHeadModel|Model)(?=$|-)", repo_id.split("/")[-1])
    cls = getattr(transformers, special or (named.group(0) if named else ""), None)
    if cls is None:
        cls = getattr(transformers, ARCHITECTURES[model_type_of(repo_id)][1])
    torch.manual_seed(seed)
    return cls(config).eval()


def build_model(hub, repo_id):
    for number, revision in enumerate(["main"] + REVISIONS.get(repo_id.split("/")[-1], [])):
        with tempfile.TemporaryDirectory() as folder:
            make_model(repo_id, seed=number).save_pretrained(folder)
            if model_type_of(repo_id) != "resnet":
                make_tokenizer().save_pretrained(folder)
            publish(hub, repo_id, folder, [revision])


def build_adapter(hub, repo_id):
    import torch
    import transformers
    from peft import get_peft_model

    from peft_loramoe import LoRAMoEConfig

    _, task_type, base_id, auto_class = adapter_rule(repo_id)
    name = repo_id.split("/")[-1]
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_pretrained(base_id)
    extended = "extended-vocab" in name or "tokenizer-revision" in name
    if extended:
        model.resize_token_embeddings(VOCAB + TOKENIZER_EXTRA)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / ADAPTER_SUBFOLDER.get(name, "")
        model = get_peft_model(model, LoRAMoEConfig(task_type=task_type, r=2, num_experts=4, init_weights=False))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(where, save_embedding_layers=extended)
        if extended:
            make_tokenizer(TOKENIZER_EXTRA).save_pretrained(where)
            model.config.save_pretrained(where)  # AutoTokenizer wants to see one
        publish(hub, repo_id, folder, ["main"] + ADAPTER_REVISIONS.get(name, []))


def prepare(test_files, hub):
    """Fills the hub; returns {id: error} of what could not be built (its tests will then fail to load it)."""
    models, adapters = ids_in(test_files)
    stamp = hashlib.sha1(Path(__file__).read_bytes()).hexdigest()
    problems = {}
    for repo_id in models:
        done = repo_folder(hub, repo_id) / "built"
        if done.exists() and done.read_text() == stamp:
            continue
        shutil.rmtree(repo_folder(hub, repo_id), ignore_errors=True)
        try:
            build_model(hub, repo_id)
            done.write_text(stamp)
        except Exception as error:
            problems[repo_id] = f"{type(error).__name__}: {error}"
    for repo_id in adapters:
        shutil.rmtree(repo_folder(hub, repo_id), ignore_errors=True)
        try:
            build_adapter(hub, repo_id)
        except Exception as error:
            problems[repo_id] = f"{type(error).__name__}: {error}"
    return {"models": models, "adapters": adapters, "problems": problems}


if __name__ == "__main__":
    result = prepare(sys.argv[1:], Path(os.environ["HF_HOME"]) / "hub")
    print(json.dumps(result))
