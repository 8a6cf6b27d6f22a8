"""The pipeline command on a click log of 60 rows: its report, and its errors."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from collm_dist.data.shards.manifest import compute_content_hash
from collm_dist.monitoring import VALID_AUC, read_metrics
from collm_dist.runs.lock import hold_run_lock
from collm_dist.runs.run_dir import STEPS, RunDir

ROOT = Path(__file__).parents[2]
CLICKS = (
    "dataset.items_path=null",
    "dataset.columns={user_id: user, item_id: item, timestamp: time}",
    "dataset.feedback=implicit",
    "dataset.negatives_per_positive=2",
)


@pytest.fixture(scope="module")
def clicks_run(tmp_path_factory, tiny_clicks, tiny_backbone_dir):
    """The run directory, overrides and output of a finished pipeline over the clicks."""
    folder = tmp_path_factory.mktemp("pipeline")
    log = folder / "clicks.csv"
    shutil.copy(tiny_clicks, log)
    overrides = [f"run.dir={folder}/run", f"dataset.path={log}", f"llm.backbone={tiny_backbone_dir}", *CLICKS]
    overrides += [f"monitoring.prometheus_dir={folder}/prometheus"]
    command = [sys.executable, "launch/run_pipeline.py", "--config", "configs/tiny_cpu.yaml", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDir(folder / "run"), overrides, done.stdout


@pytest.fixture
def launch(monkeypatch, capsys, clicks_run):
    """Run a script of launch/ in this process, on the clicks unless overridden; return exit code and output."""
    monkeypatch.chdir(ROOT)
    before = dict(os.environ)

    def run(script, *arguments, config="configs/tiny_cpu.yaml"):
        spec = importlib.util.spec_from_file_location(script, ROOT / "launch" / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [script, "--config", str(config), *clicks_run[1], *arguments])
        capsys.readouterr()
        code = module.main()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    yield run
    # A process group of one may stay (DeepSpeed cannot make a second one); what says so to child processes may not.
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture
def copied_run(clicks_run, tmp_path):
    """A run of one's own whose steps are all done."""
    shutil.copytree(clicks_run[0].path, tmp_path / "run")
    return RunDir(tmp_path / "run")


def read_status(output):
    return json.loads(output.splitlines()[-1])


def test_from_clicks_to_report(clicks_run):
    run_dir, _, output = clicks_run
    assert all(run_dir.is_done(step) for step in STEPS)
    report = run_dir.read_record("eval")
    models = {row["model"] for row in report["rows"]}
    assert {"popularity", "last_item_cooccurrence", "cf", "stage1", "stage2", "slots_without_llm"} <= models
    assert {"rows", "auc", "uauc", "logloss"} <= report["rows"][0].keys()
    manifest = run_dir.read_record("data")
    assert sum(split["real_rows"] for split in manifest["splits"].values()) == 60
    status = read_status(output)
    assert (status["state"], status["exit_code"]) == ("done", 0)
    assert status == json.loads((run_dir.path / "status.json").read_text())
    assert "tensorboard --logdir" in output
    assert (run_dir.path / "config.yaml").exists()


