import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model

from peft_loramoe import LoRAMoEConfig, __version__
from peft_loramoe.fields import ConfigFields
from peft_loramoe.groups import ExpertGroups
from tiny import tiny_llama


FIXTURE = Path(__file__).parent / "fixtures" / "adapter-0.1.0"

EVERY_OPTION = dict(
    r=4,
    lora_alpha=32,
    lora_dropout=0.05,
    use_rslora=True,
    target_modules=["up_proj", "down_proj"],
    exclude_modules=["layers.0.mlp.up_proj"],
    layers_to_transform=[0, 1],
    layers_pattern="layers",
    rank_pattern={"up_proj": 2},
    alpha_pattern={"up_proj": 16},
    bias="all",
    modules_to_save=["lm_head"],
    trainable_token_indices=[1, 2],
    ensure_weight_tying=True,
    fan_in_fan_out=True,
    init_weights="gaussian",
    num_experts=5,
    num_experts_pattern={"down_proj": [1, 3]},
    expert_groups=[2, 3],
    null_groups=[0],
    task_type_names=["knowledge", "tasks"],
    router_temperature=0.5,
    router_dtype="float64",
    router_init="normal",
    top_k=2,
    router_lr_multiplier=3.0,
    freeze_experts=True,
    balance_loss_weight=0.2,
    balance_delta=0.3,
    balance_formula="variance_to_mean",
    balance_target="paper",
    balance_importance="sum",
    balance_detach=True,
    balance_across_processes=True,
)


def test_every_option_is_tried_here():
    own = set(ConfigFields.__annotations__) - {"peft_loramoe_version"}
    assert own == set(EVERY_OPTION)


def test_every_value_survives_the_json_file(tmp_path):
    config = LoRAMoEConfig(**EVERY_OPTION, task_type="CAUSAL_LM", base_model_name_or_path="base", inference_mode=True)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORAMOE"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is LoRAMoEConfig
    assert loaded.to_dict() == config.to_dict()


def test_saving_logs_how_to_load(tmp_path, caplog):
    with caplog.at_level("INFO", logger="peft_loramoe"):
        LoRAMoEConfig().save_pretrained(tmp_path)
    assert "import peft_loramoe" in caplog.text and str(tmp_path) in caplog.text


def test_the_defaults_survive_the_json_file(tmp_path):
    LoRAMoEConfig().save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == LoRAMoEConfig()


def test_the_plain_defaults_are_the_layout_of_the_paper_with_a_detached_term_and_fast_routers():
    config = LoRAMoEConfig()
    assert (config.num_experts, config.groups_of()) == (6, ExpertGroups((3, 3)))
    assert (config.balance_detach, config.router_lr_multiplier) == (True, 10.0)


def test_a_file_from_before_the_router_rate_keeps_one_rate():
    assert PeftConfig.from_pretrained(FIXTURE).router_lr_multiplier == 1.0


def test_loading_keeps_the_training_dynamics_of_the_file(tmp_path):
    LoRAMoEConfig(balance_detach=False, router_lr_multiplier=1.0).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.balance_detach, config.router_lr_multiplier) == (False, 1.0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal(clone):
    config = LoRAMoEConfig(**EVERY_OPTION)
    assert clone(config) == config
    assert clone(config).peft_type is PeftType("LORAMOE")


def test_unknown_keys_of_a_newer_version_are_dropped_with_a_warning(tmp_path):
    LoRAMoEConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "option_of_tomorrow": 1}))
    with pytest.warns(UserWarning, match="option_of_tomorrow"):
        assert PeftConfig.from_pretrained(tmp_path).r == 3


def test_options_that_lora_has_are_named_and_preset_as_there():
    lora = {f.name.replace("init_lora_weights", "init_weights"): f for f in dataclasses.fields(LoraConfig)}
    shared = [
        f for f in dataclasses.fields(LoRAMoEConfig) if f.name in lora and f.name in ConfigFields.__annotations__
    ]
    assert len(shared) == 16
    for option in shared:
        assert (option.default, option.default_factory) == (
            lora[option.name].default,
            lora[option.name].default_factory,
        )


def test_help_of_every_option_is_in_the_docstring():
    for option in dataclasses.fields(LoRAMoEConfig):
        if option.name in ConfigFields.__annotations__:
            assert f"    {option.name}: {option.metadata['help']}\n" in LoRAMoEConfig.__doc__


