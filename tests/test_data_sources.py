"""Rows from files, folders, hub repositories and memory, and the errors that name their lines."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pandas
import pytest

from pipeline.config.schema import Data, SFTConfig
from pipeline.data import strict_json
from pipeline.data.forms import load_demonstrations, load_prompts
from pipeline.data.problems import Report
from pipeline.data.rankings import load_rankings
from pipeline.data.sources import hub_rows, read_rows, rows_from_memory
from pipeline.errors import UserError
from pipeline.handoff.lineage import inputs_of, missing

GOOD = {"instruction": "Add 1 and 2.", "output": "3"}


def write_lines(path, *lines):
    """A JSONL file of objects or of raw lines (bytes)."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return Data(path=str(path))


def failure(load, source):
    """The message of the UserError that loading raises."""
    with pytest.raises(UserError) as error:
        load(source)
    return str(error.value)


def test_jsonl_rows_know_their_lines_and_blank_lines_count(tmp_path):
    data = write_lines(
        tmp_path / "a.jsonl", GOOD, b"", b"  \r", {"instruction": "b", "output": "c"}
    )
    rows = read_rows(data)
    assert [row.where for row in rows] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:4"]
    assert rows[0].values == GOOD


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"instruction": "a", "output": ', "bad JSON"),
        (b'{"instruction": "a"} {}', "text after the row"),
        (b'["a", "b"]', "a list where a row"),
        (b'"a"', "a text where a row"),
        (b'{"instruction": "a", "instruction": "b", "output": "c"}', "duplicate key `instruction`"),
        (b'{"instruction": "a", "output": {"x": 1, "x": 2}}', "duplicate key `x`"),
        (b'{"instruction": "a", "output": "\\ud83d"}', "lone surrogate"),
        (b'{"instruction": "a", "output": "b", "id": ["\\uDE00"]}', "lone surrogate"),
        (b'{"instruction": "a", "output": "\xff"}', "not UTF-8: byte 0xff"),
        (b'{"instruction": "a", "output": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"output": "a"}', "no prompt"),
        (b'{"instruction": "a"}', "no reply to `instruction`"),
        (b'{"instruction": "a", "ouput": "b"}', "is `ouput` meant?"),
        (b'{"instruction": "a", "output": null}', "`output` is null"),
        (b'{"instruction": "a", "output": true}', "`output` is a boolean"),
        (b'{"instruction": "a", "output": NaN}', "`output` is a number"),
        (b'{"instruction": ["a"], "output": "b"}', "`instruction` is a list"),
        (b'{"instruction": "a", "output": "b", "outptu": "c"}', "extra key `outptu`, in 1 of 4"),
        (b"[" * 100_000, "bad JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "bad JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, reason):
    message = failure(
        load_demonstrations, write_lines(tmp_path / "a.jsonl", GOOD, GOOD, line, GOOD)
    )
    first, *_, last = message.splitlines()
    assert first.startswith(f"{tmp_path}/a.jsonl:3: ")
    assert reason in first
    assert "1 problem in 4 rows; mend them" in last and "bad_rows" in last


def test_a_line_over_the_limit_is_named_and_the_next_one_read(tmp_path):
    long = b'{"instruction": "' + b"a" * 10_000_001 + b'", "output": "b"}'
    message = failure(read_rows, write_lines(tmp_path / "a.jsonl", GOOD, long, b"{", GOOD))
    assert f"{tmp_path}/a.jsonl:2: a line of more than 10 MB" in message
    assert f"{tmp_path}/a.jsonl:3: bad JSON" in message
    assert "2 problems in 4 rows" in message


def test_twenty_problems_are_shown_in_order_and_all_are_counted(tmp_path):
    bad = [{"instruction": "a", f"key{number}": 1} for number in range(33)]
    message = failure(
        load_demonstrations, write_lines(tmp_path / "a.jsonl", *bad, GOOD)
    ).splitlines()
    assert [int(line.split(":")[1]) for line in message[:20]] == list(range(1, 21))
    assert message[20] == "... and 13 more"
    assert message[21].startswith(f"{tmp_path}/a.jsonl: 33 problems in 34 rows; mend them")
    assert len(message) == 22


