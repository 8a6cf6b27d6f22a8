"""The end of a command that refuses its input: its own exit code, also while readers are open."""

import gzip
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

HEADER = b"user_id,item_id,timestamp,rating\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.jsonl", "log.parquet"])
def test_a_refused_preview_ends_each_time_with_the_same_code(tmp_path, repository, name):
    """Readers that still work when the process ends would abort it now and then."""
    wide = HEADER + b"u,i,7,5,\n" * 10**5
    content = {"log.csv": wide, "log.csv.gz": gzip.compress(HEADER), "log.jsonl": b"[]\n" * 10**5}
    (tmp_path / name).write_bytes(content.get(name, b""))
    if name == "log.parquet":
        pq.write_table(pa.table({"user_id": range(10**5)}), tmp_path / name, row_group_size=1000)
    command = [sys.executable, "launch/preprocess_data.py", "--config", "configs/own_ratings.yaml", "--preview", "1",
               f"run.dir={tmp_path}/run", f"dataset.path={tmp_path / name}", "dataset.items_path=null"]  # fmt: skip
    for _ in range(5):
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.startswith("DataError: ")) == (2, True), done.stderr