def test_the_writing_version_is_recorded_and_kept():
    assert LoRAMoEConfig().peft_loramoe_version == __version__
    assert LoRAMoEConfig(peft_loramoe_version="0.0.1").peft_loramoe_version == "0.0.1"


def test_a_torch_dtype_is_accepted_for_the_router():
    assert LoRAMoEConfig(router_dtype=torch.float64).router_dtype == "float64"


def test_a_value_that_was_renamed_is_migrated_with_a_warning():
    with pytest.warns(UserWarning, match="balance_target='printed' is called 'paper' now"):
        assert LoRAMoEConfig(balance_target="printed").balance_target == "paper"


@pytest.mark.parametrize(
    ("options", "layer", "groups"),
    [
        ({}, None, [3, 3]),
        (dict(num_experts=5, expert_groups=[1, 4]), None, [1, 4]),
        (dict(num_experts_pattern={"up": 4}), "mlp.up", [2, 2]),
        (dict(num_experts_pattern={"up": [1, 2]}), "mlp.up", [1, 2]),
        (dict(num_experts=3, expert_groups=[3]), None, [3]),
    ],
)
def test_groups(options, layer, groups):
    assert LoRAMoEConfig(**options).groups_of(layer) == ExpertGroups(groups)


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 8.0), (True, 16.0)])
def test_scaling(use_rslora, scaling):
    assert LoRAMoEConfig(use_rslora=use_rslora).scaling(4, 32) == scaling


