"""A `vllm serve` process and the openai client. Needs vLLM: `make test-vllm` installs it and runs these tests."""

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import serving_cases as cases
import serving_server
from serving_server import BASE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason=f"vLLM is not installed; {cases.INSTALL}"
)
DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
REQUESTS = 32
OPTIONS = {"a": {}, "b": cases.OPTIONS["retain"], "c": cases.OPTIONS["attention"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def model(folder):
    path = cases.tiny_model(folder / "model")
    words = Tokenizer(WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(folder, model):
    """Three mixtures; the server has two slots."""
    return {
        name: cases.save_adapter(model, folder / name, options, seed=i)
        for i, (name, options) in enumerate(OPTIONS.items())
    }


@pytest.fixture(scope="module")
def references(model, adapters):
    """What answers in PEFT, by name."""
    return {BASE: cases.load(model), **{name: cases.with_adapter(model, path) for name, path in adapters.items()}}


@pytest.fixture(scope="module")
def server(folder, model, adapters):
    started = {name: adapters[name] for name in "ab"}
    options = ("--max-loras", "2", "--max-lora-rank", "64", "--max-num-seqs", "8")
    with serving_server.serve(model, started, folder / "log", *options) as running:
        yield running


@pytest.fixture
def with_c(server, adapters):
    """The third adapter, loaded while the server runs."""
    assert server.load("c", adapters["c"]) == ""
    yield
    server.unload("c")


def assert_greedy(reference, prompt, tokens):
    assert len(tokens) == cases.NEW_TOKENS
    assert serving_server.is_greedy(reference, prompt, tokens)


@pytest.mark.parametrize("name", ["a", "b", BASE])
def test_a_name_asks_for_an_adapter_or_the_base_model(name, server, references):
    for prompt in cases.PROMPTS:
        assert_greedy(references[name], prompt, server.tokens(name, prompt))


def test_the_adapters_are_told_apart(server):
    """Or the comparisons with PEFT would show little."""
    assert len({tuple(server.tokens(name, cases.PROMPTS[0])) for name in ("a", "b", BASE)}) == 3


def test_streaming_gives_the_same_text(server):
    whole = server.ask("a", cases.PROMPTS[0]).choices[0].text
    parts = [chunk.choices[0].text for chunk in server.ask("a", cases.PROMPTS[0], stream=True)]
    assert len(parts) > 1
    assert "".join(parts) == whole


def test_requests_at_once_get_the_answers_of_their_adapters(server, references, with_c):
    """More adapters than slots, and more requests than fit in a batch."""
    names = ["a", BASE, "b", "c"]
    asked = [(names[i % 4], cases.PROMPTS[i % 3]) for i in range(REQUESTS)]
    with ThreadPoolExecutor(REQUESTS) as threads:
        answers = list(threads.map(lambda request: server.tokens(*request), asked))
    for (name, prompt), tokens in zip(asked, answers):
        assert_greedy(references[name], prompt, tokens)


def test_an_adapter_is_loaded_and_unloaded_over_http(server, adapters, references):
    from openai import NotFoundError

    assert server.load("c", adapters["c"]) == ""
    assert "c" in server.models()
    assert_greedy(references["c"], cases.PROMPTS[0], server.tokens("c", cases.PROMPTS[0]))
    assert server.unload("c") == ""
    with pytest.raises(NotFoundError):
        server.tokens("c", cases.PROMPTS[0])


def test_a_damaged_adapter_is_refused_and_the_server_answers_on(server, adapters, references, tmp_path):
    damaged = shutil.copytree(adapters["a"], tmp_path / "damaged")
    tensors = damaged / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    assert "incomplete or damaged" in server.load("damaged", damaged)
    assert "damaged" not in server.models()
    assert_greedy(references["a"], cases.PROMPTS[1], server.tokens("a", cases.PROMPTS[1]))


def test_a_rank_that_is_too_small_is_refused_with_the_number_to_set(server, model, references, tmp_path):
    large = cases.save_adapter(model, tmp_path, {"r": 16, "num_experts": 8})
    assert "start vLLM with --max-lora-rank 256" in server.load("large", large)
    assert_greedy(references["b"], cases.PROMPTS[1], server.tokens("b", cases.PROMPTS[1]))


def code_of_docs(language, server, adapters):
    """What docs/serving.md says to ask a server, for this one."""
    text = DOCS.read_text(encoding="utf-8")
    blocks = [code for code in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if "localhost" in code]
    assert blocks
    names = {"http://localhost:8000": server.address, '"tasks"': '"a"', "/path/of/adapter": str(adapters["c"])}
    for name, here in names.items():
        blocks = [block.replace(name, here) for block in blocks]
    return blocks


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_commands_of_the_docs(server, adapters):
    for command in code_of_docs("bash", server, adapters):
        outputs = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, check=True).stdout
        assert outputs and '"error"' not in outputs


def test_the_client_of_the_docs(server, adapters, capsys):
    for code in code_of_docs("python", server, adapters):
        exec(code, {})
        whole, streamed = capsys.readouterr().out.split("\n")
        assert whole == streamed != ""
