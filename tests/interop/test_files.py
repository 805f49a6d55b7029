"""Adapter folders: what is read, what is refused, and that nothing half-written stays behind."""

import json
import os
import pickle
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.interop import new_folder, read_adapter, write_adapter
from peft_loramoe.interop.files import experts_by_module
from tiny import loramoe, tiny_llama, token_batch


TENSORS = {"some.weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}


class Code:
    """What a malicious pickle looks like: reading it would call a function."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def saved(folder, config='{"peft_type": "LORA"}', pickled=None):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config)
    if pickled is None:
        save_file(TENSORS, folder / "adapter_model.safetensors")
    else:
        torch.save(pickled, folder / "adapter_model.bin")
    return folder


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("pickled", [None, TENSORS])
def test_config_and_tensors_are_read(tmp_path, pickled):
    config, tensors = read_adapter(saved(tmp_path / "adapter", pickled=pickled))
    assert config == {"peft_type": "LORA"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name])


def test_hub_repositories_are_read(tmp_path, monkeypatch):
    folder, asked = saved(tmp_path / "adapter", pickled=TENSORS), []

    def download(repository, name):
        asked.append((repository, name))
        if not (folder / name).is_file():
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError(f"{name} is not there")
        return str(folder / name)

    monkeypatch.setattr("peft_loramoe.interop.files.check_source", lambda *_, **__: None)
    monkeypatch.setattr("peft_loramoe.interop.files.hf_hub_download", download)
    config, tensors = read_adapter("someone/adapter")
    assert config == {"peft_type": "LORA"} and tensors.keys() == TENSORS.keys()
    assert asked == [
        ("someone/adapter", f"adapter_{name}") for name in ("config.json", "model.safetensors", "model.bin")
    ]


def test_neither_folder_nor_repository(tmp_path):
    for source in ("no/such-adapter", tmp_path / "nothing here"):
        with pytest.raises(FileNotFoundError, match=f"adapter {source}: there is no such folder"):
            read_adapter(source)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file(tmp_path, name):
    folder = saved(tmp_path / "adapter")
    (folder / name).unlink()
    (other,) = (path.name for path in folder.iterdir())
    with pytest.raises(FileNotFoundError, match=rf"has no {name}.*it contains '{other}'"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"peft_type": ', "adapter_config.json, line 1: no valid JSON"),
        ("[1]", "contains a JSON list, not an object of options"),
    ],
)
def test_broken_config(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(saved(tmp_path / "adapter", config=text))


@pytest.mark.parametrize("keep", [0, 5, 30, -4])
def test_truncated_safetensors(tmp_path, keep):
    folder = saved(tmp_path / "adapter")
    truncate(folder / "adapter_model.safetensors", keep)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors' cannot be read .* is incomplete or damaged"):
        read_adapter(folder)


def test_corrupted_safetensors(tmp_path):
    path = saved(tmp_path / "adapter") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:10] + b"\xff" * 20 + path.read_bytes()[30:])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors' cannot be read .* is incomplete or damaged"):
        read_adapter(path.parent)


@pytest.mark.parametrize("keep", [0, 5, 300, -40])
def test_truncated_pickle(tmp_path, keep):
    folder = saved(tmp_path / "adapter", pickled=TENSORS)
    truncate(folder / "adapter_model.bin", keep)
    with pytest.raises(ValueError, match=r"adapter_model.bin' (cannot be read|is refused: it is damaged)"):
        read_adapter(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code_in_it(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "adapter", pickled={"some.weight": Code()})
    if not zipped:
        (folder / "adapter_model.bin").write_bytes(pickle.dumps({"some.weight": Code()}, protocol=2))
    with pytest.raises(ValueError, match=r"is refused: it is damaged, or it holds more than tensors, possibly code"):
        read_adapter(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "must hold a dictionary of tensors, not a list"),
        ({"step": 3}, "must hold a dictionary of tensors, not a dictionary with 'step: int'"),
    ],
)
def test_pickle_of_something_else(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(saved(tmp_path / "adapter", pickled=content))


def test_new_folder_appears_when_it_is_complete(tmp_path):
    output = tmp_path / "runs" / "adapter"
    with new_folder(output) as folder:
        (folder / "file").write_text("content")
        assert not output.exists()
    assert (output / "file").read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and [path.name for path in output.iterdir()] == [
        "file"
    ]
    (tmp_path / "usual").mkdir()
    assert output.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "runs" / "adapter") as folder:
        (folder / "file").write_text("content")
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_existing_output_is_refused(tmp_path, kind):
    output = tmp_path / "adapter"
    {"folder": output.mkdir, "file": output.touch, "dangling link": lambda: output.symlink_to("nowhere")}[kind]()
    with (
        pytest.raises(FileExistsError, match=r"adapter' exists already; remove it or choose another one"),
        new_folder(output),
    ):
        raise AssertionError("not reached")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_output_that_came_into_being_meanwhile(tmp_path):
    output = tmp_path / "adapter"
    with pytest.raises(FileExistsError, match="exists already"), new_folder(output):
        output.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("round", range(5))
def test_of_two_writers_the_second_is_refused(round, tmp_path):
    barrier = threading.Barrier(2)

    def write(name):
        try:
            with new_folder(tmp_path / "output") as folder:
                (folder / name).touch()
                barrier.wait()
        except FileExistsError:
            return None
        return name

    with ThreadPoolExecutor(2) as threads:
        written = [name for name in threads.map(write, "ab") if name]
    assert [path.name for path in (tmp_path / "output").iterdir()] == written
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_output_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(NotADirectoryError, match=r"cannot be created: '.*file' is a file"),
        new_folder(tmp_path / "file" / "a"),
    ):
        raise AssertionError("not reached")


def test_written_adapters_are_what_peft_writes(tmp_path):
    model = loramoe(lora_alpha=3).eval()
    model.save_pretrained(tmp_path / "peft")
    (tmp_path / "ours").mkdir()
    config = model.peft_config["default"]
    write_adapter(tmp_path / "ours", config, get_peft_model_state_dict(model))
    assert config.inference_mode is False  # the model's own configuration is left alone
    for folder in ("peft", "ours"):
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["inference_mode"] is True
    written, expected = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "peft"))
    assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in written)
    assert "import peft_loramoe" in (tmp_path / "ours" / "README.md").read_text()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**token_batch()).logits, model(**token_batch()).logits)


def test_configurations_of_other_methods_get_no_card(tmp_path):
    write_adapter(tmp_path, LoraConfig(target_modules=["q_proj"]), TENSORS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_tensors_by_module():
    tensors = get_peft_model_state_dict(loramoe(r=3))
    modules = experts_by_module({**tensors, "base_model.model.lm_head.weight": torch.ones(1)})
    assert len(modules) == 6
    shapes = {name: tuple(tensor.shape) for name, tensor in modules["model.layers.1.mlp.down_proj"].items()}
    assert shapes == {"A": (18, 48), "B": (32, 18), "router": (6, 48)}


def test_tensors_of_another_method():
    with pytest.raises(
        ValueError, match=r"No tensor is named base_model\.model\.<module>\.loramoe_experts.*found 'half', 'some"
    ):
        experts_by_module(TENSORS)


def test_a_missing_tensor_of_a_module():
    tensors = get_peft_model_state_dict(loramoe())
    del tensors["base_model.model.model.layers.1.mlp.up_proj.loramoe_experts.router"]
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj' lacks the tensor loramoe_experts\.router"):
        experts_by_module(tensors)


@pytest.mark.parametrize("part", ["A", "B", "router"])
@pytest.mark.parametrize("shape", [(), (6,), (0, 3), (1, 2, 3)])
def test_a_tensor_that_is_no_matrix(part, shape):
    tensors = {name: torch.ones(2, 3) for name in ("A", "B", "router")} | {part: torch.ones(shape)}
    with pytest.raises(ValueError, match=rf"'m': loramoe_experts.{part} has shape {re.escape(str(shape))}"):
        experts_by_module({f"base_model.model.m.loramoe_experts.{name}": t for name, t in tensors.items()})


def test_the_config_of_a_written_adapter_is_complete(tmp_path):
    config = LoRAMoEConfig(num_experts=3, expert_groups=[3], freeze_experts=True, target_modules=["up_proj"])
    write_adapter(tmp_path, config, TENSORS)
    assert LoRAMoEConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "inference_mode": True}


DAMAGE = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    damage=DAMAGE, cut=st.integers(0, 3000), name=st.sampled_from(["adapter_model.bin", "adapter_model.safetensors"])
)
def test_damaged_weights_are_read_or_refused_in_our_words(damage, cut, name, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "damaged-weights"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text("{}")
    path = folder / name
    torch.save(TENSORS, path) if name.endswith("bin") else save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for position, value in damage:
        content[position % len(content)] = value
    path.write_bytes(content[: len(content) - cut] if cut < 300 else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read_adapter(folder)
        except ValueError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a.lora_A.weight", torch.ones(2, 2, dtype=torch.complex64), "'a.lora_A.weight' has dtype torch.complex64"),
        ("a.lora_A0.weight", torch.ones(2, 2, dtype=torch.int64), "dtype torch.int64"),
        ("a.loramoe_experts.A", torch.ones(2, 2, dtype=torch.bool), "dtype torch.bool"),
    ],
)
@pytest.mark.parametrize("pickled", [True, False])
def test_matrices_that_are_no_floating_point_numbers_are_refused(name, tensor, message, pickled, tmp_path):
    folder = saved(tmp_path / "adapter", pickled={name: tensor} if pickled else None)
    if not pickled:
        save_file({name: tensor}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_warned_of(value, tmp_path):
    folder = saved(tmp_path / "adapter", pickled={"a.lora_A.weight": torch.tensor([[1.0, value]])})
    with pytest.warns(UserWarning, match="has NaN or infinity in 'a.lora_A.weight'"):
        read_adapter(folder)


def test_a_config_with_a_byte_order_mark_is_read(tmp_path):
    folder = saved(tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_adapter(folder)[0] == {}


def test_an_output_name_as_long_as_the_file_system_takes(tmp_path):
    with new_folder(tmp_path / ("x" * 250)) as folder:
        (folder / "file").touch()
    assert (tmp_path / ("x" * 250) / "file").is_file()