BAD_VALUES = [
    (dict(r=0), "r=0 must be at least 1"),
    (dict(r=-2), "r=-2"),
    (dict(r=2.0), "r=2.0 must be an integer"),
    (dict(r=True), "r=True must be an integer"),
    (dict(lora_alpha="32"), "lora_alpha='32' must be a number"),
    (dict(lora_dropout=1.0), r"lora_dropout=1.0 must be in \[0, 1\)"),
    (dict(lora_dropout=-0.1), "lora_dropout=-0.1"),
    (dict(rank_pattern={"up": 0}), r"rank_pattern\['up'\]=0"),
    (dict(alpha_pattern={"up": None}), r"alpha_pattern\['up'\]=None must be a number"),
    (dict(bias="lora_only"), "bias='lora_only' is not one of 'none', 'all', 'loramoe_only'"),
    (dict(init_weights="pissa"), "init_weights='pissa' is not one of True, False, 'gaussian'"),
    (dict(init_weights=1), "init_weights=1 is not one of"),
    (dict(target_modules=".*up", layers_to_transform=[0]), "layers_to_transform.*target_modules='.*up'"),
    (dict(target_modules=".*up", layers_pattern="h"), "layers_pattern"),
    (dict(target_modules=["up"], layers_pattern="h"), "`layers_to_transform` must also be specified"),
    (dict(num_experts=0), "num_experts=0 must be at least 2"),
    (dict(num_experts=1), "num_experts=1 must be at least 2 .*that is a LoRA"),
    (
        dict(num_experts=5),
        r"num_experts=5 cannot be split into two equal groups; set expert_groups, .*\[3, 2\] or \[5\]",
    ),
    (dict(num_experts_pattern={"up": 1}), r"num_experts_pattern\['up'\]=1"),
    (dict(num_experts_pattern={"up": 3}), r"num_experts_pattern\['up'\]=3 cannot be split"),
    (dict(expert_groups=[3, 2]), r"expert_groups=\[3, 2\] sums to 5, not to num_experts=6"),
    (
        dict(expert_groups=[3, 3], num_experts_pattern={"up": 4}),
        r"sums to 6, not to num_experts_pattern\['up'\]=4; give the sizes there as a list",
    ),
    (dict(num_experts_pattern={"up": [1, 1, 1]}), r"num_experts_pattern\['up'\] gives 3 groups.*but there are 2"),
    (dict(expert_groups=[6, 0]), r"expert_groups\[1\]=0 must be at least 1"),
    (dict(expert_groups=6), "expert_groups=6 must be a list"),
    (dict(expert_groups=[]), r"expert_groups=\[\] must be a list"),
    (dict(num_experts_pattern={"up": [1]}), r"num_experts_pattern\['up'\]=\[1\] has one expert"),
    (dict(null_groups=[2]), r"null_groups=\[2\] must be indices of the 2 expert groups"),
    (dict(null_groups=[0, 1]), r"null_groups=\[0, 1\] leaves no group with parameters"),
    (dict(task_type_names=["a"]), r"task_type_names=\['a'\] must be 2 different names"),
    (dict(task_type_names=["a", "a"]), "2 different names"),
    (dict(top_k=7), "top_k=7 is more than the 6 experts of num_experts"),
    (
        dict(top_k=5, num_experts_pattern={"up": 4}),
        r"top_k=5 is more than the 4 experts of num_experts_pattern\['up'\]",
    ),
    (dict(top_k=0), "top_k=0"),
    (dict(router_temperature=0.0), r"router_temperature=0.0 must be in \[1e-06, 1e\+06\]"),
    (dict(router_dtype="float16"), "router_dtype='float16' is not one of"),
    (dict(router_init="xavier"), "router_init='xavier' is not one of"),
    (dict(router_lr_multiplier=0), "router_lr_multiplier=0 must be in"),
    (dict(router_lr_multiplier=-1.0), "router_lr_multiplier=-1.0 must be in"),
    (dict(router_lr_multiplier=float("inf")), "router_lr_multiplier=inf must be in"),
    (dict(router_lr_multiplier=float("nan")), "router_lr_multiplier=nan must be in"),
    (dict(router_lr_multiplier="10"), "router_lr_multiplier='10' must be a number"),
    (dict(router_lr_multiplier=True), "router_lr_multiplier=True must be a number"),
    (dict(balance_loss_weight=-0.1), r"balance_loss_weight=-0.1 must be in \[0, 1e\+06\]; 0 turns balancing off"),
    (dict(balance_delta=1.0), r"balance_delta=1.0 must be in \[0, 1\)"),
    (dict(balance_delta=-0.1), "balance_delta=-0.1"),
    (dict(balance_formula="cv"), "balance_formula='cv' is not one of"),
    (dict(balance_target="target"), "balance_target='target' is not one of"),
    (dict(balance_importance="max"), "balance_importance='max' is not one of"),
    (dict(target_modules=5), "target_modules=5 must be a list of module names"),
    (dict(exclude_modules=["up", 1]), r"exclude_modules\[1\]=1 must be a string"),
    (dict(modules_to_save={"lm_head": True}), "modules_to_save="),
    (dict(use_rslora="yes"), "use_rslora='yes' must be True or False"),
    (dict(freeze_experts="yes"), "freeze_experts='yes' must be True or False"),
    (dict(balance_detach=1), "balance_detach=1 must be True or False"),
    (dict(balance_across_processes="yes"), "balance_across_processes='yes' must be True or False"),
    (dict(task_type="POETRY"), "Invalid task type"),
    (dict(lora_alpha=math.nan), "lora_alpha=nan must be in"),
    (dict(lora_alpha=-math.inf), "lora_alpha=-inf must be in"),
    (dict(lora_alpha=10**400), "lora_alpha=1000.*must be in"),
    (dict(r=10**5000), "r=<int> must be at most"),
    (dict(lora_dropout=math.nan), "lora_dropout=nan"),
    (dict(router_temperature=math.inf), "router_temperature=inf"),
    (dict(balance_loss_weight=math.nan), "balance_loss_weight=nan"),
    (dict(balance_delta=math.nan), "balance_delta=nan"),
    (dict(num_experts=4_000_000_000), "num_experts=4000000000 must be at most 4096: each expert is a row of every"),
    (dict(num_experts=1e30), r"num_experts=1e\+30 must be an integer"),
    (dict(expert_groups=[3, 4_000_000_000]), r"expert_groups\[1\]=4000000000 must be at most"),
    (dict(expert_groups=[4096, 4096]), "has 8192 experts; at most 4096"),
    (dict(r=10**9), "r=1000000000 must be at most 65536: no linear layer"),
    (dict(r=20_000), "r=20000 times the 6 LoRA experts of num_experts is a rank of 120000"),
    (dict(rank_pattern={"up": 20_000}), r"rank_pattern\['up'\]=20000 times the 6 LoRA experts"),
    (dict(num_experts_pattern=None), "num_experts_pattern=None must be a dictionary"),
    (dict(num_experts_pattern=[4]), r"num_experts_pattern=\[4\] must be a dictionary"),
    (
        dict(num_experts_pattern={"up": None}),
        r"num_experts_pattern\['up'\]=None must be a number of experts or a list",
    ),
    (dict(rank_pattern=[2]), r"rank_pattern=\[2\] must be a dictionary"),
    (dict(rank_pattern={"(": 2}), r"a key of rank_pattern='\(' is no valid regular expression"),
    (dict(target_modules="("), r"target_modules='\(' is no valid regular expression"),
    (dict(exclude_modules="*"), "exclude_modules='\\*' is no valid regular expression"),
    (dict(null_groups=5), "null_groups=5 must be a list of indices"),
    (dict(null_groups=[-1]), r"null_groups\[0\]=-1 must be at least 0"),
    (dict(null_groups=[True]), r"null_groups\[0\]=True must be an integer"),
    (dict(null_groups=[0.0]), r"null_groups\[0\]=0.0 must be an integer"),
    (dict(task_type_names="ab"), "task_type_names='ab' must be a list of names"),
    (dict(task_type_names=5), "task_type_names=5 must be a list of names"),
    (dict(modules_to_save="lm_head"), "modules_to_save='lm_head' must be a list of module names"),
    (dict(modules_to_save=["("]), r"modules_to_save\[0\]='\(' is no valid regular expression"),
    (dict(layers_to_transform=[1.5]), r"layers_to_transform\[0\]=1.5 must be an integer"),
    (dict(layers_to_transform=True), "layers_to_transform=True must be an index of a layer or a list"),
    (dict(trainable_token_indices=[[1]]), r"trainable_token_indices\[0\]=\[1\] must be an integer"),
    (dict(trainable_token_indices={"embed": 1}), r"trainable_token_indices\['embed'\]=1 must be a list of token ids"),
    (dict(fan_in_fan_out=None), "fan_in_fan_out=None must be True or False"),
    (dict(inference_mode="no"), "inference_mode='no' must be True or False"),
    (dict(base_model_name_or_path=5), "base_model_name_or_path=5 must be a string"),
    (dict(base_model_name_or_path="\ud800"), "base_model_name_or_path=.* has a character that no file can hold"),
    (dict(peft_loramoe_version="x"), "peft_loramoe_version='x' is no version such as '0.1.0'; leave it out"),
    (dict(peft_loramoe_version=1.0), "peft_loramoe_version=1.0 must be a string"),
    (dict(router_dtype=torch.float16), "router_dtype='float16' is not one of"),
    (dict(top_k=True), "top_k=True must be an integer"),
]


