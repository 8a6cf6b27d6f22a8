"""TensorBoard files of a run, read back by TensorBoard's own code."""

import json
import re

import numpy as np
import pytest
from matplotlib.image import imsave
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client

from collm_dist import monitoring
from collm_dist.monitoring import tags

LOGGED = [name for name in vars(monitoring) if name.isupper()]


def open_board(logdir) -> TBContext:
    """Return the context of TensorBoard's plugins for a folder of runs."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logdir))
    return TBContext(data_provider=provider, logdir=str(logdir), multiplexer=multiplexer)


def read_scalars(folder, tag):
    """Return (step, value) pairs of a tag in a step's event files."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def log_training(folder, values):
    logger = monitoring.RunLogger(
        folder,
        is_main=True,
        tensorboard=True,
        progress_bar=False,
        start_step=0,
        total_steps=9,
    )
    for step, point in enumerate(values, start=1):
        logger.log(step, point)
    logger.close()


def list_sessions(board):
    """Return the experiment and the rows of the hyperparameter table."""
    context = backend_context.Context(board)
    experiment = get_experiment.Handler(RequestContext(), context, "", api_pb2.GetExperimentRequest()).run()
    request = api_pb2.ListSessionGroupsRequest(
        slice_size=99,
        allowed_statuses=api_pb2.Status.values(),
        col_params=[
            *(api_pb2.ColParams(hparam=info.name, include_in_result=True) for info in experiment.hparam_infos),
            *(api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos),
        ],
    )
    return experiment, list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups


