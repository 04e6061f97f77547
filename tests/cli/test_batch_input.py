"""The formats and encodings of `edge-slm batch`, and what a run of them reports."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_slm.cli.batch_input import FORMATS, InputLine, format_of, read_input
from edge_slm_runtime.errors import DataError

from .test_batch import read
from .test_commands import error_of, run

TABLE = (
    'ID;Request;Words;sku\r\n1;"a ""red"" fox";8;x\r\n;"two\nlines";24.0;\r\n;;;\r\n2;é;many;y\r\n'
)


def rows(content: bytes | str, form: str = "jsonl", encoding: str | None = None) -> list[InputLine]:
    data = content.encode() if isinstance(content, str) else content
    return list(read_input(BytesIO(data), form, encoding))


def test_the_format_follows_the_ending() -> None:
    names = ("a.jsonl", "a.CSV", "a.tsv.gz", "a.txt", "-", "a.json.gz")
    found = [format_of(Path(name)) for name in names]
    assert found == ["jsonl", "csv", "tsv", "lines", "jsonl", "jsonl"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_table_in_any_encoding(encoding: str, pack: Any) -> None:
    found = rows(pack(TABLE.encode(encoding)), "csv")
    assert [(row.line, row.fields) for row in found] == [
        (2, {"id": "1", "request": 'a "red" fox', "words": 8, "sku": "x"}),
        (3, {"request": "two\nlines", "words": 24}),
        (6, {"id": "2", "request": "é", "words": "many", "sku": "y"}),
    ]
    assert found[0].others == {"sku": "x"}


def test_code_pages_are_read_when_they_are_named() -> None:
    content = "request\nein Café\n".encode("cp1252")
    assert "--encoding" in str(rows(content, "csv")[0].error)
    assert rows(content, "csv", "cp1252")[0].fields == {"request": "ein Café"}
    with pytest.raises(DataError, match="cannot be decoded"):
        rows("request\na".encode("utf-16")[:-1], "csv")


def test_tabs_delimiter_lines_and_plain_lines() -> None:
    assert rows("request\ttask\na, b\t image \n", "tsv")[0].fields == {
        "request": "a, b",
        "task": "image",
    }
    assert rows("sep=;\nrequest;task\na,b;image\n", "csv")[0].fields["request"] == "a,b"
    assert [row.fields for row in rows("\ufeffa fox\r\n \n{b}\n", "lines")] == [
        {"request": "a fox"},
        {"request": "{b}"},
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n", "no column is called 'request'"),
        ("request,Request\na,b\n", "two columns"),
        (b"request\xff\n", "not valid UTF-8"),
        ('request,"open\n' + "a\n" * 99999, "column names cannot be read"),
    ],
)
def test_a_table_without_usable_names_is_refused(content: bytes | str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        rows(content, "csv")
    assert rows("", "csv") == rows("\n\n", "csv") == rows("request\n", "csv") == []


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('"open\n' + "a\n" * 99999, "a quote left open"),
        ('"a" b,image\n', "not a row"),
        ("a,image,c\n", "3 cells for 2 columns"),
        ("a" * 200_000 + ",image\n", "not a row"),
        ("é" * 20_000_000 + "\n", "longer than 256 KiB"),
        ('"' + '","\n' * 99999, "longer than 256 KiB"),
    ],
)
def test_a_bad_row_of_a_table_is_one_error(bad: str, said: str) -> None:
    found = rows(f"request,task\nfirst,image\n{bad}", "csv")
    assert found[0].fields["request"] == "first"
    assert said in str(found[1].error)
    assert found[1].line == 3


def test_a_damaged_archive_is_refused() -> None:
    whole = gzip.compress(TABLE.encode() * 1000)
    for damaged in (whole[:-20], whole[:40] + b"\0" * 200 + whole[240:], whole[:4] + b"x"):
        with pytest.raises(DataError, match="cut or damaged"):
            rows(damaged, "csv")


def test_memory_does_not_grow_with_what_a_line_holds() -> None:
    lines = b"".join(b'{"request": "%s"}\n' % (b"a" * size) for size in (9, 30_000_000, 9))
    stream = BytesIO(lines)
    tracemalloc.start()
    errors = [bool(row.error) for row in read_input(stream, "jsonl", None)]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert errors == [False, True, False]
    assert most < 100 << 20


@given(
    st.binary(max_size=300), st.sampled_from(FORMATS), st.sampled_from([None, "utf-16", "cp1252"])
)
def test_any_bytes_give_rows_errors_or_one_refusal(
    content: bytes, form: str, encoding: str | None
) -> None:
    try:
        found = rows(content, form, encoding)
    except DataError:
        return
    assert [row.line for row in found] == sorted({row.line for row in found})
    assert all(row.error or "request" in row.fields or form != "lines" for row in found)


# -- runs -----------------------------------------------------------------------


def test_a_table_is_answered_under_the_defaults(tiny_bundle: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.csv.gz", tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(TABLE.encode("utf-16")))
    settings = ("--task", "title", "--words", 3, "--max-new-tokens", 6, "--bundle", tiny_bundle)
    result = run("batch", source, "-o", output, *settings)
    assert result.exit_code == 0
    first, second, bad = read(output)
    assert (first["line"], first["id"], first["sku"]) == (2, "1", "x")
    assert (second["line"], second["id"], second["request"]) == (3, None, "two\nlines")
    assert [row["asked_words"] for row in (first, second)] == [8, 24]
    assert first["task"] == second["task"] == "title"
    assert bad["error"]["code"] == "bad_setting"
    assert (bad["request"], bad["sku"]) == ("é", "y")
    again = run("batch", source, "-o", output, *settings)
    assert "complete already" in again.stderr
    changed = run("batch", source, "-o", output, *settings, "--format", "lines")
    assert "format: 'csv' → 'lines'" in error_of(changed, "data", 8)


def test_lines_that_failed_decide_the_exit_code(tiny_bundle: Path, tmp_path: Path) -> None:
    good, bad = '{"request": "a", "max_new_tokens": 2}\n', '{"request": "a", "task": "poem"}\n'
    settings = ("batch", "-", "--bundle", tiny_bundle)
    assert run(*settings, stdin=good + bad).exit_code == 0
    assert run(*settings, stdin="").exit_code == 0
    for lines, options in ((bad * 2, ()), (good + bad, ("--strict",))):
        result = run(*settings, *options, stdin=lines)
        assert result.exit_code == 13
        last = result.stderr.splitlines()[-1]
        assert last.startswith("error[batch_failed]: ")
        assert "unknown task 'poem'" in last
        assert len(result.stdout.splitlines()) == 2
    error_of(run(*settings, "--words", 900, stdin=good), "words_out_of_range", 3)
    error_of(run(*settings, "--encoding", "base64", stdin=good), "usage", 2)


def test_repeated_ids_are_reported(tiny_bundle: Path, tmp_path: Path) -> None:
    lines = "".join(f'{{"id": {i}, "request": "a", "max_new_tokens": 2}}\n' for i in (1, 2, 1, 1))
    (tmp_path / "in.jsonl").write_text(lines)
    settings = ("-o", tmp_path / "out", "--bundle", tiny_bundle, "--json")
    result = run("batch", tmp_path / "in.jsonl", *settings)
    assert json.loads(result.stdout)["repeated_ids"] == 2
    assert "2 lines have the id of an earlier line" in result.stderr
    assert [row.get("repeats") for row in read(tmp_path / "out")] == [None, None, 1, 1]


def test_lines_that_failed_are_computed_again(tiny_bundle: Path, tmp_path: Path) -> None:
    source, output, fresh = (tmp_path / name for name in ("in.csv", "out", "fresh"))
    table = "request,task,temperature\n" + "a,poem,1\nb,image,1\nc,song,1\nd,title,1\n" * 10
    source.write_text(table)
    command = ("batch", source, "-o", output, "--bundle", tiny_bundle, "--max-new-tokens", 3)
    retry = (*command, "--retry-errors")
    assert "no complete output" in error_of(run(*retry), "data", 8)
    assert "20 of them errors" in run(*command).stderr

    source.write_text(table + "e,image,1\n")
    assert "40 answers and errors, the input 41" in error_of(run(*retry), "data", 8)
    source.write_text(table.replace("d,title", "x,title"))
    assert "line 5 of the input is another" in error_of(run(*retry), "data", 8)

    source.write_text(table.replace("poem", "image"))
    assert "10 of them errors" in run(*retry).stderr
    fixed = table.replace("poem", "image").replace("song", "title")
    source.write_text(fixed)
    assert "0 of them errors" in run(*retry, "--strict").stderr
    run("batch", source, "-o", fresh, *command[4:])
    assert output.read_bytes() == fresh.read_bytes()
    assert "complete already" in run(*command).stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        *("in.csv", "out", "out.run.json", "fresh", "fresh.run.json")
    }
    error_of(run("batch", source, "--retry-errors"), "usage", 2)


def test_a_retry_stopped_between_its_two_renames(tiny_bundle: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out"
    source.write_text("a\nb\n")
    command = ("batch", source, "-o", output, "--bundle", tiny_bundle, "--max-new-tokens", 3)
    run(*command)
    record = output.with_name("out.run.json")
    newer = json.loads(record.read_text())
    record.rename(output.with_name("out.retry.run.json"))
    record.write_text(json.dumps({**newer, "output": [1, "0"]}))
    assert run(*command, "--retry-errors").exit_code == 0
    assert json.loads(record.read_text())["output"] == newer["output"]
