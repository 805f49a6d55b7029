import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_loramoe import LoRAMoEConfig, balance_loss, collect_balance
from peft_loramoe.training import write_anchors
from peft_loramoe.training.anchor_pass import AnchorBatches
from research.method_comparison import __main__ as command
from research.method_comparison.anchored import ANCHOR_KL_WEIGHT, install
from tiny import labelled, tiny_llama, tiny_tokenizer, token_batch


ROOT = Path(__file__).parents[2]
TEXTS = ["w5 w6 w7 w8", "w9 w8 w7", "w11 w3 w4"]
LORA = LoraConfig(r=2, init_lora_weights=False, target_modules=["up_proj"], task_type="CAUSAL_LM")
RETAIN = LoRAMoEConfig.retain(r=2, init_weights=False, task_type="CAUSAL_LM")


@pytest.fixture
def utils(tmp_path):
    """What is used of PEFT's utils.py, with the changes installed."""

    def get_optimizer_and_scheduler(model, *, optimizer_type, **options):
        return getattr(torch.optim, optimizer_type)(model.parameters(), **options), None

    def log_to_file(*, log_data, save_dir):
        Path(save_dir, "log.json").write_text(json.dumps(log_data))

    write_anchors(tmp_path / "anchors.jsonl", [{"text": text, "kind": "prose"} for text in TEXTS])
    utils = SimpleNamespace(get_optimizer_and_scheduler=get_optimizer_and_scheduler, log_to_file=log_to_file)
    utils.get_tokenizer = lambda *, model_id, max_seq_length: tiny_tokenizer()
    install(utils, tmp_path / "anchors.jsonl")
    return utils


def both(utils, config):
    """The model of the comparison, and the same one without anchors."""
    torch.manual_seed(1)
    anchored = utils.get_peft_model(tiny_llama(), config, autocast_adapter_dtype=True)
    for parameter in anchored.parameters():  # or the model would be its base model, whose divergence is zero
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    plain = get_peft_model(tiny_llama(), config)
    plain.load_state_dict(anchored.state_dict())
    return anchored.train(), plain.train()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def divergence(model, anchor, **given):
    """KL(base model || model), mean over the tokens after the first."""
    real = anchor["attention_mask"][:, 1:] != 0
    with torch.no_grad(), model.disable_adapter():
        base = model(**anchor).logits[:, :-1][real]
    trained = model(**anchor, **given).logits[:, :-1][real]
    return torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=x) for x in (base, trained))
    ).mean()


# --- the training step


def test_mixture_learns_from_batch_anchors_and_term(utils):
    anchored, plain = both(utils, RETAIN)
    batches, batch = AnchorBatches(TEXTS, tiny_tokenizer()), labelled(token_batch())
    for step in range(2):
        anchored.zero_grad(), plain.zero_grad()
        anchor = labelled(batches.draw(1, step))
        with collect_balance(plain):
            task = plain(**batch, task_types=[1, 1, 1]).loss
            kl = divergence(plain, anchor, task_types=[0])
        (task + ANCHOR_KL_WEIGHT * kl + balance_loss(plain)).backward()
        loss = anchored(**batch).loss
        loss.backward()
        torch.testing.assert_close(loss, task)
        torch.testing.assert_close(gradients(anchored), gradients(plain))


def test_lora_learns_from_batch_and_anchors(utils):
    anchored, plain = both(utils, LORA)
    batch, anchor = labelled(token_batch()), labelled(AnchorBatches(TEXTS, tiny_tokenizer()).draw(1, 0))
    (plain(**batch).loss + ANCHOR_KL_WEIGHT * divergence(plain, anchor)).backward()
    anchored(**batch).loss.backward()
    torch.testing.assert_close(gradients(anchored), gradients(plain))


def test_evaluation_has_no_anchors(utils):
    anchored, plain = both(utils, RETAIN)
    batch = labelled(token_batch())
    loss = anchored.eval()(**batch).loss
    loss.backward()
    plain.eval()(**batch).loss.backward()
    torch.testing.assert_close(gradients(anchored), gradients(plain))


def test_routers_have_their_learning_rate(utils):
    model, _ = both(utils, RETAIN)
    optimizer, _ = utils.get_optimizer_and_scheduler(model, optimizer_type="AdamW", lr=1e-4, weight_decay=0.1)
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {"A": (1e-4, 0.1), "B": (1e-4, 0.1), "router": (pytest.approx(1e-3), 0.1)}


def test_optimizers_of_other_methods_are_refused(utils):
    model, _ = both(utils, RETAIN)
    with pytest.raises(ValueError, match=r"lora\+"):
        utils.get_optimizer_and_scheduler(model, optimizer_type="lora+", lr=1e-4)


@pytest.mark.parametrize("status", ["success", "canceled"])
def test_log_names_the_anchors_and_a_failed_run_ends_so(utils, status, tmp_path):
    log = {"run_info": {"error_msg": "out of memory"}, "train_info": {"status": status}}
    try:
        utils.log_to_file(log_data=log, save_dir=str(tmp_path))
        ended = ""
    except SystemExit as error:
        ended = str(error)
    assert ("out of memory" in ended) == (status == "canceled")
    written = json.loads((tmp_path / "log.json").read_text())["run_info"]["peft_loramoe"]
    assert len(written["anchors_sha256"]) == 64 and written["anchors_per_step"] == 1