def test_custom_scalars_are_laid_out_once_for_all_steps(tmp_path):
    for stage in ("stage1", "stage2"):
        log_training(tmp_path / stage, [{tags.TRAIN_LOSS: 0.7, tags.VALID_AUC: 0.6}])
    layout = json.loads(CustomScalarsPlugin(open_board(tmp_path)).layout_impl(RequestContext(), ""))
    charts = {
        category["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
        for category in layout["category"]
    }
    assert list(charts) == ["loss", "quality", "speed", "memory"]
    assert {title: list(category) for title, category in charts.items()} == {
        title: list(category) for title, category in tags.LAYOUT.items()
    }
    # Every logged tag is on a chart, and a chart shows only its own tags.
    logged = {getattr(monitoring, name) for name in LOGGED}
    patterns = [pattern for category in charts.values() for chart in category.values() for pattern in chart]
    for tag in logged:
        assert any(re.match(pattern, tag) for pattern in patterns), tag
    for title, category in charts.items():
        for chart, patterns in category.items():
            shown = {tag for tag in logged if any(re.match(pattern, tag) for pattern in patterns)}
            assert shown == set(tags.LAYOUT[title][chart])
    for stage in ("stage1", "stage2"):
        assert read_scalars(tmp_path / stage, tags.TRAIN_LOSS) == [(1, pytest.approx(0.7))]


def test_runs_are_rows_of_the_hyperparameter_table(tmp_path):
    for number, rate in enumerate((1e-3, 1e-4)):
        settings = {"stage2.learning_rate": rate, "cf.model": "mf", "stage1.enabled": True}
        if number == 1:  # a later release
            settings["new.setting"] = "x"
        shown = monitoring.RunSettings(f"runs/{number}", settings, {"final/stage2_test_auc": 0.6 + number / 10})
        monitoring.log_report(tmp_path / str(number) / "eval", "# Report", {}, shown)
    experiment, groups = list_sessions(open_board(tmp_path))
    assert {info.name for info in experiment.hparam_infos} == {
        "stage2.learning_rate", "cf.model", "stage1.enabled", "new.setting", "final/stage2_test_auc"
    }  # fmt: skip
    rows = {group.name: group for group in groups}
    assert set(rows) == {"runs/0", "runs/1"}
    assert rows["runs/1"].hparams["stage2.learning_rate"].number_value == 1e-4
    assert rows["runs/1"].hparams["cf.model"].string_value == "mf"
    assert rows["runs/1"].hparams["stage1.enabled"].bool_value is True
    assert rows["runs/1"].hparams["final/stage2_test_auc"].number_value == pytest.approx(0.7)


def test_every_chart_is_a_curve_and_quality_comes_first(tmp_path):
    log_training(tmp_path / "stage1", [{getattr(monitoring, name): 0.5 for name in LOGGED}] * 2)
    settings = monitoring.RunSettings("runs/0", {"run.seed": 1}, {"final/stage2_test_auc": 0.6})
    imsave(tmp_path / "auc-test.png", np.zeros((4, 4, 3)))
    monitoring.log_report(tmp_path / "eval", "# Report", {"auc-test.png": tmp_path / "auc-test.png"}, settings)
    board = open_board(tmp_path).multiplexer
    scalars, images = (board.PluginRunToTagToContent(kind) for kind in ("scalars", "images"))
    assert list(scalars) == ["stage1/tensorboard"]
    assert list(images) == ["eval"]
    cards = sorted([*scalars["stage1/tensorboard"], *images["eval"]])
    assert list(dict.fromkeys(tag.partition("/")[0] for tag in cards)) == ["train", "valid", "views", "work"]
    assert len(scalars["stage1/tensorboard"]) == len(LOGGED)


def test_texts_are_wrapped_and_pictures_named(tmp_path):
    logger = monitoring.RunLogger(
        tmp_path / "stage1", is_main=True, tensorboard=True, progress_bar=False, start_step=0, total_steps=1
    )
    logger.log_text("prompt", "word " * 100 + "\n\n  indented")
    logger.close()
    settings = monitoring.RunSettings("runs/0", {"run.seed": 1}, {})
    monitoring.log_report(tmp_path / "eval", "## Plots\n\n![auc test](auc-test.png)\n", {}, settings)
    multiplexer = open_board(tmp_path).multiplexer
    prompt, report = (
        multiplexer.Tensors(run, f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        for run, tag in (("stage1/tensorboard", "prompt"), ("eval", "report"))
    )
    lines = prompt.split("\n")
    assert (lines[0], lines[-3:]) == ("```", ["", "  indented", "```"])
    assert max(map(len, lines)) <= 100
    assert " ".join(lines[1:-3]).split() == ["word"] * 100
    assert "![" not in report
    assert "tab Images, `views/auc-test`" in report


def test_projector_titles_stay_in_their_cells(tmp_path):
    titles = ["Tab\there", "Two\r\nlines", "  ", "Amélie\u2028"]
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3) / 7
    monitoring.write_projector(
        tmp_path / "run",
        [
            monitoring.VectorSet("items, as mapped", vectors),
            monitoring.VectorSet("items, collaborative", vectors[:, :2]),
        ],
        {"title": titles, "rows": [4, 3, 2, 1]},
    )
    (tmp_path / "run" / "events.out.tfevents.0.x").touch()  # TensorBoard lists folders with event files
    apps = ProjectorPlugin(open_board(tmp_path)).get_plugin_apps()
    config = Client(apps["/info"]).get("?run=run").json
    assert [embedding["tensorName"] for embedding in config["embeddings"]] == [
        "items, as mapped",
        "items, collaborative",
    ]
    assert config["embeddings"][0]["tensorShape"] == [4, 3]
    data = Client(apps["/tensor"]).get("?run=run&name=items, as mapped").data
    assert np.frombuffer(data, dtype=np.float32).reshape(4, 3) == pytest.approx(vectors, rel=1e-4)
    metadata = Client(apps["/metadata"]).get("?run=run&name=items, collaborative").text.splitlines()
    assert metadata == ["title\trows", "Tab here\t4", "Two lines\t3", "-\t2", "Amélie\t1"]


def test_a_finished_run_in_tensorboard(finished_run):
    board = open_board(finished_run)
    text = board.multiplexer.Tensors("stage1/tensorboard", "prompt/text_summary")
    assert b"Answer:" in text[0].tensor_proto.string_val[0]
    images = board.multiplexer.PluginRunToTagToContent("images")["eval/tensorboard"]
    assert {"views/calibration-valid", "views/calibration-test", "views/training"} <= set(images)
    _, groups = list_sessions(board)
    report = json.loads((finished_run / "eval" / "report.json").read_text())
    expected = {
        f"final/{row['model']}_{row['split']}_{name}": row[name]
        for row in report["rows"]
        for name in ("auc", "uauc", "logloss")
        if row["slice"] == "all" and row["model"] in ("cf", "stage1", "stage2") and row["split"] != "train"
    }
    assert len(expected) == 18
    shown = {name: groups[0].hparams[name].number_value for name in groups[0].hparams if name.startswith("final/")}
    assert shown == pytest.approx(expected)
    assert groups[0].hparams["lora.rank"].number_value == 2
    assert groups[0].hparams["prompt.stage1"].string_value.startswith("Liked: <ItemTitleList>")
    for stage in ("stage1", "stage2"):
        assert [step for step, _ in read_scalars(finished_run / stage, tags.name_scalar(tags.STEP_SECONDS))] == [
            1,
            2,
            3,
            4,
        ]


def test_projector_shows_mapped_items_of_stage_2(finished_run):
    import safetensors.torch
    import torch

    apps = ProjectorPlugin(open_board(finished_run)).get_plugin_apps()
    query = "?run=stage2/tensorboard&name="
    lines = Client(apps["/metadata"]).get(query + "items, as mapped").text.splitlines()
    names = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    rows = [int(item["training rows"]) for item in names]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] >= 1
    train = json.loads((finished_run / "data" / "manifest.json").read_text())["splits"]["train"]
    assert sum(rows) == train["rows"]
    assert {"Amélie — 2001", "千と千尋の神隠し"} <= {item["title"] for item in names}
    items, mapped = (
        np.frombuffer(Client(apps["/tensor"]).get(query + name).data, dtype=np.float32).reshape(len(names), -1)
        for name in ("items, collaborative", "items, as mapped")
    )
    weights = safetensors.torch.load_file(str(finished_run / "stage2" / "mapping.safetensors"))
    layers = {name.removeprefix("slot_mapper.cf."): value for name, value in weights.items() if ".cf." in name}
    module = torch.nn.Sequential(torch.nn.Linear(*reversed(layers["hidden.weight"].shape)), torch.nn.ReLU(),
                                 torch.nn.Linear(*reversed(layers["out.weight"].shape)))  # fmt: skip
    module.load_state_dict(
        {f"{0 if 'hidden' in name else 2}.{name.split('.')[1]}": weight for name, weight in layers.items()}
    )
    with torch.no_grad():
        expected = module(torch.from_numpy(items.copy())).numpy()
    assert mapped == pytest.approx(expected, rel=1e-2, abs=1e-3 * float(np.abs(expected).max()))
