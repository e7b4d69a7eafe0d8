"""Records are read exactly, and everything that can't be read is named."""

import gzip
import json
import re

import pytest

from rlhf_jax.data.sources import Record, Refused, read
from rlhf_jax.errors import UserError

ROWS = [{"prompt": f"p{n}", "completion": "a\u2028b"} for n in range(9)]


def lines(rows=ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_lines_are_numbered_as_an_editor_numbers_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + lines(), encoding="utf-8")
    records = list(read(str(path)))
    assert records == [Record(f"{path}:{n + 2}", row) for n, row in enumerate(ROWS)]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.json", "rows.jsonl"])
def test_packed_or_not_and_whatever_the_suffix_the_rows_are_the_same(tmp_path, name):
    path = tmp_path / name
    content = lines().encode()
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    records = list(read(str(path)))
    assert [r.columns for r in records if isinstance(r, Record)] == ROWS
    assert records[6].where == f"{path}:7"


def test_a_json_list_is_numbered_from_0(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*ROWS, 3]))
    *records, last = read(str(path))
    assert records == [Record(f"{path}[{n}]", row) for n, row in enumerate(ROWS)]
    assert last == Refused(f"{path}[9]", "not a JSON object")


def test_parquet(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    path = tmp_path / "rows.parquet"
    turns = [{"role": "user", "content": "x"}, {"role": "tool", "content": "x", "name": "y"}]
    nested = [{**row, "chosen": turns, "gone": None} for row in ROWS]  # the table gives the first turn a null name
    parquet.write_table(pa.Table.from_pylist(nested), path)
    records = list(read(str(path)))
    wanted = [{name: value for name, value in row.items() if value is not None} for row in nested]
    assert records == [Record(f"{path}[{n}]", row) for n, row in enumerate(wanted)]


def test_broken_parquet_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 this is not a table")
    with pytest.raises(UserError, match="can't be read as parquet"):
        list(read(str(path)))


def test_a_folder_is_its_data_files_by_name(tmp_path):
    (tmp_path / "b.jsonl").write_text(lines(ROWS[:1]))
    (tmp_path / "a.jsonl").write_text(lines(ROWS[1:2]))
    (tmp_path / "NOTICE.md").write_text("not data")
    assert [r.where for r in read(str(tmp_path))] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:1"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "x"', "invalid JSON, Expecting ',' delimiter at column 15"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"prompt": "\xff"}', "not UTF-8 text at byte 12"),
        (b"[" * 100_000, "JSON nested too deeply"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    rows = lines().encode().splitlines()
    rows[6] = line
    path.write_bytes(b"\n".join(rows))
    (bad,) = [r for r in read(str(path)) if isinstance(r, Refused)]
    assert bad.where == f"{path}:7"
    assert bad.reason.startswith(reason)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_a_git_lfs_pointer_is_recognised(tmp_path, name):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=re.escape(f"{path} is a Git LFS pointer") + ".*git lfs pull"):
        list(read(str(path)))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is empty"):
        list(read(str(path)))


@pytest.mark.parametrize("path", ["./rows", "/no/such/rows", "a/b/c", "rows.jsonl", "me/rows.parquet"])
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(path):
    with pytest.raises(UserError, match=f"no data file or folder {path}"):
        list(read(path))


def test_a_hub_name_that_cannot_be_had_says_so():
    with pytest.raises(UserError, match="'nobody/nothing' is no file or folder here.*Hub") as error:
        list(read("nobody/nothing"))
    assert "\n" not in str(error.value)


def test_suffixes(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(UserError, match="suffix of .*rows.csv is unknown"):
        list(read(str(tmp_path / "rows.csv")))
    with pytest.raises(UserError, match="holds no data file"):
        list(read(str(tmp_path)))


def test_a_cut_off_gzip_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines().encode())[:-20])
    with pytest.raises(UserError, match="broken gzip file"):
        list(read(str(path)))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"\n\na\nb\n\n\nc\n", {3: "a\nb", 7: "c"}),  # blank lines stand between documents
        (b"a\n b\nc", {1: "a", 2: " b", 3: "c"}),  # no blank line: each line is one
        (b"a\n\nb\n<|endoftext|>\n\n<|endoftext|>\nc <|endoftext|>\n\nd\n\n", {1: "a\n\nb", 7: "c <|endoftext|>\n\nd"}),
        (b"\xef\xbb\xbfa\r\n\r\nb\xe2\x80\xa8b\r\n", {1: "a", 3: "b\u2028b"}),
    ],
)
@pytest.mark.parametrize("name", ["rows.txt", "rows.txt.gz"])
def test_a_text_file_is_its_documents(tmp_path, name, content, wanted):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert list(read(str(path))) == [Record(f"{path}:{line}", {"text": text}) for line, text in wanted.items()]


def test_a_text_that_is_not_utf_8_is_refused_alone(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"a\n\nb\xff\n")
    assert list(read(str(path)))[1:] == [Refused(f"{path}:3", "not UTF-8 text at byte 1")]
    path.write_bytes(b"\n\n")
    with pytest.raises(UserError, match="is empty"):
        list(read(str(path)))
    cut = tmp_path / "rows.txt.gz"
    cut.write_bytes(gzip.compress(b"some text " * 99)[:-9])
    with pytest.raises(UserError, match="broken gzip file"):
        list(read(str(cut)))


def test_a_text_beside_tables_is_not_data(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("free")
    assert [r.where for r in read(str(tmp_path))] == [f"{tmp_path}/LICENSE.txt:1"]
    (tmp_path / "rows.jsonl").write_text(lines(ROWS[:1]))
    assert [r.where for r in read(str(tmp_path))] == [f"{tmp_path}/rows.jsonl:1"]


def test_an_empty_path_is_not_the_folder_that_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(lines())
    with pytest.raises(UserError, match=r"one of the paths of --config\.data\.path is empty; drop the comma"):
        list(read(""))
