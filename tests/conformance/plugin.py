"""The pytest plugin that turns PEFT's test suite into a test of LoRAMoE (started by run.py, which says what it does).

1. PEFT's case tables are replaced by the LoRAMoE cases of cases.py.
2. While the test modules are imported, PEFT's names for LoRA (``LoraConfig`` and the layer and model classes) stand for
   LoRAMoE's, so that LoRA tests whose subject is PEFT's behaviour run on LoRAMoE.
3. Tests about other methods are dropped. A test that asks for what LoRAMoE refuses, with the error of cases.REFUSALS, is
   reported as skipped with the reason given there; so every such refusal is seen to happen.
4. A passed test counts only if it really made a LoRAMoE config or adapter.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
import types
from functools import partial
from pathlib import Path
from unittest import mock

import huggingface_hub
import peft
import pytest
import torch
import transformers
from peft import PeftConfig
from peft.tuners import lora

from peft_loramoe import LoRAMoEConfig, LoRAMoELinear, LoRAMoEModel

from . import cases


REAL_LORA_CONFIG = peft.LoraConfig
LORA_TARGETS = lora.model.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
FROM_LORA_TEST = "_from_lora_test"
FIELDS = {field.name for field in dataclasses.fields(LoRAMoEConfig)}

# ---
# Packages that PEFT's tests import, and that no test which is run needs


def _stub(name, **contents):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(contents)
    return module


class _Parameterized:
    """`parameterized.expand` as a parametrize mark, so that the selection below sees its cases."""

    @staticmethod
    def expand(cases):
        def decorate(function):
            names = [name for name in inspect.signature(function).parameters if name != "self"]
            rows = [tuple(case) if isinstance(case, (list, tuple)) else (case,) for case in cases]
            rows = [row if len(names) > 1 else row[0] for row in rows]
            return pytest.mark.parametrize(", ".join(names), rows)(function)

        return decorate


def _stand_ins():
    """Modules for the time in which test modules are imported."""
    stubs = {
        # image pipelines, and isinstance checks on them
        "diffusers": _stub(
            "diffusers",
            __version__="0.0.0",
            StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}),
            UNet2DConditionModel=type("UNet2DConditionModel", (), {}),
        ),
        # tests of the distribution of LoRA's random numbers
        "scipy": _stub("scipy", stats=_stub("scipy.stats")),
        # PEFT's CorDA takes this from a package that PEFT does not require
        "attr": _stub("attr", dataclass=dataclasses.dataclass),
    }
    stubs = {name: module for name, module in stubs.items() if importlib.util.find_spec(name) is None}
    return {**stubs, "parameterized": _stub("parameterized", parameterized=_Parameterized)}


STAND_INS = _stand_ins()

# ---
# LoRA's names in the test modules


class Unsupported:
    """Takes the place of a config that asks for an option LoRAMoE does not have; the tests with it are skipped."""

    def __init__(self, reason):
        self.reason = reason


class _LoraConfigMeta(type):
    """`LoraConfig` in PEFT's tests.

    Calls make LoRAMoE configs, comparisons and isinstance checks mean LoRAMoE's class.
    """

    collecting = False

    def __call__(cls, *args, **kwargs):
        if args:
            names = list(inspect.signature(REAL_LORA_CONFIG).parameters)
            kwargs = {**dict(zip(names, args)), **kwargs}
        try:
            config = LoRAMoEConfig(**_translate_options(kwargs))
            setattr(config, FROM_LORA_TEST, True)
            return config
        except _UnsupportedOption as error:
            if _LoraConfigMeta.collecting:
                return Unsupported(str(error))
            pytest.skip(str(error))

    def __instancecheck__(cls, instance):
        return isinstance(instance, LoRAMoEConfig)

    def __subclasscheck__(cls, subclass):
        return issubclass(subclass, LoRAMoEConfig)

    def __eq__(cls, other):
        return other is LoRAMoEConfig or type.__eq__(cls, other)

    def __hash__(cls):
        return hash(LoRAMoEConfig)

    def __getattr__(cls, name):
        return getattr(LoRAMoEConfig, name)


class LoraConfig(metaclass=_LoraConfigMeta):
    pass


class _UnsupportedOption(Exception):
    pass


def _translate_options(kwargs):
    """LoRA's options as LoRAMoE's; raises _UnsupportedOption where LoRAMoE has no such thing."""
    kwargs = dict(kwargs)
    if "init_lora_weights" in kwargs:
        kwargs["init_weights"] = kwargs.pop("init_lora_weights")
        if kwargs["init_weights"] not in (True, False, "gaussian"):
            raise _UnsupportedOption(cases.LORA_ONLY["init_lora_weights"])
    if kwargs.get("bias") == "lora_only":
        kwargs["bias"] = "loramoe_only"
    for name in [name for name in kwargs if name not in FIELDS]:
        value = kwargs.pop(name)
        if name not in inspect.signature(REAL_LORA_CONFIG).parameters:
            raise TypeError(f"LoraConfig has no option '{name}'")
        if value:
            raise _UnsupportedOption(
                cases.LORA_ONLY.get(name, f"{name} is an option of LoRA that LoRAMoE does not have")
            )
    return kwargs


class _LoraModule:
    """`peft.tuners.lora` in the test modules: its classes are LoRAMoE's, the rest is LoRA's."""

    LoraConfig = LoraConfig
    LoraLayer = LoRAMoELinear
    Linear = LoRAMoELinear
    LoraModel = LoRAMoEModel

    def __getattr__(self, name):
        return getattr(lora, name)


LORA_NAMES = {"LoraConfig": LoraConfig, "LoraLayer": LoRAMoELinear, "LoraModel": LoRAMoEModel}
LORA_MODULES = ("peft", "peft.tuners", "peft.tuners.lora", "peft.tuners.lora.config", "peft.tuners.lora.layer",
                "peft.tuners.lora.model")  # fmt: skip


@contextlib.contextmanager
def importing_tests():
    """While test modules are imported, LoRA's public names are LoRAMoE's."""
    with contextlib.ExitStack() as stack:
        for name, module in STAND_INS.items():  # not mock.patch.dict: it would forget the test modules too
            sys.modules[name] = module
            stack.callback(sys.modules.pop, name, None)
        for module_name in LORA_MODULES:
            module = importlib.import_module(module_name)
            for name, substitute in LORA_NAMES.items():
                if name in vars(module):
                    stack.enter_context(mock.patch.object(module, name, substitute))
        stack.enter_context(mock.patch.object(_LoraConfigMeta, "collecting", True))
        yield


# ---
# The test modules


@contextlib.contextmanager
def _nothing(*args, **kwargs):
    yield


def _english_quotes(*args, **kwargs):
    from datasets import Dataset, DatasetDict

    return DatasetDict({"train": Dataset.from_dict({"quote": [f"Be yourself, number {i}." for i in range(16)]})})


def _cat_image():
    import numpy
    from PIL import Image

    return Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype="uint8"))


class _ImageProcessor:
    """In place of AutoImageProcessor, whose classes need torchvision."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()

    def __call__(self, images, return_tensors="pt"):
        pixels = torch.tensor(list(images.convert("RGB").resize((128, 128)).getdata()), dtype=torch.float32)
        return transformers.BatchFeature({"pixel_values": pixels.view(1, 128, 128, 3).permute(0, 3, 1, 2) / 127.5 - 1})