def test_a_reason_that_many_rows_share_does_not_hide_the_others(tmp_path):
    bad = [b"{" if number != 30 else b'{"instruction": "a"}' for number in range(33)]
    message = failure(
        load_demonstrations, write_lines(tmp_path / "a.jsonl", *bad, GOOD)
    ).splitlines()
    assert [int(line.split(":")[1]) for line in message[:4]] == [1, 2, 3, 31]
    assert "no reply to `instruction`" in message[3]
    assert message[4] == "... and 29 more"


def test_keys_shared_by_many_rows_are_no_strays(tmp_path):
    rows = [GOOD | {"id": 1}, GOOD | {"id": 2}, GOOD, GOOD]
    assert len(load_demonstrations(write_lines(tmp_path / "a.jsonl", *rows))) == 4


def test_text_survives_as_it_is(tmp_path):
    texts = [
        "中文标点。「」",
        "emoji 👩‍👩‍👧 \U0001f600",
        "مرحبا שלום",
        "a\u2028b\u2029c\x85d",
        " spaced \n",
    ]
    rows = [{"instruction": text, "output": text} for text in texts]
    escaped = write_lines(tmp_path / "a.jsonl", *rows)
    raw = write_lines(
        tmp_path / "b.jsonl", *[json.dumps(row, ensure_ascii=False).encode() for row in rows]
    )
    for data in (escaped, raw):
        assert [d.messages[1]["content"] for d in load_demonstrations(data)] == texts


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())
    assert read_rows(lines)[0].values == read_rows(Data(path=str(tmp_path / "b.json")))[0].values


def test_json_array_items_are_numbered(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"instruction": "a", "output": "b"},\n {"output": "c", "output": "d"}, 7]')
    message = failure(read_rows, Data(path=str(path)))
    assert f"{path}: item 2: duplicate key `output`" in message
    assert f"{path}: item 3: a number where a row" in message
    path.write_text(json.dumps([GOOD, GOOD], indent=1))
    assert [row.where for row in read_rows(Data(path=str(path)))] == [
        f"{path}: item 1",
        f"{path}: item 2",
    ]