@pytest.mark.parametrize("script", ["run_pipeline", "preprocess_data", "pretrain_cf", "train"])
def test_a_refused_command_changes_nothing_of_a_finished_run(launch, copied_run, script):
    def read_all():
        files = (path for path in copied_run.path.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
        return {path: path.read_bytes() for path in files}

    before = read_all()
    change = {"preprocess_data": "preprocessing.num_shards=3", "pretrain_cf": "cf.embedding_dim=5"}
    code, output, errors = launch(
        script, f"run.dir={copied_run.path}", change.get(script, "stage1.learning_rate=0.3"),
        "monitoring.prometheus_dir=null",
    )  # fmt: skip
    assert code == 2, output + errors
    assert "was made with other settings or inputs" in errors
    assert read_all() == before


def test_prometheus_hears_of_each_step(clicks_run):
    run_dir, found = clicks_run[0], {}
    for path in (run_dir.path.parent / "prometheus").iterdir():
        assert path.suffix == ".prom"
        for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
            found |= {
                (sample.name, sample.labels.get("step"), sample.labels.get("state")): sample.value
                for sample in family.samples
            }
            assert all(sample.labels["run"] == str(run_dir.path) for sample in family.samples)
    assert found["collm_run_state", None, "done"] == 1
    assert found["collm_run_step", "eval", None] == 1
    for stage in ("stage1", "stage2"):
        assert found["collm_training_steps", stage, None] == run_dir.read_record(stage)["global_steps"]
        last = read_metrics(run_dir.path / stage / "metrics.jsonl")
        assert (
            found["collm_valid_auc", stage, None] == [record for record in last if VALID_AUC in record][-1][VALID_AUC]
        )
        assert found["collm_memory_peak_bytes", stage, None] > 2**26
    assert found["collm_training_epoch_seconds", "cf", None] > 0


def test_a_finished_run_is_told_at_once(clicks_run, launch):
    started = time.monotonic()
    code, output, _ = launch("run_pipeline")
    assert code == 0
    assert time.monotonic() - started < 5
    assert all(f"{step}: done already" in output for step in STEPS)
    assert read_status(output)["state"] == "done"


def test_another_run_takes_over_what_is_equal(clicks_run, launch, tmp_path):
    reuse = (f"run.dir={tmp_path}/other", f"run.reuse=[{clicks_run[0].path}]")
    code, output, _ = launch("run_pipeline", *reuse)
    assert code == 0
    assert all(f"{step}: taken from" in output for step in STEPS)
    assert not (tmp_path / "other" / "data").readlink().is_absolute()
    other = RunDir(tmp_path / "other")
    assert other.read_record("stage2") == clicks_run[0].read_record("stage2")

    code, output, _ = launch("run_pipeline", *reuse, f"run.dir={tmp_path}/third", "stage2.max_steps=3", "--dry-run")
    assert code == 0
    assert "# data    to be taken from" in output
    assert "stage2  to do" in output


def test_dry_run_writes_nothing(launch, tmp_path):
    code, output, _ = launch("run_pipeline", f"run.dir={tmp_path}/none", "--dry-run")
    assert code == 0
    assert "# data    to do" in output
    assert not (tmp_path / "none").exists()
    code, output, _ = launch("run_pipeline", "--dry-run")
    assert "# eval    done" in output
    assert "# stage1: 4 steps" in output


def test_a_changed_setting_stops_with_its_name_and_the_remedies(launch):
    code, output, error = launch("run_pipeline", "stage1.learning_rate=0.5")
    assert code == 2
    assert "config.stage1.learning_rate: 0.01 -> 0.5" in error
    assert "--force stage1" in error
    status = read_status(output)
    assert (status["state"], status["step"], status["error"]) == ("failed", "stage1", "ArtifactError")
    assert "--force" in status["remedy"]


def test_a_changed_input_stops(clicks_run, launch, tmp_path):
    log = tmp_path / "clicks.csv"
    original = next(
        Path(override.partition("=")[2]) for override in clicks_run[1] if override.startswith("dataset.path")
    )
    log.write_text(original.read_text() + "u1,sku-1,2026-02-01T00:00:00\n")
    code, _, error = launch("run_pipeline", f"dataset.path={log}")
    assert code == 2
    assert "input." in error
    assert "step 'data'" in error


def test_two_writers_are_one_too_many(clicks_run, launch, monkeypatch):
    with hold_run_lock(clicks_run[0].path), monkeypatch.context() as patch:
        patch.delenv("COLLM_RUN_LOCK")
        for script in ("run_pipeline", "train"):
            code, _, error = launch(script)
            assert code == 3
            assert f"process {os.getpid()} on" in error


def test_inside_a_ray_job_a_relative_run_directory_is_refused(launch, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    code, output, error = launch("run_pipeline", "run.dir=runs/relative")
    assert code == 2
    assert "absolute path" in error
    assert read_status(output)["error"] == "ConfigError"
    assert not (ROOT / "runs" / "relative").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage1.lerning_rate=1"], "nearest name 'stage1.learning_rate'"),
        (["dataset.path=none.csv"], "none.csv"),
        (["dataset.columns.item_id=product"], "there is no column 'product'"),
    ],
)
def test_bad_settings_and_input(launch, tmp_path, arguments, message):
    for script in ("run_pipeline", "preprocess_data"):
        code, _, error = launch(script, f"run.dir={tmp_path}/run", *arguments)
        assert code == 2
        assert message in error
        assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage1.max_tokens_per_micro_batch=16"], "max_tokens_per_micro_batch"),
        (["prompt.stage1=none.txt"], "there is no file 'none.txt'"),
        (["prompt.stage1=Like <TargetItemTitel>? Answer:"], "there is no field <TargetItemTitel>"),
    ],
)
def test_bad_settings_of_stage1(launch, copied_run, arguments, message):
    code, _, error = launch("train", f"run.dir={copied_run.path}", "--stage", "1", "--force", "stage1", *arguments)
    assert code == 2
    assert message in error
    assert "Traceback" not in error


