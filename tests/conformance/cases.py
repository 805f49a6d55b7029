"""What is put into PEFT's tests: the LoRAMoE cases for their tables, and the tables of what is translated, dropped and
skipped.

Nothing here depends on line numbers. A table, test or pattern that the installed PEFT version does not have is simply
not used.
"""

import transformers

from peft_loramoe import LoRAMoEConfig


# ---
# Which of PEFT's test files are run. A file that a version does not have is left out.

FILES = [
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_seq_classifier.py",
    "test_feature_extraction_models.py",
    "test_token_classification_qa.py",
    "test_config.py",
    "test_tuners_utils.py",
    "test_low_level_api.py",
    "test_mapping.py",
    "test_other.py",
    "test_auto.py",
    "test_vision_models.py",
    "test_trainable_tokens.py",
    "test_initialization.py",
    "test_helpers.py",
    "test_hub_features.py",
    "test_lora_conversion.py",
]

# A file that exists must have at least one passed test, and all together at least this many: a harness that selects
# nothing must not look green.
MINIMUM_PASSED = 2200
ONLY_REFUSALS = {"test_lora_conversion.py"}

# ---
# The cases. Between them: plain defaults, rsLoRA, rank / alpha / expert patterns, other numbers of experts, three
# groups, null groups, top-k, Conv1D, modules_to_save, trainable tokens, dropout, router and balance options, the
# paper's recipe. Bias is no case of its own, since PEFT allows one adapter only to train it: the tests that set it do
# so on all of these.

PAPER = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "num_experts": 6, "expert_groups": [3, 3]}

_CUSTOM = [
    ("plain", "MLP", {"target_modules": ["lin0"]}),
    ("regex target", "MLP", {"target_modules": "lin0"}),
    ("two targets, the paper's recipe", "MLP", {"target_modules": ["lin0", "lin1"], **PAPER}),
    ("rslora, r 4, four experts", "MLP", {"target_modules": ["lin0"], "use_rslora": True, "r": 4, "num_experts": 4}),
    (
        "rank, alpha and expert patterns",
        "MLP",
        {
            "target_modules": ["lin0", "lin1"],
            "rank_pattern": {"lin0": 3},
            "alpha_pattern": {"lin0": 5},
            "num_experts_pattern": {"lin1": 4},
        },
    ),
    (
        "three groups",
        "MLP",
        {"target_modules": ["lin0"], "expert_groups": [2, 2, 2], "task_type_names": ["a", "b", "c"]},
    ),
    ("null group", "MLP", {"target_modules": ["lin0"], "expert_groups": [3, 3], "null_groups": [0]}),
    ("top-k", "MLP", {"target_modules": ["lin0"], "top_k": 2}),
    ("top-k with a null group", "MLP2", {"target_modules": ["lin0"], "top_k": 4, "null_groups": [1]}),
    ("modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("dropout", "MLP", {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    (
        "router normal, hot",
        "MLP_LayerNorm",
        {"target_modules": ["lin0"], "router_init": "normal", "router_temperature": 2.0},
    ),
    (
        "printed balance formula",
        "MLP2",
        {
            "target_modules": ["lin0", "lin1"],
            "balance_formula": "variance_to_mean",
            "balance_target": "paper",
            "balance_importance": "sum",
        },
    ),
    ("detached balance", "MLP", {"target_modules": ["lin0"], "balance_detach": True, "balance_loss_weight": 1.0}),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv1D and linear", "EmbConv1D", {"target_modules": ["conv1d", "lin0"], "use_rslora": True}),
    ("trainable tokens", "EmbConv1D", {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}}),
    ("linear beside a convolution", "Conv2d2", {"target_modules": ["lin0"]}),
    ("linear after an attention block", "MHA", {"target_modules": ["lin0"]}),
]
CUSTOM = [(f"LoRAMoE {name}", model_id, LoRAMoEConfig, kwargs) for name, model_id, kwargs in _CUSTOM]

