from huggingface_hub import ModelCard

from peft_loramoe import LoRAMoEConfig
from peft_loramoe.card import BEGIN, loading_snippet, write_card
from tiny import loramoe


def test_a_saved_adapter_tells_how_to_load_it(tmp_path):
    model = loramoe()
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"loramoe", "mixture-of-experts", "peft_loramoe"} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    assert loading_snippet("ADAPTER", model.peft_config["default"]) in card.text
    assert '"num_experts": 6' in card.text


def test_saving_again_replaces_the_block_and_keeps_the_rest(tmp_path):
    path = tmp_path / "README.md"
    write_card(str(path), LoRAMoEConfig(r=4))
    path.write_text(path.read_text().replace("library_name: peft", "library_name: peft\nlicense: mit") + "\nMy own notes.\n")
    write_card(str(path), LoRAMoEConfig(r=5))
    text = path.read_text()
    assert "My own notes." in text and "license: mit" in text
    assert text.count(BEGIN) == 1 and '"r": 5' in text and '"r": 4' not in text


def test_the_snippet_loads_the_class_of_the_task_type():
    snippet = loading_snippet("me/adapter", LoRAMoEConfig(task_type="SEQ_CLS", base_model_name_or_path="base"))
    assert snippet.startswith("import peft_loramoe")
    assert 'AutoModelForSequenceClassification.from_pretrained("base")' in snippet
    assert 'PeftModel.from_pretrained(base_model, "me/adapter")' in snippet


def test_a_local_base_model_is_not_named_to_the_hub(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"---\nbase_model: {tmp_path}\ntags:\n- base_model:adapter:{tmp_path}\n- lora\n---\n\nText.\n")
    write_card(str(path), LoRAMoEConfig())
    data = ModelCard.load(path).data
    assert data.base_model is None
    assert sorted(data.tags) == ["lora", "loramoe", "mixture-of-experts", "peft_loramoe"]
