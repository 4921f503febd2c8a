"""A damaged line is one error with file, line and reason, whatever the damage."""

import re

import pytest

from nanochat_hf.eval.core import read_jsonl

FIELDS = {"text": str, "gold": int}
GOOD = b'{"text": "a", "gold": 1}\n'


@pytest.mark.parametrize(
    "line,reason",
    [
        (b'{,"text": "a"}', "no JSON: .* at column 2"), (b'{"text": "a", "go', "no JSON"),
        (b'{"text": "a\xff", "gold": 1}', "no UTF-8 at byte 12"), (b"[1]", "no JSON object"),
        (b'{"text": "a"}', "no field 'gold'"), (b'{"text": null, "gold": 1}', "'text' is null"),
        (b'{"text": "a", "gold": "1"}', "'gold' is \"1\""),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named_with_its_file_and_number(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 3: {reason}") as error:
        read_jsonl(path, FIELDS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.jsonl is empty"):
        read_jsonl(tmp_path / "rows.jsonl", FIELDS)


def test_other_line_ends_a_byte_order_mark_and_separators_inside_json_do_no_harm(tmp_path):
    text = '{"text": "a\u2028b", "gold": 1, "more": []}\r\n\r\n{"text": "c", "gold": 0}'
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [row["text"] for row in read_jsonl(tmp_path / "rows.jsonl", FIELDS)] == ["a\u2028b", "c"]