MULTIPLE_ACTIVE = [
    (f"LoRAMoE {name}", method, LoRAMoEConfig, {**first, "init_weights": False}, {**second, "init_weights": False})
    for name, method, first, second in [
        ("same", "loramoe", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
        ("different", "loramoe", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
        (
            "overlapping, other ranks",
            "loramoe",
            {"target_modules": ["lin0"], "r": 4},
            {"target_modules": ["lin0", "lin1"], "r": 16, "num_experts": 3, "expert_groups": [1, 2]},
        ),
        (
            "plain and null group",
            "loramoe",
            {"target_modules": ["lin0"]},
            {"target_modules": ["lin0"], "expert_groups": [2, 2, 2], "null_groups": [1]},
        ),
        ("plain and top-k", "loramoe", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "top_k": 1}),
        (
            "trainable tokens",
            "lora+trainable_tokens",
            {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}},
            {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}},
        ),
    ]
]

MIXED_BATCH = [
    (
        "LoRAMoE",
        LoRAMoEConfig(target_modules=["lin0"], init_weights=False),
        LoRAMoEConfig(target_modules=["lin0"], r=16, init_weights=False),
    ),
    (
        "LoRAMoE, other numbers of experts",
        LoRAMoEConfig(target_modules=["lin0"], init_weights=False, **PAPER),
        LoRAMoEConfig(target_modules=["lin0"], num_experts=3, expert_groups=[1, 2], top_k=1, init_weights=False),
    ),
]


def _models(task_type, *extra):
    """The cases of the suites on transformers models (each runs on every model of the suite)."""
    return [
        (LoRAMoEConfig, {"task_type": task_type, **kwargs})
        for kwargs in (
            {"target_modules": None},  # the architecture's feed-forward linears
            {"target_modules": None, **PAPER},
            {"target_modules": "all-linear", "r": 4, "use_rslora": True, "num_experts": 4, "top_k": 2},
            {
                "target_modules": None,
                "num_experts": 6,
                "expert_groups": [2, 2, 2],
                "null_groups": [0],
                "rank_pattern": {".*": 4},
                "balance_importance": "sum",
            },
            *extra,
        )
    ]


def _without_all_linear(kwargs, targets):
    return {**kwargs, "target_modules": targets} if kwargs["target_modules"] == "all-linear" else kwargs


TRAINABLE_TOKENS = {
    "target_modules": None,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "trainable_token_indices": [0, 1, 3],
}

DECODERS = _models("CAUSAL_LM", TRAINABLE_TOKENS)
ENCODER_DECODERS = _models("SEQ_2_SEQ_LM", TRAINABLE_TOKENS)
SEQ_CLS = _models("SEQ_CLS")
# (nor does "all-linear" fit here: the tests' loss does not depend on the pooler)
_ENCODER = ["query", "value", "in_proj", "query_proj", "intermediate.dense"]
FEATURES = [
    (cls, _without_all_linear(kwargs, _ENCODER)) for cls, kwargs in _models("FEATURE_EXTRACTION", TRAINABLE_TOKENS)
]
# (PEFT keeps "all-linear" off the head for SEQ_CLS only; with these two it then refuses to train the head)
_NO_HEAD = ["query", "value", "intermediate.dense"]
TOKEN_CLS = [(cls, _without_all_linear(kwargs, _NO_HEAD)) for cls, kwargs in _models("TOKEN_CLS")]
QUESTION_ANS = [(cls, _without_all_linear(kwargs, _NO_HEAD)) for cls, kwargs in _models("QUESTION_ANS")]

CONFIGS = (
    (LoRAMoEConfig, {}),
    (LoRAMoEConfig, PAPER),
    (
        LoRAMoEConfig,
        {
            "expert_groups": [2, 2, 2],
            "null_groups": [1],
            "task_type_names": ["x", "y", "z"],
            "top_k": 3,
            "rank_pattern": {"foo": 4},
            "num_experts_pattern": {"bar": 6},
            "bias": "all",
            "modules_to_save": ["head"],
            "router_temperature": 0.5,
        },
    ),
)

