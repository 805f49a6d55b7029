"""Adapters on the Hugging Face Hub.

Pushed by one process, loaded by others, with the real client (see `hub_server`).
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from hub_server import client_environment, running_hub


pytestmark = pytest.mark.slow

BASE, ADAPTER, UPLOADED, BRANCH = "user/base", "user/adapter", "user/uploaded", "second"
LIMIT = 120  # seconds for one client process


# What the client processes run


def logits(model):
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12) * 5 % 128).logits


def push(folder):
    """Push a base model and three versions of an adapter; save what each version computes."""
    from huggingface_hub import HfApi
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from peft_loramoe import LoRAMoEConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).push_to_hub(BASE)
    config = LoRAMoEConfig(r=4, lora_alpha=32, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config).eval()

    commits, results = {}, {"base": logits(AutoModelForCausalLM.from_pretrained(BASE))}
    for version, branch in (("old", None), ("main", None), (BRANCH, BRANCH)):
        with torch.no_grad():
            for weight in (weight for weight in model.parameters() if weight.requires_grad):
                weight.mul_(1.5)
        results[version] = logits(model)
        commits[version] = model.push_to_hub(ADAPTER, revision=branch).oid
    torch.save(results, f"{folder}/pushed.pt")

    model.save_pretrained(f"{folder}/saved")
    HfApi().create_repo(UPLOADED)
    HfApi().upload_folder(repo_id=UPLOADED, folder_path=f"{folder}/saved")
    return commits


def load(folder, old_commit):
    """Load the adapter in the ways PEFT offers, first without this package, and read its cards."""
    return {"errors": load_without_import(), "cards": load_with_import(folder, old_commit)}


def load_with_import(folder, old_commit):
    from huggingface_hub import ModelCard, model_info
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    import peft_loramoe

    def peft_model(repo=ADAPTER, **options):
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), repo, **options)

    results = {
        "main": logits(peft_model()),
        "old": logits(peft_model(revision=old_commit)),
        BRANCH: logits(peft_model(revision=BRANCH)),
        "uploaded": logits(peft_model(UPLOADED)),
        "auto": logits(AutoPeftModelForCausalLM.from_pretrained(ADAPTER)),
        "auto_old": logits(AutoPeftModelForCausalLM.from_pretrained(ADAPTER, revision=old_commit)),
    }
    torch.save(results, f"{folder}/loaded.pt")
    config = PeftConfig.from_pretrained(ADAPTER)
    assert isinstance(config, peft_loramoe.LoRAMoEConfig) and config.base_model_name_or_path == BASE
    cards = {repo: ModelCard.load(repo).text for repo in (ADAPTER, UPLOADED)}
    return {repo: {"text": text, **vars(model_info(repo).card_data)} for repo, text in cards.items()}


def load_without_import():
    """What PEFT alone says about the adapter."""
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(BASE)
    errors = {}
    for load in (PeftConfig.from_pretrained, AutoPeftModelForCausalLM.from_pretrained, PeftModel.from_pretrained):
        try:
            load(*([base] if load == PeftModel.from_pretrained else []), ADAPTER)
        except Exception as error:
            errors[load.__self__.__name__] = repr(error)
    assert "peft_loramoe" not in sys.modules
    return errors


# The processes and what they found


def run(hub, folder, function, *arguments):
    """What `function` of this file returns in a process that sees only `hub`."""
    environment = client_environment(hub, folder / f"home_{function.__name__}")
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, function.__name__, str(folder), *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as hub:
        commits = run(hub, folder, push)
        found = {"commits": commits, **run(hub, folder, load, commits["old"])}
    return found | {name: torch.load(folder / f"{name}.pt") for name in ("pushed", "loaded")}


def test_versions_differ(found):
    assert len(set(found["commits"].values())) == 3
    versions = list(found["pushed"].values())
    assert not any(torch.equal(one, other) for i, one in enumerate(versions) for other in versions[:i])


@pytest.mark.parametrize(
    ("loaded", "pushed"),
    [("main", "main"), ("auto", "main"), ("old", "old"), ("auto_old", "old"), (BRANCH, BRANCH), ("uploaded", BRANCH)],
)
def test_loaded_adapter_computes_what_the_pushed_one_did(found, loaded, pushed):
    torch.testing.assert_close(found["loaded"][loaded], found["pushed"][pushed], rtol=0, atol=0)


@pytest.mark.parametrize("repo", [ADAPTER, UPLOADED])
def test_card_says_how_to_load_the_adapter(found, repo):
    card = found["cards"][repo]
    assert "import peft_loramoe" in card["text"] and BASE in card["text"]
    assert "loramoe" in card["tags"]
    assert (card["library_name"], card["base_model"]) == ("peft", BASE)


@pytest.mark.parametrize("loader", ["PeftConfig", "AutoPeftModelForCausalLM", "PeftModel"])
def test_without_the_import_peft_stops(found, loader):
    """PEFT looks the type up in its registry and gives no hint of the package; the model card does."""
    assert found["errors"][loader] == "KeyError('LORAMOE')"


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
