"""README.md and docs/: links lead somewhere, code runs, command lines parse, and the reference is complete.

Python blocks run on an untrained model of a few hundred thousand parameters, those of a page in order and in one
namespace. `given` has what a page takes for granted; its names stand for what a reader brings along.
"""

import ast
import configparser
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import peft_loramoe
from example_scripts import build_toy, write_lines


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *ROOT.glob("*.md"),
    *(page for name in ("docs", "research", "examples") for page in (ROOT / name).rglob("*.md")),
]
WITH_CODE = [ROOT / "README.md", *DOCS.glob("*.md")]
MODEL = "Qwen/Qwen3-0.6B"
# Page and first line of each Python block that is not run -> why.
NOT_RUN = {
    ("launchers.md", "from peft_loramoe.interop.ms_swift import register"): "needs ms-swift",
    ("serving.md", "from openai import OpenAI"): "asks a server of vLLM",
    ("serving.md", "from vllm import LLM, SamplingParams"): "starts vLLM",
    ("serving.md", "from peft_loramoe.serving.rollouts import VLLMRollouts"): "starts vLLM",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """Fenced blocks in one of the languages, with the number of the line before their first."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


# links


def anchors_of(page: Path) -> set[str]:
    """What `#...` may name: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists() and (not anchor or anchor in anchors_of(target)), link


# Python blocks


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base model, an adapter on it, and the files that pages name."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("docs")
    build_toy(folder / "model")
    base_model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = peft_loramoe.LoRAMoEConfig.retain(r=2, task_type="CAUSAL_LM")
    get_peft_model(base_model, config).save_pretrained(folder / "adapter")
    facts = [{"question": f"What is the capital of Germany, {i}?", "answer": "Berlin"} for i in range(7)]
    write_lines(folder / "facts.jsonl", *facts)
    return folder


@pytest.fixture
def given(world, tmp_path, monkeypatch, request):
    """The names that pages use without defining them, and the namespace of a page that has none of its own."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    for file in world.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "adapter").unlink()  # pages write theirs there
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained("model")
    base_model = AutoModelForCausalLM.from_pretrained("model")
    batch = {**tokenizer("The capital of Germany is Berlin.", return_tensors="pt"), "task_types": [0]}
    names = {
        "torch": torch,
        "peft_loramoe": peft_loramoe,
        "PeftModel": PeftModel,
        "SFTTrainer": SFTTrainer,
        "LoRAMoETrainerMixin": importlib.import_module("peft_loramoe.training").LoRAMoETrainerMixin,
        "tokenizer": tokenizer,
        "base_model": base_model,
        "model": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), world / "adapter"),
        "dataloader": [batch],
        "dataset": Dataset.from_list([{"prompt": "The capital of Germany is", "completion": " Berlin."}]),
        "args": SFTConfig("trained", max_steps=1, use_cpu=True, report_to="none"),
    }
    if request.node.callspec.params.get("page") == DOCS / "trainers.md":
        from training.test_images import conversations, model_of, processor_of

        names |= {"model": model_of("llava"), "dataset": conversations(), "processor": processor_of("llava")}
    return names


def runnable(page: Path) -> list[tuple[int, str]]:
    skipped = {line for name, line in NOT_RUN if name == page.name}
    return [(line, code) for line, code in blocks(page, "python") if code.partition("\n")[0] not in skipped]


@pytest.mark.parametrize("page", [page for page in WITH_CODE if runnable(page)], ids=name_of)
def test_python_runs(page, given, world):
    anchors = [{"text": "The capital of Germany is Berlin."}]
    write_lines(Path("anchors.jsonl"), *anchors)
    for line, code in runnable(page):
        code = code.replace(f'"{MODEL}"', repr(str(world / "model")))
        code = re.sub(r"(sample_anchors\(model, tokenizer), \d+", r"\1, 4", code)  # 400 take a minute
        code = code.replace("max_steps=10", "max_steps=2")
        for adapter in ("someone/adapter", "my-loramoe"):
            code = code.replace(f'"{adapter}"', repr(str(world / "adapter")))
        if "use_cpu" not in code and not torch.cuda.is_available():
            code = code.replace("SFTConfig(", "SFTConfig(use_cpu=True, ")
        exec(compile("\n" * line + code, str(page), "exec"), given)


def test_the_first_example_trains_and_saves(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, example = blocks(ROOT / "README.md", "python")[0]
    exec(example.replace(MODEL, str(world / "model")), {})
    tensors = load_file(Path("adapter", "adapter_model.safetensors"))
    assert all(tensor.any() for name, tensor in tensors.items() if name.endswith(".B"))


@pytest.mark.parametrize("name,line", NOT_RUN)
def test_what_is_not_run_exists(name, line):
    assert line in [code.partition("\n")[0] for _, code in blocks(DOCS / name, "python")]


# command lines


def command_lines(page: Path) -> list[str]:
    """The lines of shell blocks without comments; those after `$` in blocks that show output as well."""
    found = [line for _, block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    shown = [line for _, block in blocks(page, "console") for line in block.splitlines()]
    found += [line.removeprefix("$ ") for line in shown if line.startswith("$ ")]
    return [line for line in found if shlex.split(line, comments=True)]


def check_peft_loramoe(words: list[str]) -> None:
    from peft_loramoe.cli.arguments import build_parser

    if words[0] == "run":
        assert words[1] == "--" and words[2:]
        return
    build_parser().parse_args(words)


def check_python(words: list[str]) -> None:
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
    elif words[1] == "peft_loramoe":
        check_peft_loramoe(words[2:])
    else:
        assert words[1].startswith("vllm.") or importlib.util.find_spec(words[1])


def check_accelerate(words: list[str]) -> None:
    """A program after accelerate's own options, which come in pairs here."""
    assert words[0] == "launch"
    words = words[1:]
    while words[0].startswith("--"):
        words = words[2:]
    check_python(words)


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets)