def test_a_prompt_without_slots(launch, copied_run):
    prompt = "prompt.stage2=Liked: <ItemTitleList>. Like <TargetItemTitle>? Answer:"
    code, _, error = launch("train", f"run.dir={copied_run.path}", "--stage", "2", "--force", "stage2", prompt)
    assert code == 2
    assert "the prompt has no slot" in error


def test_a_backbone_that_is_no_causal_language_model(launch, copied_run, tmp_path):
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(
        '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'
    )
    code, _, error = launch(
        "train", f"run.dir={copied_run.path}", "--stage", "1", "--force", "stage1", f"llm.backbone={tmp_path}/t5"
    )
    assert code == 2
    assert "not a causal language model" in error


def test_a_truncated_shard(launch, copied_run):
    shard = copied_run.step_dir("data") / "shards" / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-600])
    code, _, error = launch("train", f"run.dir={copied_run.path}", "--stage", "1", "--force", "stage1")
    assert code == 2
    assert "train-00000.tar" in error


def test_cf_weights_of_another_id_table(launch, copied_run):
    manifest = copied_run.read_record("data")
    own = manifest["items_hash"]
    manifest["items_hash"] = "0" * 64
    copied_run.write_record("data", manifest | {"content_hash": compute_content_hash(manifest)})
    code, _, error = launch("train", f"run.dir={copied_run.path}", "--stage", "2", "--force", "stage2")
    assert code == 2
    assert own[:12] in error
    assert "0" * 12 in error


@pytest.mark.slow
def test_ratings_through_the_launcher_with_two_processes(tmp_path, tiny_ratings, tiny_backbone_dir):
    command = [
        sys.executable, "launch/run_pipeline.py", "--config", "configs/tiny_cpu.yaml", f"run.dir={tmp_path}/run",
        f"dataset.path={tiny_ratings}/ratings.csv", f"dataset.items_path={tiny_ratings}/items.csv",
        f"llm.backbone={tiny_backbone_dir}", "cluster.num_processes=2", "cluster.zero_stage=2",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = RunDir(tmp_path / "run").read_record("stage2")
    assert summary["world_size"] == 2
    assert read_status(done.stdout)["state"] == "done"


def test_a_single_step_leaves_the_settings_it_was_made_with(tiny_ratings, tmp_path):
    command = [sys.executable, "launch/preprocess_data.py", "--config", "configs/tiny_cpu.yaml"]
    command += [f"run.dir={tmp_path / 'run'}", f"dataset.path={tiny_ratings / 'ratings.csv'}"]
    command += [f"dataset.items_path={tiny_ratings / 'items.csv'}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    again = [*command[:3], str(tmp_path / "run" / "config.yaml")]
    done = subprocess.run(again, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "done already" in done.stdout


def test_a_stop_while_ray_starts_says_how_to_go_on(tiny_ratings, tmp_path):
    """Ray's own handler of SIGTERM would end the process with exit code 15."""
    command = [sys.executable, "launch/preprocess_data.py", "--config", "configs/tiny_cpu.yaml"]
    command += [f"run.dir={tmp_path / 'run'}", f"dataset.path={tiny_ratings / 'ratings.csv'}"]
    command += [f"dataset.items_path={tiny_ratings / 'items.csv'}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    process = psutil.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any("gcs_server" in child.name() for child in process.children()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "stopped by SIGTERM; run the same command again to resume" in errors