@pytest.mark.parametrize("text", ["[{}", "[{} {}]", '[{"a": }]', "[{},"])
def test_a_broken_json_array_is_an_error(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert "bad JSON" in failure(read_rows, Data(path=str(path)))


def test_lines_under_a_json_ending_are_rows_and_one_object_is_not(tmp_path):
    path = tmp_path / "a.json"
    write_lines(path, GOOD, GOOD)
    assert [row.where for row in read_rows(Data(path=str(path)))] == [f"{path}:1", f"{path}:2"]
    for value in ({"train": [GOOD]}, {"data": ["a"]}, GOOD):
        path.write_text(json.dumps(value, indent=2))
        assert "one object" in failure(read_rows, Data(path=str(path)))
    write_lines(path, {"id": 1, "data": ["q", "a"]}, {"id": 2, "data": ["q", "a"]})  # UltraChat's
    assert len(read_rows(Data(path=str(path)))) == 2


@pytest.mark.parametrize("space", [None, 1])
@pytest.mark.parametrize("name", ["data", "rows"])
def test_rows_may_lie_in_an_object(tmp_path, name, space):
    path = tmp_path / "a.json"
    wrapper = {"version": 1.5, "about": {"data": []}, name: [GOOD, GOOD], "license": "mit"}
    path.write_text("\ufeff\r\n" + json.dumps(wrapper, indent=space))
    rows = read_rows(Data(path=str(path)))
    assert [row.where for row in rows] == [f"{path}: item 1", f"{path}: item 2"]
    assert rows[0].values == GOOD


@pytest.mark.parametrize("size", [1, 7, 1_000_000])
def test_what_follows_the_rows_of_a_json_file_is_told(tmp_path, monkeypatch, size):
    monkeypatch.setattr(strict_json, "CHUNK", size)
    path, row = tmp_path / "a.json", json.dumps(GOOD)
    for text in ("[%s]\n[%s]", "[%s]\n, %s", "[%s]\n]%.0s", '{"data": [%s]\n, oops%.0s'):
        path.write_text(text % (row, row))
        assert f"{path}:2: bad JSON behind the array" in failure(read_rows, Data(path=str(path)))
    for rest in ("", "}\n{", ', "x": 1\n "y": 2}', ', "x"\n}', ', "x": [1,\n}'):
        path.write_text(f'{{"data": [{row}]{rest}')
        assert "bad JSON behind the array" in failure(read_rows, Data(path=str(path)))
    path.write_text(f'{{"data": [{row}], "n": -1.25e+10, "rows": [{row}]}} \n')
    notes = []
    assert len(load_demonstrations(Data(path=str(path)), notes)) == 1
    told = "a.json has rows under `data` and `rows`; those of `data` are read"
    assert notes == [f"{path}: {told}"]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_json_array_is_read_in_parts(tmp_path, monkeypatch, size):
    rows = [
        {"text": text, "n": 1.5, "o": {"x": [n]}}
        for n, text in enumerate(["你\u2028好", "]}", '"', ""])
    ]
    monkeypatch.setattr(strict_json, "CHUNK", size)
    path = tmp_path / "a.json"
    for space in (None, 2):
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=space))
        assert [row.values for row in read_rows(Data(path=str(path)))] == rows
    path.write_bytes(b'[{"text": "a"},\n {"text": "\xff"}]')
    assert f"{path}:2: not UTF-8: byte 0xff; recode" in failure(read_rows, Data(path=str(path)))


# --- tables and packed files ----------------------------------------------------------------------


def table(path, text):
    path.write_bytes(text.encode())
    return Data(path=str(path))


