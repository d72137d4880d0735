"""Rows of prompt sets: they are read, and counted beforehand, from the same files."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.data.rows import count_rows, read_rows

ROWS = [{"problem": f"{number}+1=?", "answer": number + 1} for number in range(5)]
LINES = "".join(json.dumps(row) + "\r\n" for row in ROWS)
BOM = "\ufeff"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The same rows in files of every kind."""
    contents = {
        "a.jsonl": LINES.replace("\n", "\n\n"),
        "b.JSONL": BOM + LINES,
        "c.ndjson": LINES,
        "d.json": json.dumps(ROWS),
        "e.json": BOM + json.dumps(ROWS),
        "lines.json": LINES,
        "f.csv": BOM + "problem,answer\n" + "".join(f'"{row["problem"]}",{row["answer"]}\n' for row in ROWS),
        "g.tsv": "problem\tanswer\n" + "".join(f"{row['problem']}\t{row['answer']}\n" for row in ROWS),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with gzip.open(tmp_path / "h.jsonl.gz", "wt") as file:
        file.write(LINES)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "i.parquet")
    return sorted(tmp_path.iterdir())


def test_as_many_rows_are_counted_as_are_read(files) -> None:
    for file in files:
        for source in (str(file), f"file://{file}"):
            config = PromptSetConfig(source=source)
            assert len(read_rows(config, "data")) == count_rows(config, "data") == len(ROWS), source
    limited = PromptSetConfig(source=str(files[0]), limit=2)
    assert len(read_rows(limited, "data")) == count_rows(limited, "data") == 2
    several = PromptSetConfig(source=str(files[0].parent / "?.json*"))
    assert len(read_rows(several, "data")) == count_rows(several, "data")


def test_what_must_be_loaded_is_not_counted(tmp_path) -> None:
    for source in ("openai/gsm8k", str(tmp_path)):
        assert count_rows(PromptSetConfig(source=source), "data") is None


def test_a_field_may_be_longer_than_pythons_own_limit(tmp_path) -> None:
    (tmp_path / "long.csv").write_text(f"problem,answer\n{'1+' * 100_000}1,100001\n")
    (row,) = read_rows(PromptSetConfig(source=str(tmp_path / "long.csv")), "data")
    assert len(row["problem"]) == 200_001


DAMAGED_GZIP = gzip.compress(LINES.encode() * 50)
DAMAGED_GZIP = DAMAGED_GZIP[:40] + b"\xff" * 20 + DAMAGED_GZIP[60:]


@pytest.mark.parametrize("use", [read_rows, count_rows])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.jsonl", None, "no such file: .*nowhere.jsonl; create it, or correct the path"),
        ("none_*.jsonl", None, "no such file: .*; create it, or correct the path"),
        ("empty.jsonl", b"\n", "holds no rows"),
        ("empty.csv", b"problem,answer\n", "holds no rows"),
        ("not.parquet", b"not Parquet", "cannot read .*not.parquet: "),
        ("damaged.jsonl.gz", DAMAGED_GZIP, "cannot read .*damaged.jsonl.gz: "),
        ("deep.json", b"[" * 100_000, "cannot read .*deep.json: "),
        ("latin.csv", b"problem,answer\ncaf\xe9,1\n", "latin.csv is not text in UTF-8 .*; convert it"),
        ("nowhere", None, "no such file or folder: .*nowhere; create it, or correct the path"),
        ("*", None, "no such file or folder: "),
    ],
)
def test_bad_files_are_named(tmp_path, use, name, content, message) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.source: .*{message}"):
        use(PromptSetConfig(source=str(tmp_path / name)), "data")


def test_an_unquoted_comma_does_not_shift_the_values(tmp_path) -> None:
    (tmp_path / "commas.csv").write_text("problem,answer\nWhat is 1,000 + 1?,1001\n")
    with pytest.raises(UserError, match="commas.csv: line 2 has more values than the header; quote values with commas"):
        read_rows(PromptSetConfig(source=str(tmp_path / "commas.csv")), "data")


def test_stars_match_files_in_several_folders(tmp_path) -> None:
    for folder in ("one", "two/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "rows.jsonl").write_text(LINES)
        (tmp_path / folder / "README.md").write_text("not rows")
    for source, count in (("*/*.jsonl", 5), ("**/*.jsonl", 10), ("one/*", 5)):
        config = PromptSetConfig(source=str(tmp_path / source))
        assert len(read_rows(config, "data")) == count_rows(config, "data") == count


def test_a_folder_of_a_hub_data_set(tmp_path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "set" / "data" / "train-0-of-1.parquet")
    assert len(read_rows(PromptSetConfig(source=str(tmp_path / "set")), "data")) == 5
    with pytest.raises(UserError, match="cannot read the folder .*set .*split 'test'.*: .*[Tt]est"):
        read_rows(PromptSetConfig(source=str(tmp_path / "set"), split="test"), "data")


def test_a_folder_of_parquet_files_says_how_to_name_them(tmp_path) -> None:
    (tmp_path / "spark.parquet").mkdir()
    with pytest.raises(UserError, match=r"spark.parquet is a folder; name its files: .*spark.parquet/\*.parquet"):
        read_rows(PromptSetConfig(source=str(tmp_path / "spark.parquet")), "data")
