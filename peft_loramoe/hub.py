"""Whether a model, adapter or data set is there, asked once instead of minutes of retries."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id


TIMEOUT = 10  # seconds


def check_source(name: str, file: str, revision: str | None = None, repo_type: str = "model", what: str = "") -> None:
    """Check that a folder or a Hub repository exists. What it holds is for its reader to check.

    Args:
        name: a folder or the id of a repository. What cannot be such an id is not asked for.
        file: a file of the repository, which is looked for in the cache and on the Hub.
        revision: branch, tag or commit of the repository.
        repo_type: "model", also for adapters, or "dataset".
        what: begins the message, such as the option that names the source.

    Raises:
        FileNotFoundError: there is neither, or the Hub cannot be reached; the message says which.

    Example:
        >>> check_source("./adapter", "adapter_config.json")
        Traceback (most recent call last):
        FileNotFoundError: there is no such folder.
    """
    if Path(name).exists():
        return
    begin = f"{what}: " if what else ""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"{begin}there is no such folder.") from None
    try:
        _ask_the_hub(name, file, revision, repo_type)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{begin}{error}") from error


def parse_dataset(source: str, what: str, prefix: str = "") -> tuple[str, str | None, str | None]:
    """Take apart how a data set of the Hub is named on the command line, NAME[:CONFIG[:SPLIT]].

    Args:
        source: what is to be taken apart.
        what: begins the message: the option or argument that names the data set.
        prefix: what stands before NAME there, for the message.

    Returns:
        The name, the configuration and the split; None for what is left out.

    Raises:
        ValueError: there is no name, or there are more than three parts.

    Example:
        >>> parse_dataset("allenai/c4:en", "--dataset allenai/c4:en")
        ('allenai/c4', 'en', None)
    """
    name, *rest = source.split(":")
    if not name.strip("/") or len(rest) > 2:
        raise ValueError(f"{what} must have the form {prefix}NAME[:CONFIG[:SPLIT]].")
    config, split = (part or None for part in (*rest, "", "")[:2])
    return name, config, split


@lru_cache
def _ask_the_hub(name: str, file: str, revision: str | None, repo_type: str) -> None:
    if try_to_load_from_cache(name, file, revision=revision, repo_type=repo_type) is not None:
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision, repo_type=repo_type), timeout=TIMEOUT)
    except RevisionNotFoundError:
        raise FileNotFoundError(f"the Hub's repository has no revision '{revision}'.") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            "there is neither such a folder nor a repository of this name on the Hub that you may read; for a private "
            "or gated one, log in with `hf auth login`."
        ) from None
    except (EntryNotFoundError, HfHubHTTPError):  # for the reader
        return
    except Exception as error:  # those of the HTTP library have no common base in all versions
        raise FileNotFoundError(
            "there is no such folder, and the Hub cannot be reached to look for a repository of this name "
            f"({type(error).__name__})."
        ) from error