def _from_disk_hub(original):
    """hf_hub_download for tests with a cache folder of their own: it starts as a copy of the hub on the disk."""

    @functools.wraps(original)  # PEFT asks for its signature
    def hf_hub_download(repo_id, *args, **kwargs):
        if kwargs.get("cache_dir"):
            name = "models--" + repo_id.replace("/", "--")
            source, target = Path(os.environ["HF_HUB_CACHE"]) / name, Path(kwargs["cache_dir"]) / name
            if source.exists() and not target.exists():
                shutil.copytree(source, target)
        return original(repo_id, *args, **kwargs)

    return hf_hub_download


def _exists_on_disk_hub(repo_id, filename, revision=None, **kwargs):
    """check_file_exists_on_hf_hub, which does not answer offline."""
    try:
        return isinstance(huggingface_hub.try_to_load_from_cache(str(repo_id), filename, revision=revision), str)
    except huggingface_hub.errors.HFValidationError:
        return None


def _snapshot_from_disk_hub(repo_id, cache_dir, **kwargs):
    name = "models--" + repo_id.replace("/", "--")
    shutil.copytree(Path(os.environ["HF_HUB_CACHE"]) / name, Path(cache_dir) / name)


def _set_init_weights_false(original):
    def set_init_weights_false(config_cls, kwargs):
        if config_cls is LoRAMoEConfig:
            return {**kwargs, "init_weights": False}
        return original(config_cls, kwargs)

    return set_init_weights_false


def _pass(*args, **kwargs):
    return None


# Helpers of PEFT's tests: the hub is on the disk, LoRAMoE supports Conv1D and DeBERTa, and that it refuses to merge is
# seen when a test tries to.
HELPERS = {
    "hub_online_once": _nothing,
    "load_dataset_english_quotes": _english_quotes,
    "load_cat_image": _cat_image,
    "AutoImageProcessor": _ImageProcessor,
    "snapshot_download": _snapshot_from_disk_hub,
    "_skip_if_merging_not_supported": _pass,
    "_skip_if_adding_weighted_adapters_not_supported": _pass,
    "skip_deberta_lora_tests": _pass,
    "_skip_if_not_conv1d_supported": _pass,
    "_skip_if_conv1d_not_supported": _pass,
    "skip_non_prompt_learning": _pass,
    "check_beft_config": _pass,
    "beft_tests": _pass,
    "deberta_beft_tests": _pass,
}


