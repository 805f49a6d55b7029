"""Text and JSON files."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_loramoe.reading import read_json, read_json_lines, read_text


pytestmark = pytest.mark.version_independent


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "file.jsonl"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_lines_of_any_editor(mark, end, write):
    path = write(mark + end.join([b'{"text": "\xc3\xa9\xe2\x80\xa8"}', b"", b"[1]"]) + end)
    assert list(read_json_lines(path)) == [(f"{path}, line 1", {"text": "\u00e9\u2028"}), (f"{path}, line 3", [1])]


def test_a_long_line(write):
    text = "x" * 10_000_000
    ((_, value),) = read_json_lines(write(json.dumps({"text": text}).encode()))
    assert value["text"] == text


def test_a_torn_line_is_left_out_even_within_a_character(write):
    path = write('{"text": "a"}\n{"text": "é'.encode()[:-1])
    assert list(read_json_lines(path, torn=True)) == [(f"{path}, line 1", {"text": "a"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": }', "line 2: no valid JSON"),
        (b'{"a": 1}\n{"a": "\xff"}', "line 2: the byte 0xff is no UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "line 1: the byte 0xff is no UTF-8"),
        (b'{"a": 1}\n' + b"[" * 200_000, "line 2: no valid JSON .it is nested too deeply"),
        (b'{"a": 1}\n' + b"1" * 10_000, "line 2: no valid JSON .*digits"),
        (b'{"a": 1}\n{"a": "\\uD800"}', "line 2: a text holds half of a surrogate pair"),
        (b'{"a": 1} {"a": 2}', "line 1: no valid JSON"),
    ],
)
def test_what_cannot_be_read_is_named(content, message, write):
    path = write(content)
    with pytest.raises(ValueError, match=message) as raised:
        list(read_json_lines(path))
    assert str(path) in str(raised.value)


def test_the_line_of_an_error_in_a_json_file(write):
    with pytest.raises(ValueError, match="line 3: no valid JSON"):
        read_json(write(b'[\n{"a": 1},\n{"a": }\n]'))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"{tmp_path} cannot be read"):
        read_text(tmp_path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.jsonl cannot be read: No such file"):
        read_text(tmp_path / "missing.jsonl")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=60) | st.text(alphabet='{}[]",:\\u0d8\n\r1e- ', max_size=60).map(str.encode))
def test_random_files_are_read_or_refused_in_our_words(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "random.jsonl"
    path.write_bytes(content)
    try:
        for _, value in read_json_lines(path):
            json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:
        assert str(path) in str(error)
