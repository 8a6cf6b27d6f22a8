"""Fuzzers of logs in all formats, released pickles, shards, manifests and settings."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collm_dist.config import DatasetConfig
from collm_dist.config.loader import dump_config, load_config
from collm_dist.data.convert_collm_release import convert_release
from collm_dist.data.ingest.interaction_filters import count_items_by_month
from collm_dist.data.ingest.normalize import FIRST_SECOND, LAST_SECOND
from collm_dist.data.ingest.row_filter import parse_row_filter
from collm_dist.data.ingest.source import open_source
from collm_dist.data.shards.context_block import TARGET_FIELDS, ContextBlock
from collm_dist.data.shards.manifest import load_manifest
from collm_dist.data.shards.shard_reader import read_shard
from collm_dist.data.shards.shard_writer import write_shard

CONFIGS = Path(__file__).parents[2] / "configs"
# Inputs that break parsers: delimiters, quotes, byte order marks, numbers at their limits, YAML syntax.
MORSELS = [
    b"", b'"', b'""', b",", b"\n", b"\r", b"\t", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xae", b"'", b"\\",
    b"{", b"}", b"[", b"]", b": ", b"&a *a", b"*a", b"!!python/object:os.system", b"<<: *stage", b"null", b"NaN",
    b"inf", b"-1", b"1e999", b"9223372036854775808", b"0x10", b"2020-02-30", b"9999-12-31T23:59:60Z", b"~", b"- ",
    b"#", b"%", b"\xed\xa0\x80", b"x" * 4096, b"[" * 2000, b"9" * 5000, b"!!int ", b"!!bool ", b"!!timestamp ", b"? ",
    b"::", b'"\\ud800"', b'"\\U00110000"', b"\xf3\xa0\x81\x81", b"not ", b" in [1, 'a']", b"<UserID>",
]  # fmt: skip
Rows = list[dict[str, Any]]
FIXED_TYPES = [
    pa.int8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.date32(), pa.date64(),
    pa.time32("s"), pa.time64("us"), pa.timestamp("s"), pa.timestamp("ms", tz="UTC"), pa.timestamp("us"),
    pa.timestamp("ns", tz="Nowhere/Land"), pa.duration("s"), pa.decimal128(38, 4), pa.binary(3),
]  # fmt: skip


@dataclass(frozen=True)
class Fuzzer:
    """A generator of cases in a folder, and the product's way to use them."""

    make: Callable[[random.Random, Path], Path]
    use: Callable[[Path], None]