def prepare_module(module):
    """Puts the LoRAMoE cases and helpers into an imported test module; does nothing the second time."""
    if "_loramoe_ready" in vars(module):
        return
    module._loramoe_ready = True
    for name, helper in HELPERS.items():
        if name in vars(module):
            setattr(module, name, helper)
    if "set_init_weights_false" in vars(module):
        module.set_init_weights_false = _set_init_weights_false(module.set_init_weights_false)
    if vars(module).get("lora") is lora:
        module.lora = _LoraModule()
    file = module.__name__.rsplit(".", 1)[-1]
    for name, content in cases.TABLES.get(file, {}).items():
        table = getattr(module, name, None)
        if isinstance(table, dict):
            table.clear()
            table.update(content)
        elif isinstance(table, list):
            table[:] = content
        elif table is not None:
            REPLACED[id(table)] = (table, list(content))


REPLACED = {}  # tables that cannot be changed in place: id -> (the table, its replacement)


# ---
# Which tests are run


def _contents(value, depth=0):
    """The value and what is in it, a few levels deep."""
    yield value
    if depth < 3:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple, set)):
            for item in value:
                yield from _contents(item, depth + 1)
        if isinstance(value, partial):
            yield from _contents([value.func], depth + 1)


def _is_ours(value):
    return value is LoRAMoEConfig or value is LoraConfig or isinstance(value, LoRAMoEConfig)


def _is_foreign(value):
    """A config, or config class, of another method (the common base class is nobody's)."""
    cls = value if inspect.isclass(value) else type(value)
    if cls is LoraConfig or not issubclass(cls, PeftConfig):
        return False
    return not issubclass(cls, LoRAMoEConfig) and cls not in BASE_CONFIGS


BASE_CONFIGS = {PeftConfig, peft.PromptLearningConfig}


def _names(code):
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _names(const)


def _uses_other_method(item):
    """Whether the test's own code, or that of its fixtures, makes a config of another method."""
    functions = [item.function]
    for fixtures in item._fixtureinfo.name2fixturedefs.values():
        functions += [fixture.func for fixture in fixtures if fixture.func.__module__.startswith("tests.")]
    for function in functions:
        function = inspect.unwrap(function)
        for name in _names(function.__code__):
            if _is_foreign(function.__globals__.get(name)):
                return name
    return None


def _matches(item, file_pattern, test_pattern):
    file = item.path.stem
    name = item.nodeid.split("::", 1)[1]
    return re.fullmatch(file_pattern, file) and re.search(test_pattern, name)


def _drop(item):
    """Why the test is no part of the run, or None."""
    for file_pattern, test_pattern, subject in cases.DROPPED:
        if _matches(item, file_pattern, test_pattern):
            return subject
    params = list(
        _contents(list(getattr(item, "callspec", None).params.values()) if hasattr(item, "callspec") else [])
    )
    if any(_is_foreign(value) for value in params):
        return "other methods' cases and tests"
    if any(_is_ours(value) for value in params) or any(isinstance(value, Unsupported) for value in params):
        return None
    return "other methods' cases and tests" if _uses_other_method(item) else None


def _refusal(excinfo, nodeid):
    """The reason given in cases.REFUSALS, if the test ended with one of those errors where it asks for such a thing."""
    error = excinfo.value
    if isinstance(error, (AssertionError, pytest.fail.Exception)):
        # a test that waits for another error, or for a warning, fails with this; what stopped it is the context, or
        # quoted
        error = error.__context__ or ValueError(str(error))
    frames = [entry.frame for entry in excinfo.traceback]
    in_tests = [frame.code for frame in frames if frame.f_globals.get("__name__", "").startswith("tests.")]
    test = "\n".join([nodeid, *(str(code.source()) for code in in_tests)])
    for exception, message, wanted, reason in cases.REFUSALS:
        fits = isinstance(error, exception) and re.search(message, str(error), re.DOTALL)
        if fits and re.search(wanted, test, re.DOTALL):
            return reason
    return None


# ---
# Hooks