# --- experiments


PRESETS = {
    "loramoe/llama-3.2-3B-retain": LoRAMoEConfig.retain(r=4, num_experts=4, lora_alpha=32, task_type="CAUSAL_LM"),
    "loramoe/llama-3.2-3B-paper": LoRAMoEConfig.paper(r=2, num_experts=4, lora_alpha=16, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_experiments_are_the_presets(name):
    config = PeftConfig.from_pretrained(command.EXPERIMENTS / name).to_dict()
    differing = {key for key, value in PRESETS[name].to_dict().items() if config[key] != value}
    assert differing <= {"peft_version"}


@pytest.mark.parametrize(
    "name, parameters",
    [*((name, 9_175_040) for name in PRESETS), ("lora/llama-3.2-3B-rank10-target-mlp-anchors", 9_461_760)],
)
def test_experiments_have_as_many_parameters_as_lora_of_rank_32(name, parameters):
    shape = LlamaConfig(
        vocab_size=8, hidden_size=3072, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=24, num_key_value_heads=8
    )  # fmt: skip
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(shape), PeftConfig.from_pretrained(command.EXPERIMENTS / name))
    assert 28 * model.get_nb_trainable_parameters()[0] == parameters


# --- the command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: `peft` passes for the tested checkout, beside anchors and an adapter's configuration."""
    monkeypatch.setattr(command, "TESTED_FILES", dict.fromkeys(command.TESTED_FILES, sha256().hexdigest()))
    monkeypatch.setattr(command, "sys", SimpleNamespace(version_info=(3, 12)))
    for path in (*(command.PROGRAM / name for name in command.TESTED_FILES), Path("src/peft/__init__.py")):
        (tmp_path / "peft" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "peft" / path).touch()
    (tmp_path / "anchors.jsonl").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys, experiment="loramoe/llama-3.2-3B-retain", anchors="anchors.jsonl"):
    with pytest.raises(SystemExit):
        command.main([experiment, "--peft-checkout", "peft", "--anchors", anchors])
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["method_comparison/MetaMathQA/data.py", "src/peft/__init__.py"])
def test_incomplete_checkout_is_refused(name, folder, capsys):
    (folder / "peft" / name).unlink()
    assert f"there is no {name} in it" in refusal(capsys)


def test_another_version_is_refused(folder, capsys):
    (folder / "peft" / command.PROGRAM / "run.py").write_text("pass")
    assert "run.py is another version than that of PEFT's commit 5d602fdbf" in refusal(capsys)


def test_another_version_runs_on_request(folder):
    (folder / "peft" / command.PROGRAM / "run.py").write_text("pass")
    with pytest.warns(UserWarning, match="run.py is another version"):
        command.program_folder(Path("peft"), untested=True)


def test_old_python_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr(command, "sys", SimpleNamespace(version_info=(3, 11), version="3.11.7"))
    assert "needs Python 3.12 to save the adapter, and this is 3.11.7" in refusal(capsys)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"experiment": "loramoe/nothing"}, "The experiments here are lora/llama-3.2-3B-rank10-target-mlp-anchors, "),
        ({"experiment": "other"}, "must be .../experiments/METHOD/NAME"),
        ({"anchors": "none.jsonl"}, "--anchors none.jsonl: there is no such file"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, folder, capsys):
    assert message in refusal(capsys, **arguments)


# --- PEFT's program


@pytest.mark.slow
@pytest.mark.skipif("PEFT_CHECKOUT" not in os.environ, reason="PEFT_CHECKOUT names no clone of PEFT's repository")
@pytest.mark.parametrize("config", [RETAIN, LORA], ids=["retain", "lora"])
def test_the_comparison_in_miniature(config, tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(
        tmp_path / "model"
    )
    tiny_llama(vocab_size=5).save_pretrained(tmp_path / "model")
    write_anchors(tmp_path / "anchors.jsonl", [{"text": text, "kind": "prose"} for text in ("a b c", "c a b a")])
    experiment = tmp_path / "experiments" / "loramoe" / "tiny"
    config.save_pretrained(experiment)
    settings = {
        "model_id": str(tmp_path / "model"), "dtype": "float32", "batch_size": 2, "batch_size_eval": 4, "max_steps": 4,
        "eval_steps": 2, "generation_kwargs": {"max_new_tokens": 2}, "optimizer_kwargs": {"lr": 1e-2, "weight_decay": 0.1},
    }  # fmt: skip
    (experiment / "training_params.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "comparison_run.py", os.environ["PEFT_CHECKOUT"], tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (log,) = (json.loads(path.read_text()) for path in (tmp_path / "log").glob("*.json"))
    assert log["train_info"]["status"] == "success"
    assert "forgetting" in log["train_info"]["metrics"][-1]
    assert log["run_info"]["peft_config"]["peft_type"] == config.peft_type
    assert log["run_info"]["peft_loramoe"]["anchors_per_step"] == 1