@pytest.mark.parametrize(("options", "message"), BAD_VALUES)
def test_bad_values_are_refused_with_name_value_and_fix(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LoRAMoEConfig(**options)


@pytest.mark.parametrize(("options", "message"), BAD_VALUES)
def test_bad_values_in_a_file_are_refused_alike(options, message, tmp_path):
    LoRAMoEConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    try:
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    except (TypeError, ValueError):
        pytest.skip("JSON cannot hold it")
    with pytest.raises((ValueError, TypeError), match=message):
        PeftConfig.from_pretrained(tmp_path)


def test_keys_that_are_no_strings_are_refused():
    with pytest.raises(TypeError, match="a key of num_experts_pattern=1 must be a string"):
        LoRAMoEConfig(num_experts_pattern={1: 4})


def test_numbers_of_numpy_become_numbers_of_python(tmp_path):
    config = LoRAMoEConfig(
        r=np.int64(4), lora_alpha=np.float32(8), expert_groups=[np.int32(3), 3], lora_dropout=np.float64(0.5)
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert [type(value) for value in (config.r, config.lora_alpha, config.expert_groups[0])] == [int, float, int]


def test_an_option_changed_afterwards_is_checked_when_the_adapter_is_attached():
    config = LoRAMoEConfig(r=2)
    config.lora_alpha = math.nan
    with pytest.raises(ValueError, match="lora_alpha=nan"):
        get_peft_model(tiny_llama(), config)


# presets


def test_retain():
    config = LoRAMoEConfig.retain()
    assert config == LoRAMoEConfig(
        r=4,
        lora_alpha=64,
        num_experts=12,
        null_groups=[0],
        task_type_names=["knowledge", "tasks"],
        balance_delta=0.7,
        balance_loss_weight=0.1,
        balance_detach=True,
        router_lr_multiplier=10.0,
    )


def test_paper():
    config = LoRAMoEConfig.paper()
    assert config == LoRAMoEConfig(
        r=4,
        lora_alpha=32,
        lora_dropout=0.05,
        num_experts=6,
        balance_loss_weight=0.1,
        balance_delta=0.1,
        balance_formula="cv_squared",
        balance_target="paper",
        balance_importance="sum",
        balance_detach=False,
        router_lr_multiplier=1.0,
    )


@pytest.mark.parametrize("preset", [LoRAMoEConfig.retain, LoRAMoEConfig.paper])
def test_every_option_of_a_preset_can_be_overridden(preset):
    overrides = {**EVERY_OPTION, "balance_target": "corrected"}  # the other one contradicts `retain`
    assert preset(**overrides) == LoRAMoEConfig(**overrides)


@pytest.mark.parametrize("preset", [LoRAMoEConfig.retain, LoRAMoEConfig.paper])
def test_a_preset_has_no_other_options_than_the_configuration(preset):
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        preset(rank=8)


@pytest.mark.parametrize(
    ("overrides", "groups"),
    [
        (dict(num_experts=8), [4, 4]),
        (dict(expert_groups=[2, 6]), [2, 6]),
        (dict(expert_groups=[4, 2, 2]), [4, 2, 2]),
        (dict(num_experts=3, expert_groups=[1, 2]), [1, 2]),
    ],
)
def test_the_null_group_of_retain(overrides, groups):
    config = LoRAMoEConfig.retain(**overrides)
    assert (list(config.groups_of().sizes), config.groups_of().null) == (groups, (0,))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        dict(r=8),
        dict(num_experts=10),
        dict(expert_groups=[1, 6]),
        dict(r=16, use_rslora=True),
        dict(r=3, num_experts=4),
        dict(top_k=2),
    ],
)
def test_the_experts_of_retain_start_with_the_same_weight(overrides):
    config = LoRAMoEConfig.retain(**overrides)
    assert config.scaling(config.r, config.lora_alpha) / config.num_experts == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    "options",
    [
        dict(rank_pattern={"up": 8192}, num_experts_pattern={"down": [8, 8]}),
        dict(r=8192, num_experts_pattern={".*": [1, 1]}, rank_pattern={"up": 4}),
        dict(r=8192, num_experts=12, null_groups=[0]),
    ],
    ids=["patterns that do not meet", "a default that no layer has", "null experts"],
)
def test_a_rank_that_no_layer_has_is_not_counted(options):
    LoRAMoEConfig(**options)


