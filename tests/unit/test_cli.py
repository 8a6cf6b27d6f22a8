"""Commands: arguments, dry run, exit codes and errors."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from collm_dist import cli
from collm_dist.commands import preprocess_data
from collm_dist.commands.train import read_deepspeed_config
from collm_dist.config import Config
from collm_dist.config.loader import load_config
from collm_dist.data.accepted_config import accept_config
from collm_dist.data.prompts.prompt_preview import print_preview
from collm_dist.errors import ConfigError, DataError, LaunchError, WorkerLostError
from collm_dist.runs.error_file import ERROR_FILE_VARIABLE
from collm_dist.runs.run_dir import STEPS, RunDir


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in this process and return exit code, what it was called with, and what it printed."""
    config = tmp_path / "config.yaml"
    config.write_text(f"run: {{dir: {tmp_path}/run}}\ndataset: {{path: a.csv, columns: {{rating: r}}}}\n")

    def run_it(*arguments, work=None, **options):
        calls = []
        monkeypatch.setattr(sys, "argv", ["prog", "--config", str(config), *arguments])

        def record(config, namespace):
            calls.append((config, namespace))
            return work() if work else None

        code = cli.run_command("Does something.", record, "examples:\n  prog --config C\n", **options)
        return code, calls, capsys.readouterr()

    return run_it


def fail(error):
    def work():
        raise error

    return work


def test_arguments_reach_the_command_in_any_order(run):
    given = "cf.embedding_dim=8", "--local_rank=3", "--force", "cf,eval", "lora.rank=2", "--force", "data"
    code, calls, _ = run(*given, steps=STEPS)
    (config, namespace) = calls[0]
    assert code == 0
    assert (config.cf.embedding_dim, config.lora.rank) == (8, 2)
    assert namespace.force == ("cf", "eval", "data")
    assert namespace.local_rank == 3
    assert namespace.overrides == ["cf.embedding_dim=8", "lora.rank=2"]


def test_own_arguments_and_exit_code(run):
    code, calls, _ = run("--stage", "2", work=lambda: 7, add_arguments=lambda p: p.add_argument("--stage", type=int))
    assert code == 7
    assert calls[0][1].stage == 2


def test_help_teaches(run):
    code, calls, printed = run("--help")
    assert (code, calls) == (0, [])
    for part in ("Does something.", "examples:", "section.key=value", "where results go", "exit codes"):
        assert part in printed.out


def test_wrong_arguments_end_with_2(run):
    for arguments in (("--forse", "cf"), ("--force", "cff")):
        code, calls, printed = run(*arguments, steps=STEPS)
        assert (code, calls) == (2, [])
        assert "cff" in printed.err or "--forse" in printed.err


def test_force_names_steps_of_the_command_alone(run, tmp_path):
    code, calls, printed = run("--force", "stage2,data", steps=["stage1", "stage2"])
    assert (code, calls) == (2, [])
    assert "does not run step 'data'; it runs stage1, stage2" in printed.err
    code, calls, printed = run("--force", "cf")  # a command without steps
    assert (code, calls) == (2, [])
    assert "unrecognized arguments: --force" in printed.err
    assert run()[1][0][1].force == ()

    config = load_config(tmp_path / "config.yaml", ["stage1.enabled=false"])
    folder = RunDir(tmp_path / "run")
    for own, reason in (
        (["stage2"], "this command does not run stage1; it runs stage2"),
        (STEPS, r"stage1\.enabled is false; set it to true, or omit --force stage1"),
    ):
        with pytest.raises(ConfigError, match=f"--force stage1: {reason}$"):
            accept_config(config, folder, ["stage1"], own)
    assert not folder.path.exists()


def test_a_mistake_in_the_settings_has_no_traceback(run):
    code, calls, printed = run("stage1.lerning_rate=3")
    assert (code, calls) == (2, [])
    assert "Traceback" not in printed.err
    assert "nearest name 'stage1.learning_rate'" in printed.err


@pytest.mark.parametrize(
    ("error", "code", "has_traceback"),
    [(DataError("bad row"), 2, False), (LaunchError("no GPU"), 3, False), (KeyboardInterrupt(), 130, False),
     (ValueError("our bug"), 1, True)],
)  # fmt: skip
def test_exit_codes(run, error, code, has_traceback):
    actual, _, printed = run(work=fail(error))
    assert actual == code
    assert ("Traceback" in printed.err) == has_traceback
    assert printed.err.splitlines()[-1]


