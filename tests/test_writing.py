import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from peft_loramoe.writing import write_whole


pytestmark = pytest.mark.version_independent


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "result.json"
    write_whole(path, "one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    path.chmod(0o640)
    write_whole(path, "two \u00e9")
    assert path.read_text(encoding="utf-8") == "two \u00e9" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_full_disk_leaves_the_old_result(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_target_of_a_link_is_replaced(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"


def test_devices_are_written_to():
    write_whole("/dev/null", "text")
    assert not os.path.isfile("/dev/null")


def test_names_as_long_as_the_file_system_takes(tmp_path):
    write_whole(tmp_path / ("x" * 250), "text")
    assert (tmp_path / ("x" * 250)).read_text() == "text"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"result\.json cannot be written: the folder .*missing does not exist"
    ):
        write_whole(tmp_path / "missing" / "result.json", "{}")


def test_of_two_writers_one_wins_whole(tmp_path):
    texts = [letter * 100_000 for letter in "abcd"]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda text: write_whole(tmp_path / "file", text), texts))
    assert (tmp_path / "file").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