def test_patterns_that_meet_in_a_layer_of_too_much_rank_are_refused():
    config = LoRAMoEConfig(rank_pattern={"up_proj": 8192}, num_experts_pattern={".*_proj": [8, 8]})
    message = "rank 8192 times the 16 LoRA experts of layer 'mlp.up_proj' is a rank of 131072; at most 65536"
    with pytest.raises(ValueError, match=message):
        config.rank_of("mlp.up_proj")


def test_a_given_lora_alpha_is_kept():
    assert LoRAMoEConfig.retain(r=8, lora_alpha=16).lora_alpha == 16


CONTRADICTIONS = [
    (dict(null_groups=None), r"retain\(null_groups=None\): group 0 is not null"),
    (dict(null_groups=[1]), r"retain\(null_groups=\[1\]\): group 0 is not null"),
    (dict(balance_loss_weight=0), r"retain\(balance_loss_weight=0\): without the term"),
    (dict(balance_delta=0.0), r"retain\(balance_delta=0.0\): the term then asks for the same routing"),
    (dict(balance_target="paper"), r"retain\(balance_target='paper'\): it gives type 0 the smaller weight"),
    (dict(expert_groups=[12]), r"retain\(expert_groups=\[12\]\): there must be a null group"),
]


@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS)
def test_retain_refuses_what_takes_its_promise_away(overrides, message):
    with pytest.raises(ValueError, match=rf"LoRAMoEConfig\.{message}.*LoRAMoEConfig\(\.\.\.\)"):
        LoRAMoEConfig.retain(**overrides)


@pytest.mark.parametrize(
    "overrides", [dict(r="4"), dict(num_experts=5), dict(expert_groups="66"), dict(expert_groups=["a"])]
)
def test_presets_check_values_as_the_configuration_does(overrides):
    with pytest.raises((TypeError, ValueError)) as plain:
        LoRAMoEConfig(**overrides)
    with pytest.raises((TypeError, ValueError)) as preset:
        LoRAMoEConfig.retain(**overrides)
    assert str(preset.value) == str(plain.value)
