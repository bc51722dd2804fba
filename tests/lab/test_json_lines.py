"""Records from a user's file."""

import pytest

from steelyard.lab.json_lines import read_json_lines


def write(tmp_path, text: str, *, encoding: str = "utf-8"):
    path = tmp_path / "records.jsonl"
    path.write_text(text, encoding=encoding)
    return path


def test_records_come_back_and_empty_lines_do_not_count(tmp_path):
    path = write(tmp_path, '{"prompt": "é"}\n\n{"prompt": "b", "more": 1}\n')
    assert read_json_lines(path, required=("prompt",)) == [
        {"prompt": "é"},
        {"prompt": "b", "more": 1},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": 1}\n{oops\n', "line 2 of .* is not JSON"),
        ('{"prompt": 1}\n[1]\n', "line 2 of .* must be a JSON object, got list"),
        ('{"prompt": 1}\n\n{"text": 1}\n', "line 3 of .* lacks the field 'prompt'; it has: text"),
        ("{}\n", "it has: none"),
        ("\n", "holds no record"),
        ("[" * 100_000, "line 1 of .* is not JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_json_lines(write(tmp_path, text), required=("prompt",))


def test_a_missing_file_and_other_encodings_are_said(tmp_path):
    with pytest.raises(ValueError, match="no file at"):
        read_json_lines(tmp_path / "none.jsonl", required=())
    with pytest.raises(ValueError, match="not UTF-8"):
        read_json_lines(write(tmp_path, '{"a": "é"}', encoding="latin-1"), required=())