@pytest.mark.parametrize(("ending", "by"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_table_is_rows_of_texts(tmp_path, ending, by, line_end):
    lines = [
        by.join(["", "instruction", " input ", "output"]),
        by.join(["0", "a\u2028b", "", '"one""two"']),
        by.join(["1", f'"a{by}b"', '""', '"c\nd\n\ne"']),
        "",
        by.join(["2", "你好", "x", "再见"]),
    ]
    data = table(tmp_path / f"a.{ending}", "\ufeff" + line_end.join(lines) + line_end)
    rows = read_rows(data)
    assert [row.values for row in rows] == [
        {"instruction": "a\u2028b", "input": None, "output": 'one"two'},
        {"instruction": f"a{by}b", "input": None, "output": "c\nd\n\ne"},
        {"instruction": "你好", "input": "x", "output": "再见"},
    ]
    assert [row.where for row in rows] == [f"{data.path}:{n}" for n in (2, 3, 8)]
    assert len(load_demonstrations(data)) == 3


@pytest.mark.parametrize("by", [";", "\t"])
def test_a_csv_without_a_comma_in_its_header_is_read_by_what_it_has(tmp_path, by):
    text = f'\ufeff\r\n"prompt"{by}completion\r\n"a, b;c"{by}d, e\r\n'
    data, notes = table(tmp_path / "a.csv", text), []
    (item,) = load_demonstrations(data, notes)
    assert [turn["content"] for turn in item.messages] == ["a, b;c", "d, e"]
    assert notes == [f"{data.path}: a.csv has no comma in its header and is read by its {by!r}"]
    both = table(tmp_path / "b.csv", "prompt,completion,a;b\tc\nq,a,\n")
    assert list(read_rows(both)[0].values) == ["prompt", "completion", "a;b\tc"]
    one = table(tmp_path / "c.tsv", "a;b\nq;r\n")
    assert read_rows(one)[0].values == {"a;b": "q;r"}


def test_endings_in_capitals_are_known(tmp_path):
    for name in ("A.CSV", "b.Tsv", "C.JSONL"):
        by = "\t" if name == "b.Tsv" else ","
        text = json.dumps(GOOD) if name == "C.JSONL" else f"instruction{by}output\na{by}b\n"
        assert len(load_demonstrations(table(tmp_path / name, text))) == 1
    (tmp_path / "D.CSV.GZ").write_bytes(gzip.compress(b"instruction,output\na,b\n"))
    assert len(load_demonstrations(Data(path=str(tmp_path / "D.CSV.GZ")))) == 1
    assert len(load_demonstrations(Data(path=str(tmp_path)))) == 4


def test_a_pipe_is_no_plain_file(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    told = failure(read_rows, Data(path=str(tmp_path / "a.jsonl")))
    assert "a.jsonl: no plain file; rows are read more than once" in told


def test_a_table_holds_lists_as_json(tmp_path):
    text = 'prompt,responses,ranks\nq,"[""a"", ""b"", ""c""]","[2, 1, null]"\n'
    (found,) = load_rankings(table(tmp_path / "a.csv", text))
    assert (found.responses, found.ranks) == (["a", "b"], [2, 1])
    chat = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "[1]"}])
    quoted = '"' + chat.replace('"', '""') + '"'
    (item,) = load_demonstrations(table(tmp_path / "b.csv", f"messages\n{quoted}\n"))
    assert item.messages[1]["content"] == "[1]"
    (item,) = load_demonstrations(table(tmp_path / "c.csv", "prompt,completion\n[2],[1]\n"))
    assert item.messages[1]["content"] == "[1]"  # text is text
    told = failure(load_rankings, table(tmp_path / "d.csv", "prompt,responses,ranks\nq,a,1\n"))
    assert "d.csv:2: `responses` is a text, expected a list (in a table, as JSON)" in told


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt,completion\nq,a\nq\n", "a.csv:3: 1 cells, but 2 columns: prompt, completion"),
        ("prompt,completion\nq,a,b\n", "a.csv:2: 3 cells, but 2 columns"),
        ('prompt,completion\nq,a\nq,"a\nb\n', "a.csv:3: unexpected end of data"),
        ('prompt,completion\nq,"a"b\n', "a.csv:2: ',' expected after '\"'"),
        ("prompt,prompt\nq,a\n", "a.csv:1: two columns are named `prompt`"),
        ("prompt,completion\nq,\n", "a.csv:2: no reply to `prompt`: `completion` is null"),
        ("question,reply\nq,a\n", "a.csv:2: no prompt: none of messages"),
        ("question,reply\nq,a\n", "the row has question, reply (`columns` in the config"),
    ],
)
def test_a_faulty_table_is_told_by_line(tmp_path, text, reason):
    assert reason in failure(load_demonstrations, table(tmp_path / "a.csv", text))


