"""Whatever value an option is given, what reaches the user is a configuration or one of our own sentences."""

import json
import math

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.fields import ConfigFields


NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, 2, -1, 10**400, 1e30, math.nan, math.inf, 4_000_000_000])
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=10), st.sampled_from(["(", "all-linear", ".*up", "none"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
OBJECTS = st.one_of(
    JSON,
    st.binary(max_size=3),
    st.complex_numbers(),
    st.tuples(SCALARS, SCALARS),
    st.sets(st.integers(), max_size=2),
    st.sampled_from([object(), torch.ones(2), torch.tensor(1), torch.float64, np.ones(3), np.int64(3), np.True_, len]),
)
OPTIONS = sorted(
    [*ConfigFields.__annotations__, "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"]
)


def built(options):
    """The configuration, or None if it was refused in our own words."""
    try:
        return LoRAMoEConfig(**options)
    except (TypeError, ValueError) as error:
        message = str(error)
        assert type(error) in (TypeError, ValueError), error
        assert any(name in message for name in options), message
        assert len(message) < 2000
        return None


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(OPTIONS), OBJECTS, min_size=1, max_size=3))
def test_no_value_of_any_option_gives_a_foreign_exception(options):
    config = built(options)
    if config is not None:
        assert LoRAMoEConfig(**config.to_dict()) == config
        json.loads(
            json.dumps(
                {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}, allow_nan=False
            )
        )


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(OPTIONS), JSON)
def test_no_value_in_a_file_gives_a_foreign_exception(tmp_path_factory, option, value):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORAMOE", option: value}))
    try:
        config = PeftConfig.from_pretrained(folder)
    except (TypeError, ValueError) as error:
        assert option in str(error) or "num_experts" in str(error)
    else:
        assert type(config) is LoRAMoEConfig


GOOD = {
    "r": st.integers(1, 16),
    "lora_alpha": st.floats(-1e3, 1e3),
    "lora_dropout": st.floats(0, 0.99),
    "router_temperature": st.floats(1e-3, 1e3),
    "num_experts": st.sampled_from([2, 4, 6]),
    "balance_delta": st.floats(0, 0.99),
    "balance_loss_weight": st.floats(0, 10),
    "top_k": st.one_of(st.none(), st.integers(1, 2)),
    "null_groups": st.sampled_from([None, [0], [1]]),
    "task_type_names": st.one_of(st.none(), st.lists(st.text(max_size=4), min_size=2, max_size=2, unique=True)),
    "rank_pattern": st.dictionaries(st.sampled_from(["up", "down_proj", ".*0"]), st.integers(1, 8), max_size=2),
}


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional=GOOD))
def test_good_values_are_accepted(options):
    try:
        config = LoRAMoEConfig(**options)
    except ValueError as error:
        assert "surrogates" in str(error) or "no file can hold" in str(error)
    else:
        assert all(getattr(config, name) == value for name, value in options.items())