def test_the_parent_process_is_told(run, tmp_path, monkeypatch):
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(tmp_path / "error.json"))
    run(work=fail(LaunchError("no GPU")))
    told = json.loads((tmp_path / "error.json").read_text())
    assert told == {"error": "LaunchError", "message": "no GPU", "exit_code": 3, "retryable": True}


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"a"', "{", "[" * 100_000])
def test_a_deepspeed_config_that_is_not_an_object_is_refused(tmp_path, text):
    path = tmp_path / "deepspeed.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"--deepspeed_config .*deepspeed\.json: "):
        read_deepspeed_config(path)
    path.write_text('{"gradient_clipping": 1.0}')
    assert read_deepspeed_config(path) == {"gradient_clipping": 1.0}


@pytest.mark.parametrize("number", ["-1", "two", "1.5"])
def test_a_preview_of_less_than_no_prompts_is_refused(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(sys, "argv", ["prog", "--config", str(tmp_path / "none.yaml"), f"--preview={number}"])
    assert preprocess_data.main() == 2
    assert f"--preview: '{number}' is not a number of prompts" in capsys.readouterr().err


def test_a_preview_of_the_input_alone_needs_no_backbone(tmp_path, capsys):
    rows = "".join(f"u,i{number},{number},5\n" for number in range(3))
    (tmp_path / "a.csv").write_text(f"user_id,item_id,timestamp,rating\n{rows}")
    dataset = {"path": str(tmp_path / "a.csv"), "columns": {"rating": "rating"}}
    run_dir = RunDir(tmp_path / "run")
    run_dir.write_record("data", {})
    print_preview(Config.model_validate({"run": {"dir": "run"}, "dataset": dataset}), run_dir, 0, pytest.fail)
    assert "3" in capsys.readouterr().out


def test_of_many_processes_one_says_what_is_wrong_alike(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(work=fail(DataError("bad row")))[2].err == ""
    assert "[process 1] LaunchError: no memory" in run(work=fail(LaunchError("no memory")))[2].err


def test_dry_run_shows_settings_and_plan(run):
    code, calls, printed = run(
        "--dry-run", "lora.rank=2", describe=lambda config, run_dir, _: [f"rank {config.lora.rank}"]
    )
    assert (code, calls) == (0, [])
    assert "learning_rate:" in printed.out
    assert printed.out.splitlines()[-1] == "# rank 2"
    assert "# data    not done" in run("--dry-run")[2].out


def test_the_config_of_a_run_that_was_moved_starts_no_other_run(tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "copy"
    (run_dir / "data").mkdir(parents=True)
    (run_dir / "data" / "manifest.json").write_text("{}")
    path = run_dir / "config.yaml"
    path.write_text("run: {dir: runs/mine}\ndataset: {path: a.csv, columns: {rating: r}}\n")
    calls = []

    def call(*overrides):
        monkeypatch.setattr(sys, "argv", ["command", "--config", str(path), *overrides])
        return cli.run_command("Does something.", lambda config, _: calls.append(config.run.dir), "examples:")

    assert call() == 2
    message = capsys.readouterr().err
    assert f"{path} is the config of the run in {run_dir}, but its run.dir is 'runs/mine'" in message
    assert f"add run.dir={run_dir}" in message
    assert call(f"run.dir={run_dir}") == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run_dir)
    assert call() == 0
    assert calls == [str(run_dir), "runs/mine"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_is_no_run_directory(run, tmp_path, name):
    (tmp_path / "file").write_text("")
    code, calls, printed = run(f"run.dir={tmp_path / name}")
    assert (code, calls) == (2, [])
    assert f"{tmp_path / 'file'} is a file" in printed.err


def test_a_process_ends_with_its_output_and_without_taking_the_interpreter_down():
    program = (
        "import atexit, os; from collm_dist.cli import end_process; "
        "atexit.register(os.abort); print('done'); end_process(3)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (3, "done\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_signals_end_any_command_in_words(run, number, code):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]

    def work(*_):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except Exception as error:  # a reader's, for files of any damage
            raise DataError("damaged") from error

    actual, _, printed = run(work=work)
    assert actual == code
    assert "Traceback" not in printed.err
    assert "the same command" in printed.err
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]


@pytest.mark.parametrize("when", ["while it is on its way", "while it is reported"])
def test_a_stop_signal_does_not_hide_that_a_process_was_lost(monkeypatch, capsys, when):
    """A launcher that sees a dead process sends SIGTERM to the others, which have just noticed it too."""

    def fail():
        try:
            raise WorkerLostError("process 1 does not answer")
        finally:
            if when == "while it is on its way":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)

    if when == "while it is reported":
        report = cli.report_error
        monkeypatch.setattr(cli, "report_error", lambda error: (os.kill(os.getpid(), signal.SIGTERM), report(error))[1])
    assert cli.run_reporting(fail) == WorkerLostError.exit_code
    assert "process 1 does not answer" in capsys.readouterr().err