def test_cells_in_another_encoding_are_told_by_line_and_may_be_allowed(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\nq,"x\ny\xff"\n' + b"q,a\n" * 99)
    told = failure(load_demonstrations, Data(path=str(path)))
    assert f"{path}:2: not UTF-8: byte 0xff at byte 2; recode the file" in told
    assert len(load_demonstrations(Data(path=str(path), bad_rows=0.01))) == 99
    path.with_suffix(".txt").write_bytes(b"a\nb\xe9\n")
    assert "a.txt:2: not UTF-8" in failure(load_prompts, Data(path=str(path.with_suffix(".txt"))))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_packed_file_is_read_like_an_open_one(tmp_path, name):
    texts = {
        "a.jsonl": json.dumps(GOOD) + "\n" + json.dumps(GOOD),
        "a.json": json.dumps({"data": [GOOD, GOOD]}),
        "a.csv": "instruction,output\nAdd 1 and 2.,3\nAdd 1 and 2.,3\n",
        "a.txt": "a\n\nb",
    }
    raw = gzip.compress(texts[name].encode())
    path = tmp_path / f"{name}.gz"
    path.write_bytes(raw)
    plain = table(tmp_path / name, texts[name])
    read = read_rows(Data(path=str(path)))
    assert [row.values for row in read] == [row.values for row in read_rows(plain)]
    assert read[1].where == read_rows(plain)[1].where.replace(name, f"{name}.gz")
    path.write_bytes(raw[: len(raw) - 9])
    assert "a whole gzip file" in failure(read_rows, Data(path=str(path)))
    assert inputs_of(SFTConfig(model="m/m", data=plain))
    (tmp_path / "b.parquet.gz").write_bytes(raw)
    assert "unknown kind of file" in failure(read_rows, Data(path=str(tmp_path / "b.parquet.gz")))


def test_parquet_rows_and_a_file_that_is_none(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [GOOD, {"instruction": "你好 👋", "output": "b"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = read_rows(Data(path=str(tmp_path / "a.parquet")))
    assert [row.values for row in read] == rows
    assert read[1].where == f"{tmp_path}/a.parquet: row 2"
    (tmp_path / "b.parquet").write_bytes(b"nothing of the kind")
    assert "b.parquet: not a readable Parquet file" in failure(
        read_rows, Data(path=str(tmp_path / "b.parquet"))
    )


def test_a_folder_is_its_files_in_order_and_a_list_is_read_in_its_own(tmp_path):
    write_lines(tmp_path / "b.jsonl", {"text": "b"})
    write_lines(tmp_path / "a.json", {"text": "a"})
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / "notes.txt").write_text("no rows either")
    (tmp_path / ".hidden.jsonl").write_text("{")
    read = read_rows(Data(path=str(tmp_path)))
    assert [row.values["text"] for row in read] == ["a", "b"]
    both = Data(path=[str(tmp_path / "b.jsonl"), str(tmp_path / "a.json")])
    assert [row.values["text"] for row in read_rows(both)] == ["b", "a"]


def test_paragraphs_of_a_text_file_are_rows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\nline\n\n \n\ntwo\xe2\x80\xa8still two")
    rows = read_rows(Data(path=str(tmp_path)))
    assert [row.values["text"] for row in rows] == ["one\nline", "two\u2028still two"]
    assert rows[1].where == f"{tmp_path}/a.txt:6"


def test_lines_of_a_text_file_without_a_blank_one_are_rows(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\nthree\n\n")
    rows = read_rows(Data(path=str(tmp_path / "a.txt")))
    assert [row.values["text"] for row in rows] == ["one", "two", "three"]
    assert rows[2].where == f"{tmp_path}/a.txt:3"
    assert "no blank line, so each of its lines is a row" in capsys.readouterr().out


def test_a_book_is_no_paragraph(tmp_path):
    for text in ("word " * 30_000, "a\n\n" + "a line\n" * 20_000):
        (tmp_path / "a.txt").write_text(text)
        message = failure(load_prompts, Data(path=str(tmp_path / "a.txt")))
        assert "characters without a blank line; part the texts" in message


def test_limit_reads_no_further(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", GOOD, GOOD, b"{")
    assert len(read_rows(data.model_copy(update={"limit": 2}))) == 2


@pytest.mark.parametrize("empty", [b"", b"\n\n"])
def test_an_empty_file_is_an_error(tmp_path, empty):
    (tmp_path / "a.jsonl").write_bytes(empty)
    assert "nothing to use" in failure(read_rows, Data(path=str(tmp_path / "a.jsonl")))


def test_a_missing_file_names_the_nearest_and_is_not_sought_on_the_hub(tmp_path, monkeypatch):
    write_lines(tmp_path / "train.jsonl", GOOD)
    message = failure(read_rows, Data(path=str(tmp_path / "trian.jsonl")))
    assert f"did you mean {tmp_path}/train.jsonl?" in message
    monkeypatch.chdir(tmp_path.parent)  # here `folder/trian` looks like owner/name
    assert "did you mean" in failure(read_rows, Data(path=f"{tmp_path.name}/trian"))
    assert "no such file" in failure(read_rows, Data(path="no/such/file.jsonl"))


def test_only_a_near_name_is_suggested(tmp_path):
    (tmp_path / "container_info.json").write_text("{}")
    for name in ("conv.json", "info/train.jsonl"):
        told = failure(read_rows, Data(path=str(tmp_path / name)))
        assert told.endswith(f"{tmp_path} has no `{name.partition('/')[0]}`")
    told = failure(read_rows, Data(path=str(tmp_path / "containerinfo.jsonl")))
    assert told.endswith(f"did you mean {tmp_path}/container_info.json?")


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "a.xlsx").write_text("a,b")
    assert "unknown kind of file" in failure(read_rows, Data(path=str(tmp_path / "a.xlsx")))
    assert "no .jsonl" in failure(read_rows, Data(path=str(tmp_path)))


def test_an_allowed_share_of_bad_rows_is_dropped_and_told():
    report = Report(allowed=0.1, rows=20)
    report.problem("a.jsonl:3", "bad")
    report.problem("a.jsonl:3", "bad in another way too")
    report.problem("a.jsonl:9", "worse")
    notes = []
    report.close("a.jsonl", 18, notes)
    assert notes == ["a.jsonl: 2 bad rows dropped, the first: a.jsonl:3: bad"]
    report.problem("a.jsonl:11", "too many")
    with pytest.raises(UserError, match="3 problems in 20 rows"):
        report.close("a.jsonl", 17)


# --- columns --------------------------------------------------------------------------------------


def test_columns_get_their_standard_names(tmp_path):
    row = {"question": "q", "good": "a", "bad": "b", "prompt": "a number", "id": 7}
    data = write_lines(tmp_path / "a.jsonl", row, row)
    data.columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert read_rows(data)[0].values == {"prompt": "q", "chosen": "a", "rejected": "b", "id": 7}
    assert load_rankings(data)[0].responses == ["a", "b"]


def test_columns_may_swap_names(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    data.columns = {"prompt": "completion", "completion": "prompt"}
    assert read_rows(data)[0].values == {"prompt": "b", "completion": "a"}


def test_only_rows_with_the_wanted_values_are_used(tmp_path):
    rows = [GOOD | {"lang": lang, "n": n} for n, lang in enumerate(["en", "de", None, "zh"])]
    data = write_lines(tmp_path / "a.jsonl", *rows)
    chosen = data.model_copy(update={"only": {"lang": ["en", "zh"]}, "limit": 2})
    assert [row.values["n"] for row in read_rows(chosen)] == [0, 3]
    for value in ("1", 1, 1.0, [1, 7]):
        only = Data.model_validate({**data.model_dump(), "only": {"n": value}})
        assert [r.values["n"] for r in read_rows(only)] == [1]
    with pytest.raises(UserError, match="only: no row has `langs`"):
        read_rows(data.model_copy(update={"only": {"langs": "en"}}))
    with pytest.raises(UserError, match="nothing to use in 0 rows .4 rows left out by `only`"):
        read_rows(data.model_copy(update={"only": {"lang": "fr"}}))


def test_a_mapped_column_that_no_row_has_names_the_nearest(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", {"question": "q", "good": "a", "bad": "b"})
    data.columns = {"prompt": "qestion"}
    message = failure(load_rankings, data)
    assert "prompt: no row has `qestion`" in message
    assert "did you mean `question`" in message
    data.columns = {"promt": "question"}
    assert "`promt` is not a standard name (did you mean `prompt`" in failure(load_rankings, data)


def test_a_mapped_column_may_be_absent_from_some_rows(tmp_path):
    data = write_lines(
        tmp_path / "a.jsonl", GOOD | {"sys": "Be brief."}, GOOD, GOOD | {"sys": None}
    )
    data.columns = {"system": "sys"}
    roles = [[m["role"] for m in d.messages] for d in load_demonstrations(data)]
    assert roles == [["system", "user", "assistant"], ["user", "assistant"], ["user", "assistant"]]


# --- memory and hub -------------------------------------------------------------------------------


def test_memory_holds_columns_rows_or_a_dataset():
    import datasets

    columns = {
        "instruction": ["a", "b"],
        "input": ["", "x"],
        "output": ["1", "2"],
        "text": ["ignored", "ignored"],
    }
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    for source in (columns, rows, datasets.Dataset.from_dict(columns)):
        read = rows_from_memory(source)
        assert [row.values for row in read] == rows
        assert read[1].where == "dataset: row 2"
        assert load_demonstrations(source)[1].messages[0]["content"] == "b\nx"
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)})
    assert "several splits (train)" in failure(load_demonstrations, splits)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("rows.jsonl", "'rows.jsonl' is a text; give a file as Data(path=...)"),
        (Path("rows.jsonl"), "give a file as Data(path=...)"),
        (7, "a number, not a dict of columns"),
        (object, "type, not a dict of columns"),
        (None, "null, not"),
        ([1], "row 1 is a number"),
        ([[GOOD]], "row 1 is a list; a row is a dict such as"),
        ({"a": [1], "b": [1, 2]}, "columns of different lengths"),
        ({"a": "text"}, "column `a` is a text"),
        ({"a": 1}, "column `a` is a number"),
        (iter([GOOD]), "rows that can be read only once; give a list"),
        ({"a": map(str, [1])}, "column `a` is map"),
    ],
)
def test_memory_of_another_shape_is_an_error(source, reason):
    message = failure(rows_from_memory, source)
    assert message.startswith("dataset: ") and reason in message


def test_a_data_frame_is_rows(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    rows += [GOOD | {"input": None}]
    frame = pandas.DataFrame(rows)
    frame.to_parquet(tmp_path / "a.parquet")
    for source in (frame, pandas.read_parquet(tmp_path / "a.parquet")):  # lists become arrays there
        read = load_demonstrations(source)
        assert [item.messages[-1]["content"] for item in read] == ["a", "3"]
    assert "Series" in failure(load_demonstrations, frame["messages"])


def test_columns_of_arrays_are_plain_values():
    columns = {
        "prompt": numpy.array(["q", "r"]),
        "completion": pandas.Series(["a", "b"]),
        "label": numpy.array([True, False]),
        "scores": [[1, 2], [3, 4]],
    }
    assert [item.messages[-1]["content"] for item in load_demonstrations(columns)] == ["a"]
    ranked = {"prompt": ["q"], "answers": [["a", "b"]], "ranks": numpy.array([[1, 2]])}
    assert load_rankings(ranked)[0].ranks == [1, 2]


def test_memory_errors_name_the_row():
    rows = [GOOD, {"instruction": "a", "output": "\ud800"}]
    assert "dataset: row 2: `output` has a lone surrogate" in failure(load_demonstrations, rows)


def test_a_repository_is_read_through_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "repository"
    repository.mkdir()
    write_lines(repository / "train.jsonl", GOOD, GOOD)
    write_lines(repository / "test.jsonl", {"instruction": "c", "output": "d"})
    rows = list(hub_rows(str(repository), "test"))
    assert [row.values for row in rows] == [{"instruction": "c", "output": "d"}]
    assert rows[0].where == f"{repository}[test]: row 1"
    with pytest.raises(UserError, match="cannot load from the hub"):
        list(hub_rows(str(repository), "validation"))


def test_a_repository_with_a_script_runs_nothing(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "repository.py").write_text(f"open({str(tmp_path / 'sentinel')!r}, 'w')\n")
    with pytest.raises(UserError):
        list(hub_rows(str(repository), "train"))
    assert not (tmp_path / "sentinel").exists()


def test_a_hub_that_does_not_answer_is_told_within_seconds(tmp_path):
    code = """if True:
        import time
        import datasets
        from pipeline.data.sources import hub_rows
        from pipeline.errors import UserError
        from pipeline.models.loading import load_policy
        begin = time.monotonic()
        for fetch in (load_policy, lambda name: list(hub_rows(name, "train"))):
            try:
                fetch("nosuch/thing")
            except UserError as error:
                print(str(error).splitlines()[0])
        print(time.monotonic() - begin)
    """
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    answer, model, data, seconds = done.stdout.splitlines()
    assert "http://127.0.0.1:9 does not answer" in answer
    assert model.startswith("nosuch/thing: cannot load")
    assert data.startswith("nosuch/thing[train]: cannot load")
    assert float(seconds) < 10
    assert "Retrying" not in done.stderr


def test_importing_the_data_room_is_cheap():
    code = (
        "import sys, pipeline.data, pipeline.data.template\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_share_of_bad_rows_may_be_allowed_and_is_counted(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", *[GOOD] * 9, b"{")
    notes: list[str] = []
    kept = load_demonstrations(data.model_copy(update={"bad_rows": 0.1}), notes)
    assert len(kept) == 9 and "1 bad rows dropped" in notes[0]
    strict = data.model_copy(update={"bad_rows": 0.05})
    assert "1 problem in 10 rows" in failure(load_demonstrations, strict)


# --- what a path stands for -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.xlsx", b"a,b", "write it as JSON lines, e.g. pandas.read_excel"),
        ("a.jsonl.gz", b"\x1f\x8b", "not a whole gzip file"),
        ("a.jsonl.gz", b"{}", "not a whole gzip file"),
        ("a.jsonl.xz", b"\xfd7zXZ", "unpack it first"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "packed by gzip; name it so"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
        ("a.bin", b"", "unknown kind of file"),
    ],
)
def test_a_file_that_holds_no_rows_is_told_by_its_name_and_first_bytes(
    tmp_path, name, content, reason
):
    (tmp_path / name).write_bytes(content)
    data = Data(path=str(tmp_path / name))
    assert reason in failure(read_rows, data)
    assert reason in failure(inputs_of, data)  # before anything slow starts
    (told,) = missing(data)  # and before an earlier stage is trained
    assert reason in told


def test_an_address_is_not_mangled_into_a_path():
    message = failure(read_rows, Data(path="https://example.org/rows.jsonl"))
    assert message.startswith("https://example.org/rows.jsonl: addresses are not read; fetch")
    hub = Data(path="https://huggingface.co/datasets/tatsu-lab/alpaca/tree/main")
    assert "give the hub id: tatsu-lab/alpaca" in failure(inputs_of, hub)


def test_what_lies_unread_in_a_folder_is_told(tmp_path, capsys):
    data = write_lines(tmp_path / "a.jsonl", GOOD).model_copy(update={"path": str(tmp_path)})
    read_rows(data)
    (tmp_path / "README.md").write_text("About these rows.")
    assert capsys.readouterr().out == ""
    (tmp_path / "b.xlsx").write_text("instruction,output\n")
    (tmp_path / "more").mkdir()
    read_rows(data)
    assert "read a.jsonl; not read: b.xlsx, more/" in capsys.readouterr().out
    assert list(inputs_of(data)) == [f"{tmp_path}/a.jsonl"]


def test_a_row_in_another_encoding_says_how_to_recode(tmp_path):
    line = json.dumps({"instruction": "问题", "output": "答"}, ensure_ascii=False).encode("gbk")
    message = failure(read_rows, write_lines(tmp_path / "a.jsonl", line))
    assert "a.jsonl:1: not UTF-8: byte 0xce at byte 18" in message
    assert "iconv -f GB18030 -t UTF-8" in message


@pytest.mark.parametrize("template", ["none.jinja", "tests", "{{ messages }}" * 400])
def test_a_chat_template_that_is_no_file_is_told_first(template):
    config = SFTConfig(model="owner/name", chat_template=template)
    assert failure(inputs_of, config).endswith(": no such file")