class Conformance:
    def __init__(self, config):
        self.config = config
        self.dropped = collections.Counter()
        self.touched = False
        self.results = []

    # -- collection

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        if not isinstance(collector, pytest.Module):
            return (yield)
        with importing_tests():
            for name in ("testing_utils", "testing_common"):
                prepare_module(importlib.import_module(f"tests.{name}"))
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_generate_tests(self, metafunc):
        prepare_module(metafunc.module)
        with contextlib.ExitStack() as stack:
            for mark in metafunc.definition.iter_markers("parametrize"):
                if len(mark.args) > 1 and id(mark.args[1]) in REPLACED:
                    args = (mark.args[0], REPLACED[id(mark.args[1])][1], *mark.args[2:])
                    object.__setattr__(mark, "args", args)
            stack.enter_context(mock.patch.object(_LoraConfigMeta, "collecting", True))
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        keep, drop = [], []
        for item in items:
            subject = _drop(item)
            if subject:
                self.dropped[subject] += 1
                drop.append(item)
                continue
            keep.append(item)
            self._adjust(item)
        items[:] = keep
        config.hook.pytest_deselected(items=drop)

    def pytest_collection_finish(self):
        # PEFT's tests call gc.collect() all the time. It need not walk through all imported modules again.
        gc.collect()
        gc.freeze()

    def pytest_unconfigure(self):
        gc.unfreeze()  # or libraries report at the end that they leak

    def _adjust(self, item):
        for file_pattern, test_pattern, reason in cases.SKIPS:
            if _matches(item, file_pattern, test_pattern):
                item.add_marker(pytest.mark.skip(reason=reason))
        if not hasattr(item, "callspec"):
            return
        params = item.callspec.params
        for value in _contents(list(params.values())):
            if isinstance(value, Unsupported):
                item.add_marker(pytest.mark.skip(reason=value.reason))
        for name, condition, options, _ in cases.CASE_OPTIONS:
            if "config_kwargs" in params and re.search(name, item.name) and condition(params):
                params["config_kwargs"] = {**params["config_kwargs"], **options}

    # -- running

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        params = list(_contents(list(item.callspec.params.values()))) if hasattr(item, "callspec") else []
        self.touched = any(_is_ours(value) for value in params)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.excinfo is not None and report.failed:
            reason = _refusal(call.excinfo, item.nodeid)
            if reason:
                report.outcome = "skipped"
                report.longrepr = (str(item.path), 0, f"Skipped: {reason}")
                report.user_properties.append(("refused", True))
        if report.when == "call":
            report.user_properties.append(("touched", self.touched))
        return report

    # -- results, on the controlling process

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed or (report.when == "setup" and report.skipped):
            reason = ""
            if report.skipped:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
                reason = reason.removeprefix("Skipped: ")
                reason = next((true for pattern, true in cases.TRUE_REASONS if re.search(pattern, reason)), reason)
            elif report.failed:
                reason = str(report.longrepr)
            self.results.append(
                {
                    "test": report.nodeid,
                    "outcome": report.outcome if not hasattr(report, "wasxfail") or report.failed else "xfailed",
                    "reason": reason,
                    "touched": dict(report.user_properties).get("touched", False),
                    "refused": dict(report.user_properties).get("refused", False),
                    "seconds": report.duration,
                }
            )

    def pytest_collectreport(self, report):
        if report.failed:
            self.results.append(
                {
                    "test": report.nodeid,
                    "outcome": "failed",
                    "reason": str(report.longrepr),
                    "touched": False,
                    "seconds": 0,
                }
            )

    def pytest_sessionfinish(self, session):
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["dropped"] = dict(self.dropped)
            return
        path = os.environ.get("LORAMOE_CONFORMANCE_RESULTS")
        if path:
            with open(path, "w") as file:
                json.dump({"results": self.results, "dropped": dict(self.dropped)}, file)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        self.dropped = collections.Counter(getattr(node, "workeroutput", {}).get("dropped", self.dropped))


def _watch(plugin):
    """Notes when a test makes a LoRAMoE config."""
    original = LoRAMoEConfig.__post_init__

    def __post_init__(self):
        plugin.touched = True
        original(self)

    LoRAMoEConfig.__post_init__ = __post_init__


def _default_targets_of_lora():
    """LoRAMoE's default targets are the feed-forward linears. LoRA's own tests name the modules that LoRA adapts by
    default, so a config that such a test made through the name LoraConfig gets LoRA's."""
    original = LoRAMoEModel._prepare_adapter_config

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None and FROM_LORA_TEST in vars(peft_config):
            targets = LORA_TARGETS.get(model_config.get("model_type"))
            peft_config.target_modules = set(targets) if isinstance(targets, list) else targets
        return original(self, peft_config, model_config)

    LoRAMoEModel._prepare_adapter_config = _prepare_adapter_config


def pytest_configure(config):
    plugin = Conformance(config)
    _watch(plugin)
    _default_targets_of_lora()
    for module in (peft.config, peft.utils.save_and_load):
        module.hf_hub_download = _from_disk_hub(module.hf_hub_download)
    for module in (peft.auto, peft.utils.save_and_load):
        module.check_file_exists_on_hf_hub = _exists_on_disk_hub
    config.pluginmanager.register(plugin, "loramoe-conformance")
