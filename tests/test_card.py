import ast
import json

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.card import BEGIN, END, loading_snippet, write_card
from tiny import loramoe


def test_a_saved_adapter_tells_how_to_load_it(tmp_path):
    model = loramoe()
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"loramoe", "mixture-of-experts", "peft_loramoe"} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    assert loading_snippet("ADAPTER", model.peft_config["default"].to_dict()) in card.text
    assert '"num_experts": 6' in card.text


def test_saving_again_replaces_the_block_and_keeps_the_rest(tmp_path):
    path = tmp_path / "README.md"
    write_card(str(path), LoRAMoEConfig(r=4).to_dict())
    path.write_text(
        path.read_text().replace("library_name: peft", "library_name: peft\nlicense: mit") + "\nMy own notes.\n"
    )
    write_card(str(path), LoRAMoEConfig(r=5).to_dict())
    text = path.read_text()
    assert "My own notes." in text and "license: mit" in text
    assert text.count(BEGIN) == 1 and '"r": 5' in text and '"r": 4' not in text


def test_the_snippet_loads_the_class_of_the_task_type():
    snippet = loading_snippet(
        "me/adapter", LoRAMoEConfig(task_type="SEQ_CLS", base_model_name_or_path="base").to_dict()
    )
    assert snippet.startswith("import peft_loramoe")
    assert 'AutoModelForSequenceClassification.from_pretrained("base")' in snippet
    assert 'PeftModel.from_pretrained(base_model, "me/adapter")' in snippet


def test_the_snippet_loads_the_revision_that_was_trained_on():
    config = LoRAMoEConfig(task_type="CAUSAL_LM", base_model_name_or_path="base", revision="v2")
    assert 'AutoModelForCausalLM.from_pretrained("base", revision="v2")' in loading_snippet("a", config.to_dict())
    snippet = loading_snippet("a", config.to_dict(), gguf_file="q4.gguf")
    assert 'AutoModelForCausalLM.from_pretrained("base", revision="v2", gguf_file="q4.gguf")' in snippet


def test_a_local_base_model_is_not_named_to_the_hub(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"---\nbase_model: {tmp_path}\ntags:\n- base_model:adapter:{tmp_path}\n- lora\n---\n\nText.\n")
    write_card(str(path), LoRAMoEConfig().to_dict())
    data = ModelCard.load(path).data
    assert data.base_model is None
    assert sorted(data.tags) == ["lora", "loramoe", "mixture-of-experts", "peft_loramoe"]


HOSTILE = [
    'a"b',
    "a'b",
    "a'b\"c",
    'x")\nimport os; os.system("rm -rf ~")  # ',
    "x\r\nimport os",
    "x\u2028import os\x85import sys",
    "<!-- peft_loramoe: end -->",
    "<!-- peft_loramoe: begin -->\n",
    "\n```\n## Another section\n```python\n",
    "a\n---\nlicense: other\n---\n",
    "nul\0",
    "{snippet} {{ 1 + 1 }} {% raw %}",
    "back\\slash\\",
    "\\<",
    "\u202eesrever",
    "- a: [",
    "---",
    "<script>alert(1)</script>",
    "x" * 5000,
]


def code_of(text):
    return text.split("```python\n")[1].split("\n```")[0]


@pytest.mark.parametrize("place", ["base model", "target module", "task type name"])
@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_names_of_others_stay_data(name, place, tmp_path):
    options = {
        "base model": {"base_model_name_or_path": name},
        "target module": {"target_modules": [name]},
        "task type name": {"task_type_names": [name, "other"]},
    }[place]
    config, path = LoRAMoEConfig(task_type="CAUSAL_LM", **options), tmp_path / "README.md"
    write_card(str(path), config.to_dict())
    first = path.read_text(encoding="utf-8")
    write_card(str(path), config.to_dict())
    assert path.read_text(encoding="utf-8") == first  # the block was found and replaced
    assert first.count(BEGIN) == first.count(END) == 1

    card = ModelCard.load(path)
    assert code_of(card.text) == loading_snippet("ADAPTER", config.to_dict())
    statements = ast.parse(code_of(card.text)).body
    assert [type(statement) for statement in statements] == [
        ast.Import,
        ast.ImportFrom,
        ast.ImportFrom,
        ast.Assign,
        ast.Assign,
    ]
    expected = name if place == "base model" else "BASE_MODEL"
    assert statements[3].value.args[0].value == expected and statements[4].value.args[1].value == "ADAPTER"
    assert card.data.get("base_model") in (None, expected) and card.data.get("license") is None
    block = card.text.split(BEGIN)[1]
    loaded = json.loads(block.split("```json\n")[1].split("\n```")[0])
    assert all(loaded[option] == value for option, value in options.items())
    assert not any("<" in line for line in block.splitlines() if line != END)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_the_snippet_is_five_statements_whatever_the_names(name):
    for snippet in (
        loading_snippet("a", LoRAMoEConfig(base_model_name_or_path=name or "x").to_dict()),
        loading_snippet("a", LoRAMoEConfig(revision=name).to_dict()),
        loading_snippet(name, LoRAMoEConfig().to_dict()),
    ):
        assert len(snippet.splitlines()) == 6
        statements = ast.parse(snippet).body
        assert len(statements) == 5
    assert statements[4].value.args[1].value == name


def test_a_saved_adapter_of_a_hostile_base_model(tmp_path):
    model = loramoe()
    model.peft_config["default"].base_model_name_or_path = HOSTILE[3]
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert len(ast.parse(code_of(ModelCard.load(tmp_path / "README.md").text)).body) == 5
    assert PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == HOSTILE[3]