# {file: {name of the module's table: its content here}}; a list, tuple or dict of the module is replaced in place
TABLES = {
    "test_custom_models": {
        "TEST_CASES": CUSTOM,
        "ALL_PEFT_CONFIG_CLASSES": [LoRAMoEConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": MULTIPLE_ACTIVE,
        "MIXED_ADAPTER_TEST_CASES": MIXED_BATCH,
    },
    "test_decoder_models": {"ALL_CONFIGS": DECODERS},
    "test_encoder_decoder_models": {"ALL_CONFIGS": ENCODER_DECODERS},
    "test_seq_classifier": {"ALL_CONFIGS": SEQ_CLS},
    "test_feature_extraction_models": {"ALL_CONFIGS": FEATURES},
    "test_token_classification_qa": {"TOKEN_CLS_CONFIGS": TOKEN_CLS, "QA_CONFIGS": QUESTION_ANS},
    "test_config": {"ALL_CONFIG_CLASSES": CONFIGS, "LAYER_INDEXING_CONFIG_CLASSES": CONFIGS[:1]},
    "test_vision_models": {
        # the model has one linear layer; the test is about the buffers of the BatchNorm modules that are trained
        # beside it
        "CONFIGS": {"loramoe": LoRAMoEConfig(target_modules=["classifier.1"], modules_to_save=["normalization"])},
    },
}

# Options added to the cases of some tests: (test name pattern, condition on the test's parameters, options, why)
CASE_OPTIONS = [
    (
        r"layer_indexing",
        lambda params: params["config_kwargs"].get("target_modules") == "all-linear",
        {"target_modules": None},
        "layers_to_transform is for lists of targets (LoRA refuses it with a string too)",
    ),
    (
        r"test_only_params_are_updated|test_disable_adapters",
        lambda params: params["model_id"] != "MLP_LayerNorm",
        {"router_temperature": 50.0},
        "the test's inputs are the numbers to 89, which saturate the router's softmax: gradients underflow",
    ),
]

# ---
# LoRA's tests on LoRAMoE. In the test modules the names LoraConfig, LoraLayer and LoraModel stand for LoRAMoE's
# classes (see plugin.py). Where a test also names LoRA's tensors or counts them, its text is translated when the files
# are copied out of the source distribution: (file pattern, regular expression, replacement).

TRANSLATIONS = [
    # tensors: lora_A / lora_B are the container loramoe_experts with the parameters A, B and router
    (r".*", r"\.lora_A\[([^\]]+)\]\.weight\.shape\[0\]", r".loramoe_experts[\1].r"),
    (r".*", r"(?<=\w)\.(r|scaling)\[(adapter|[\"'][\w-]+[\"'])\]", r".loramoe_experts[\2].\1"),
    (r".*", r"""\.lora_([AB])\[([^\]]+)\]\.weight""", r".loramoe_experts[\2].\1"),
    (
        r".*",
        r"""(?<=\s)(["'])([^"'\s]*)\blora_B\.([\w-]+)\.weight\1(?=\s*[,\]])""",
        r"\1\2loramoe_experts.\3.B\1, \1\2loramoe_experts.\3.router\1",
    ),
    (
        r".*",
        r"""del (\w+)\[(["'])([^"']*)\blora_B\.weight\2\]""",
        r"del \1[\2\3loramoe_experts.B\2], \1[\2\3loramoe_experts.router\2]",
    ),
    (r".*", r"\blora_([AB])\.([\w-]+)\.weight\b", r"loramoe_experts.\2.\1"),
    (r".*", r"\blora_([AB])\.weight\b", r"loramoe_experts.\1"),
    (r".*", r"""(["'](?:[\w.]*\.)?)lora_[AB]((?:\.\w+)?["'])""", r"\1loramoe_experts\2"),
    # what LoRA's classes and types are called
    (r".*", r"""(["'])LoraModel\1""", r"\1LoRAMoEModel\1"),
    (r".*", r"""(["'])lora\.Linear\1""", r"\1loramoe.LoRAMoELinear\1"),
    (r"test_tuners_utils.*", r"""(["'])lora\.(?:Embedding|Conv2d)\1""", r"\1loramoe.LoRAMoELinear\1"),
    (r"test_tuners_utils.*|test_helpers.*|test_hub_features.*", r"""(["'])LORA\1""", r"\1LORAMOE\1"),
    (r"test_hub_features.*", r"""(["'])lora\1(?=\s*,?\s*\])""", r"\1loramoe\1"),
    (r".*", r"""(["'])lora_only\1""", r"\1loramoe_only\1"),
    # a module of the base model whose name contains the tuner's prefix
    (r"test_tuners_utils.*|test_low_level_api.*", r"\blora_foobar\b", "loramoe_foobar"),
    # the number of a layer's parameters: 6 experts of rank 8 on 10 -> 10, and the router
    (r"test_tuners_utils.*", r"\b2 \* 80\b", "(6 * 2 * 80 + 6 * 10)"),
    (r"test_tuners_utils.*", r"(?<=trainable_params == )160\b", "1020"),
    (r"test_tuners_utils.*", r"(?<=total_params == )380\b", "1240"),
    (r"test_tuners_utils.*", r"(?<=trainable_params == )616\b", "3060"),
    (r"test_tuners_utils.*", r"(?<=total_params == )2236\b", "7680"),
    # adapter tensors of which some require gradients
    (
        r"test_tuners_utils.*",
        r"(\S+)\.lora_embedding_A\[\"default\"\] = lora_embedding_A",
        r'\1.loramoe_experts["default"].A.requires_grad = False',
    ),
    (r"test_tuners_utils.*", r"\S+\.lora_embedding_B\[\"default\"\] = lora_embedding_B", "pass"),
    (r"test_initialization.*", r"(= model\.model\[0\]\.linear)\.scaling\b", r'\1.loramoe_experts["default"].scaling'),
    (r".*", r"""(["'])lora_\1""", r"\1loramoe_\1"),
    (r".*", r"peft\.tuners\.lora\.layer\.Linear", "peft_loramoe.layer.LoRAMoELinear"),
    (r"test_initialization.*", r"is incompatible with Mamba-based models", "is incompatible with Mamba"),
    (r".*", r"(?<=config_kwargs\[.)init_lora_weights(?=.\] =)", "init_weights"),
    # a layer's parts
    (r".*", r"""isinstance\((\w+)\.lora_[AB]\[(["'])(\w+)\2\], nn\.Linear\)""", r"\2\3\2 in \1.loramoe_experts"),
    # the width of a model that is tiny here
    (r"test_trainable_tokens.*", r"emb_dim = 768", "emb_dim = peft_model.config.hidden_size"),
    # a fixture that adapts a convolution and an embedding beside linear layers: all linear, the same names
    (r"test_tuners_utils.*", r"self\.(conv[01]) = nn\.Conv2d\(3, 10, 3\)", r"self.\1 = nn.Linear(10, 10)"),
    (
        r"test_tuners_utils.*",
        r"self\.(emb[01]) = nn\.Embedding\(10, 10\)",
        r"self.\1 = nn.Linear(10, 10)",
    ),
    # a slip in PEFT: this condition holds for every class, so the test never runs; and what follows it has aged
    (
        r"test_custom_models.*",
        r"if config_cls != LoraConfig or config_cls != BOFTConfig:",
        "if config_cls != LoraConfig and config_cls != BOFTConfig:",
    ),
    (r"test_custom_models.*", r"for warning in cm\.warnings\)", "for warning in cm.list)"),
    (
        r"test_custom_models.*",
        r"except AssertionError:(?=\s+# This is good)",
        "except (AssertionError, pytest.fail.Exception):",
    ),
]

# Options of LoraConfig that are features of LoRA alone; a test that sets one is skipped with this reason.
LORA_ONLY = {
    "init_lora_weights": "initialisations computed from the base weight (PiSSA, OLoRA, EVA, CorDA, LoftQ, ...) are LoRA's",
    "use_dora": "DoRA is a variant of LoRA only",
}

# ---
# Dropped: tests about another method; they are counted but are no part of the run. (file pattern, test pattern,
# subject)

DROPPED = [
    (
        r".*",
        r"dora|pissa|olora|corda|loftq|_eva_|Eva|mica|monteclora|kasa|velora|bdlora|lora_ga|arrow|megatron|alora|qalora"
        r"|layer_replication|target_parameters|TargetParameter|paramwrapper|NestedConfig|DynamicDispatch|HotSwap|hotswap"
        r"|lora_bias|lora_with_bias|bias_when_base_layer_has_no_bias|orthogonal",
        "LoRA's variants and options",
    ),
    (r".*", r"prompt_tuning|prompt_learning|prompt_encoder|prefix_tuning|past_kv", "prompt learning"),
]

# ---
# Skips. Most are not listed by test: the test runs, and where LoRAMoE refuses what it asks for with the error below,
# the refusal is the right outcome and the test counts as skipped with that reason. Any other error is a failure.
# (exception type, pattern of the message, pattern that the test's code or name must fit, reason)

WEIGHTED = "the weighted sum of mixtures with routers of their own is no such mixture: add_weighted_adapter is refused"
MERGE = "routing depends on the token, so no weight matrix equals the mixture: merging is refused"
MIXED = "PeftMixedModel takes only the methods on PEFT's own list: refused"
NOT_ALL_LINEAR = (
    r"\A(?!.*all-linear)"  # the test names the target itself; "all-linear" must never choose such a module
)

REFUSALS = [
    (ValueError, r"LoRAMoE adapters cannot be merged", r"merge", MERGE),
    (ValueError, r"LoRAMoE adapters cannot be (combined|added|weighted|merged)", r"add_weighted_adapter", WEIGHTED),
    (
        ValueError,
        r"Target module (Embedding|\w+WordEmbedding)\(.* is not supported",
        NOT_ALL_LINEAR,
        "adapts linear layers: an embedding as target is refused",
    ),
    (
        ValueError,
        r"Target module Conv[123]d\(.* is not supported",
        NOT_ALL_LINEAR,
        "adapts linear layers: a convolution as target is refused",
    ),
    (
        ValueError,
        r"Target module MultiheadAttention\(.* is not supported",
        NOT_ALL_LINEAR,
        "nn.MultiheadAttention reads the weights of its linears and never calls them: refused as target",
    ),
    (
        TypeError,
        r"Some module types on this model do not support LoRA conversion: .*LoRAMoELinear",
        r"",
        "no LoRA computes what depends on the token: PEFT's convert_to_lora refuses it",
    ),
    (ValueError, r"LORAMOE.* is not (compatible with the `PeftMixedModel`|supported for mixed models)", r"", MIXED),
    (
        ValueError,
        r"bias='\w+' needs peft>=",
        r"bias",
        "this version of PEFT trains the biases and does not save them: training them is refused",
    ),
    (
        RuntimeError,
        r"The checkpoint does not fit the LoRAMoE layers.*missing: ",
        r"missing_keys",
        "a checkpoint that lacks some of the adapter's tensors is refused, where PEFT only warns",
    ),
]

# (file pattern, test pattern, reason)
SKIPS = [
    (
        r"test_initialization",
        r"test_lora_linear_init_(default|gaussian)",
        "wants a p-value over one half, as one sample in two has: that of LoRA's random numbers does",
    ),
    (
        r"test_initialization",
        r"test_weight_tying_(tied_model|enc_dec)_target_modules",
        "adapts an embedding; LoRAMoE adapts linear layers and refuses to tie such targets",
    ),
    (r"test_helpers", r"TestScalingAdapters", "rescale_adapter_scale is a helper of PEFT for LoraLayer only"),
    (
        r"test_helpers",
        r"test_no_disable_input_dtype_casting|test_disable_input_dtype_casting_inactive",
        "wants the error of a cast input; LoRAMoE casts its small weights and never the input",
    ),
    (
        r"test_config",
        r"runtime_config",
        "runtime_config (ephemeral_gpu_offload) is an option of LoRA, for the set-up of DoRA",
    ),
    (r".*", r"diffus", "needs a diffusion pipeline, which cannot be built from a config here"),
    (
        r"test_low_level_api",
        r"warns_for_unsharded_state_dict",
        "PEFT looks for ungathered shards in LoRA's tensors only",
    ),
    (r"test_tuners_utils", r"test_transformers_model$", "expects the parameters of the full-size GPT-2 of the hub"),
]

if int(transformers.__version__.split(".")[0]) < 5:
    SKIPS.append(
        (r"test_low_level_api", r"model_with_weight_conversion$", "names the modules of CLIP in transformers 5")
    )

if "nemotron_h" not in transformers.CONFIG_MAPPING:
    SKIPS.append((r"test_initialization", r"nemotron_h", "this version of transformers has no Nemotron-H"))

# PEFT's own skips whose stated reason is about something else: (pattern of the reason, reason that is true here)
TRUE_REASONS = [
    (r"Combining Gemma adapters with SVD|Test does not work with model .*qwen2", WEIGHTED),
    (r"^Merging two adapters with trainable tokens", MERGE),
]