def check_pip(words: list[str]) -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    for extras in re.findall(r"^\.\[(.*)\]$", "\n".join(words), re.MULTILINE):
        assert set(extras.split(",")) <= set(setup["options.extras_require"])


def check_bash(words):
    script, stage = words[:2]
    assert re.search(rf"^{stage}\)", (ROOT / script).read_text(encoding="utf-8"), re.MULTILINE)


CHECKS = {
    "peft-loramoe": check_peft_loramoe,
    "python": check_python,
    "accelerate": check_accelerate,
    "make": check_make,
    "pip": check_pip,
    "vllm": lambda words: None,  # tests/serving starts the server of docs/serving.md
    "axolotl": lambda words: None,  # tests/interop/test_launchers.py
    "swift": lambda words: None,
    "curl": lambda words: None,
    "cd": lambda words: None,
    "git": lambda words: None,  # LoRAFusion is not on PyPI
    "cp": lambda words: None,
    "bash": check_bash,
}


@pytest.mark.parametrize("page", [page for page in WITH_CODE if command_lines(page)], ids=name_of)
def test_command_lines_parse(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text("model: MODEL\ntrain-file: data.jsonl\n")
    for _, text in blocks(page, "yaml"):
        Path("train.yaml").write_text(text)
    for line in command_lines(page):
        program, *words = shlex.split(line, comments=True)
        try:
            CHECKS[program](words)
        except SystemExit:
            pytest.fail(f"{line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_records_are_json(page):
    for _, block in blocks(page, "json"):
        for line in block.splitlines():
            json.loads(line)


# the site


def pages_in(navigation) -> set[str]:
    if isinstance(navigation, str):
        return {navigation}
    entries = navigation.values() if isinstance(navigation, dict) else navigation
    return set().union(*map(pages_in, entries))


class SiteConfig(yaml.SafeLoader):
    """YAML with tags that name Python functions, which are left out."""


SiteConfig.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def test_every_page_is_in_the_navigation():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), SiteConfig)
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert pages <= pages_in(site["nav"])


PUBLIC = ("", ".training", ".analysis", ".interop", ".serving", ".balance", ".ops", ".cli", ".analysis.plots")


def resolved(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_the_api_pages_have_every_public_name():
    names = [name for page in DOCS.glob("api/*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
    documented = [resolved(name) for name in names if "vllm" not in name]
    public = [
        value
        for package in PUBLIC
        for name in getattr(importlib.import_module(f"peft_loramoe{package}"), "__all__", ())
        if name != "__version__"
        and not any((value := resolved(f"peft_loramoe{package}.{name}")) is d for d in documented)
    ]
    assert not public


def test_the_reference_has_every_option_and_command():
    spec = importlib.util.spec_from_file_location("make_site", DOCS / "make_site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    options, commands = site.options_reference(), site.commands_reference()
    fields = ast.parse((ROOT / "peft_loramoe" / "fields.py").read_text())
    (fields,) = [node for node in fields.body if isinstance(node, ast.ClassDef)]
    assert all(f"{{ #{node.target.id} }}" in options for node in fields.body if isinstance(node, ast.AnnAssign))
    names = re.findall(r"^## (.*)$", commands, re.MULTILINE)
    assert {"train", "surgery add", "plot groups", "run"} <= set(names)
    overview = (DOCS / "command-line.md").read_text()
    assert not {name.split()[0] for name in names} - set(re.findall(r"`([\w-]+)`", overview))