def mutate(data: bytes, dice: random.Random) -> bytes:
    """Return bytes with a few parts flipped, cut, doubled, moved, or replaced by a morsel."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5, 20))):
        at = dice.randrange(len(changed) + 1)
        length = dice.choice((0, 1, 1, 4, 64))
        way = dice.randrange(5)
        if way == 0 and at < len(changed):
            changed[at] ^= 1 << dice.randrange(8)
        elif way == 1:
            del changed[at : at + length]
        elif way == 2:
            changed[at:at] = changed[at : at + length] * dice.choice((1, 2, 50))
        elif way == 3:
            changed[at : at + length] = dice.choice(MORSELS)
        elif dice.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def make_rows(dice: random.Random) -> Rows:
    """Return some rows of a log."""
    return [
        {"user_id": f"u{dice.randrange(9)}", "item_id": f"i{dice.randrange(9)}", "timestamp": 10**9 + number,
         "rating": dice.randrange(1, 6)}
        for number in range(dice.randrange(1, 30))
    ]  # fmt: skip


def write_text(rows: Rows, delimiter: str = ",", header: str | None = None) -> bytes:
    """Return rows as a text table, without a header if it is empty."""
    first = delimiter.join(rows[0]) if header is None else header
    lines = [delimiter.join(map(str, row.values())) for row in rows]
    return ("\n".join([first, *lines] if first else lines) + "\n").encode()


def write_lines(rows: Rows) -> bytes:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(rows: Rows) -> bytes:
    """Return rows as Parquet."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def make_column(dice: random.Random, count: int) -> Any:
    """Return a column of a random type with random bytes as values."""
    kind = dice.choice([*FIXED_TYPES, "text", "binary", "list", "struct", "dictionary", "null", "bool", "view"])
    if isinstance(kind, pa.DataType):
        buffer = pa.py_buffer(dice.randbytes(count * kind.bit_width // 8))
        return pa.Array.from_buffers(kind, count, [None, buffer])
    raw = [dice.choice((None, dice.randbytes(dice.randrange(9)), dice.choice(MORSELS))) for _ in range(count)]
    texts = [None if cell is None else cell.decode("utf-8", "replace") for cell in raw]
    if kind == "text":  # neither the writers nor Parquet check it
        return pa.Array.from_buffers(pa.string(), count, pa.array(raw, pa.binary()).buffers())
    made = {"binary": raw, "list": [[1]] * count, "struct": [{"a": 1}] * count, "null": [None] * count,
            "bool": [True] * count}  # fmt: skip
    if kind in made:
        return pa.array(made[kind])
    return (
        pa.array(texts, pa.string()).dictionary_encode() if kind == "dictionary" else pa.array(texts, pa.string_view())
    )


def write_types(dice: random.Random, path: Path) -> None:
    """Write Parquet with some columns missing or of an unexpected type."""
    rows = make_rows(dice)
    table = pa.Table.from_pylist(rows)
    for name in dice.sample(table.column_names, dice.randrange(1, 4)):
        if dice.random() < 0.1:
            table = table.drop_columns([name])
            continue
        column = make_column(dice, len(rows))
        try:  # Parquet does not support every type
            pq.write_table(pa.table({"a": column}), io.BytesIO())
        except pa.ArrowException:
            continue
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path, row_group_size=dice.choice((3, 1000)))


def read_log(path: Path, **settings: Any) -> None:
    """Read a log as preprocessing does, and check what later steps rely on."""
    if settings.get("format", "table") == "table":
        defaults = {"columns": {"rating": "rating"}, "items_path": str(path), "item_columns": {"title": "user_id"}}
        settings = defaults | settings
    source = open_source(DatasetConfig.model_validate({"path": str(path), **settings}))
    for chunk in source.chunks:
        for batch in source.read_chunk(chunk):
            table = batch.table
            table.validate(full=True)
            times = table.column("timestamp").to_numpy()
            assert ((times >= FIRST_SECOND) & (times <= LAST_SECOND)).all()
            assert np.isin(table.column("label").to_numpy(), (0, 1)).all()
            for name in ("user_id", "item_id"):
                assert not pc.any(pc.match_substring_regex(table.column(name), r"^$|[\x00-\x1f]")).as_py()
            count_items_by_month(table)
    items = source.read_items().table
    items.validate(full=True)
    source.inputs()


def fuzz_file(
    name: str,
    write: Callable[[Rows], bytes],
    pack: Callable[[bytes], bytes] = bytes,
    *,
    given: Callable[[Path], Path] = lambda path: path,
    **settings: Any,
) -> Fuzzer:
    """Return a fuzzer of a format that mutates either the content or its compressed container."""

    def make(dice: random.Random, folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        data = write(make_rows(dice))
        path.write_bytes(pack(mutate(data, dice)) if dice.random() < 0.7 else mutate(pack(data), dice))
        return given(path)

    return Fuzzer(make, lambda path: read_log(path, **settings))


def fuzz_types() -> Fuzzer:
    """Return a fuzzer of Parquet's column types."""

    def make(dice: random.Random, folder: Path) -> Path:
        write_types(dice, folder / "log.parquet")
        return folder / "log.parquet"

    return Fuzzer(make, read_log)


def fuzz_released() -> Fuzzer:
    """Return a fuzzer of the released pickles in a zip."""
    columns = {
        "uid": [1, 2],
        "iid": [10, 11],
        "title": ["Heat", None],
        "label": [1, 0],
        "timestamp": [10**9, 10**9 + 1],
    }
    data = pickle.dumps(pd.DataFrame(columns))

    def make(dice: random.Random, folder: Path) -> Path:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for name in ("train", "valid", "test"):
                archive.writestr(f"../{name}_ood2.pkl", mutate(data, dice) if dice.random() < 0.4 else data)
        packed = buffer.getvalue()
        path = folder / "release.zip"
        path.write_bytes(mutate(packed, dice) if dice.random() < 0.3 else packed)
        return path

    def use(path: Path) -> None:
        interactions, items = convert_release(path, path.parent / "converted")
        columns = {"label": "label", "split": "split"}
        read_log(interactions, items_path=str(items), item_columns={}, columns=columns, split={"method": "column"})

    return Fuzzer(make, use)


def fuzz_shard() -> Fuzzer:
    """Return a fuzzer of shards, read without verifying their checksum, which would refuse all of them."""
    counts = {"user_idx": 3, "num_likes": 3, **dict.fromkeys(TARGET_FIELDS, 6)}
    arrays = {name: np.arange(count) for name, count in counts.items()}
    offsets = {"history_offsets": [0, 1, 2, 2], "target_offsets": [0, 2, 3, 6], "dislike_offsets": [0] * 7}
    arrays |= {name: np.array(values) for name, values in offsets.items()}
    block = ContextBlock(**arrays, history_items=np.arange(2), dislike_items=np.zeros(0, np.int64))

    def make(dice: random.Random, folder: Path) -> Path:
        info = write_shard(folder, "train-00000.tar", "train", block, contexts_per_record=2)
        path = folder / info.path
        path.write_bytes(mutate(path.read_bytes(), dice))
        return path

    def use(path: Path) -> None:
        for found in read_shard(path):
            assert len(found.label) == found.target_offsets[-1]

    return Fuzzer(make, use)


def fuzz_manifest() -> Fuzzer:
    """Return a fuzzer of manifests."""
    record = {"format_version": 1, "num_users": 2, "splits": {"train": {"rows": 3}}, "shards": [], "content_hash": "x"}

    def make(dice: random.Random, folder: Path) -> Path:
        (folder / "manifest.json").write_bytes(mutate(json.dumps(record).encode(), dice))
        return folder

    return Fuzzer(make, lambda folder: load_manifest(folder) and None)


def fuzz_config() -> Fuzzer:
    """Return a fuzzer of the config loader: the file and the overrides."""
    texts = [path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml"))]
    overrides = [b"stage1.learning_rate=1e-4", b"evaluation.splits='[test]'", b"cf_search.space={a: {uniform: [0, 1]}}"]

    def make(dice: random.Random, folder: Path) -> Path:
        text, override = dice.choice(texts), dice.choice(overrides)
        in_file = dice.random() < 0.7
        (folder / "config.yaml").write_bytes(mutate(text, dice) if in_file else text)
        (folder / "override").write_bytes(override if in_file else mutate(override, dice))
        return folder / "config.yaml"

    def use(path: Path) -> None:
        override = path.with_name("override").read_bytes().decode("utf-8", "surrogateescape")
        dump_config(load_config(path, [override]))

    return Fuzzer(make, use)


def fuzz_filter() -> Fuzzer:
    """Return a fuzzer of row filters, which are parsed and used."""
    filters = [b"event == 'click' and price > 0", b"not (rating in [1, 2] or item_id is None)", b"rating >= -3.5"]

    def make(dice: random.Random, folder: Path) -> Path:
        (folder / "log.csv").write_bytes(write_text(make_rows(dice)))
        (folder / "filter").write_bytes(mutate(dice.choice(filters), dice))
        return folder / "log.csv"

    def use(path: Path) -> None:
        text = path.with_name("filter").read_bytes().decode("utf-8", "replace")
        parse_row_filter(text)
        read_log(path, row_filter=text)

    return Fuzzer(make, use)


def rename(rows: Rows, *names: str) -> Rows:
    """Return rows with other column names, in the same order."""
    return [dict(zip(names, row.values(), strict=True)) for row in rows]


def get_folder(path: Path) -> Path:
    """Return the folder of a file."""
    return path.parent


ATOMIC = "user_id:token\titem_id:token\ttimestamp:float\trating:float"
FUZZERS: dict[str, Callable[[], Fuzzer]] = {
    "csv": lambda: fuzz_file("log.csv", write_text),
    "csv.gz": lambda: fuzz_file("log.csv.gz", write_text, gzip.compress),
    "csv.bz2": lambda: fuzz_file("log.csv.bz2", write_text, bz2.compress),
    "jsonl": lambda: fuzz_file("log.jsonl", write_lines),
    "parquet": lambda: fuzz_file("log.parquet", write_parquet),
    "parquet types": fuzz_types,
    "recbole": lambda: fuzz_file(
        "atomic/x.inter", lambda rows: write_text(rows, "\t", ATOMIC), given=get_folder, format="recbole"
    ),
    "movielens_1m": lambda: fuzz_file(
        "ml/ratings.dat",
        lambda rows: write_text(rows, "::", ""),
        given=lambda path: (path.with_name("movies.dat").write_bytes(b"1::Heat::Crime\n") and None) or path.parent,
        format="movielens_1m",
    ),
    "amazon_2023": lambda: fuzz_file(
        "amazon/x.jsonl.gz",
        lambda rows: write_lines(rename(rows, "user_id", "parent_asin", "timestamp", "rating")),
        gzip.compress,
        given=get_folder,
        format="amazon_2023",
    ),
    "released": fuzz_released,
    "shard": fuzz_shard,
    "manifest": fuzz_manifest,
    "config": fuzz_config,
    "row_filter": fuzz_filter,
}
