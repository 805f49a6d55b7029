"""Whether a model or adapter is there (`peft_loramoe.hub`), without a network."""

import pytest
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from peft_loramoe import hub


@pytest.fixture
def asked(monkeypatch):
    """The addresses that were asked for, and the error to answer with."""
    addresses, answer = [], {}

    def ask(address, timeout):
        addresses.append(address)
        if answer:
            raise answer["error"]

    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    hub._ask_the_hub.cache_clear()
    yield addresses, answer
    hub._ask_the_hub.cache_clear()


@pytest.mark.parametrize("name", ["./model", "../model", "/nowhere/model", "a/b/c", "model/"])
def test_what_can_only_be_a_folder_is_not_asked_for(name, asked):
    with pytest.raises(FileNotFoundError, match=r"^there is no such folder\.$"):
        hub.check_source(name, "config.json")
    assert asked[0] == []


def test_a_folder_is_not_asked_for(asked, tmp_path):
    hub.check_source(str(tmp_path), "config.json")
    assert asked[0] == []


def test_a_repository_is_asked_for_once(asked):
    for _ in range(2):
        hub.check_source("someone/model", "config.json", "v1")
    hub.check_source("someone/data", "README.md", repo_type="dataset")
    assert [address.partition("/someone/")[2] for address in asked[0]] == [
        "model/resolve/v1/config.json",
        "data/resolve/main/README.md",
    ]
    assert "/datasets/someone/" in asked[0][1]


ERRORS = {
    "no repository": (RepositoryNotFoundError, "neither such a folder nor a repository of this name.*hf auth login"),
    "no revision": (RevisionNotFoundError, "has no revision 'v1'"),
    "no connection": (ConnectionError, r"the Hub cannot be reached to look for .* \(ConnectionError\)"),
}


@pytest.mark.parametrize(("kind", "message"), ERRORS.values(), ids=ERRORS)
def test_what_the_hub_answers_is_said(kind, message, asked):
    asked[1]["error"] = kind.__new__(kind)  # their arguments depend on the version
    with pytest.raises(FileNotFoundError, match=message):
        hub.check_source("someone/model", "config.json", "v1")


def test_a_repository_without_the_file_is_there(asked):
    asked[1]["error"] = EntryNotFoundError.__new__(EntryNotFoundError)
    hub.check_source("someone/model", "config.json")
