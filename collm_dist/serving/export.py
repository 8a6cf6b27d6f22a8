"""Export of a finished run: a folder that plain peft and transformers load, with everything that ranking needs.

README.md             model card: data, metrics with baselines and intervals, settings, licences
adapter/              LoRA adapter of stage 1, for ``PeftModel.from_pretrained(backbone, "adapter")``; missing if all
                      weights of the layers were trained
model/                backbone with what stage 1 trained, for ``AutoModelForCausalLM.from_pretrained("model")``
mapping.safetensors   stage 2's mapping from collaborative vectors to soft tokens
cf/                   collaborative models (safetensors)
anchor/               simple score that the language model adds to; anchored_score.safetensors: its share in stage 1
data/                 ids, titles, user texts and the log, the source of users' histories and statistics; without
                      events, items alone, with the counts of their likes and events
prompt/               prompts of the training
records/, config.yaml records of all steps, and the settings
export.json           SHA-256 of every file; written last
"""

from __future__ import annotations

import glob
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from collm_dist.config import Config
from collm_dist.config.loader import change_settings, dump_config
from collm_dist.data.shards.manifest import ITEM_COUNTS, USER_TEXTS, load_manifest
from collm_dist.errors import ArtifactError, DiskError
from collm_dist.phases import follow, show_phase
from collm_dist.runs.anchor_inputs import check_anchor
from collm_dist.runs.atomic_files import compute_file_hash, explain_disk_errors, sync_files, write_json
from collm_dist.runs.code_trust import keep_trust_in_all, list_code, refuse_code
from collm_dist.runs.damage import explain_read_errors, name_damage, read_json_file
from collm_dist.runs.empty_folders import list_missing, remove_empty
from collm_dist.runs.file_hashes import check_files, read_hashes
from collm_dist.runs.local_paths import PathRemover, check_link
from collm_dist.runs.run_dir import STAGES, STEPS, RunDir, Step, normalize
from collm_dist.serving.finished_run import check_settings, find_stage, load_run_config
from collm_dist.serving.licences import NOT_STATED, Licences
from collm_dist.serving.model_card import write_card
from collm_dist.serving.users_removed import is_of_users, remove_users

FORMAT_VERSION = 1
INDEX = "export.json"
_MAX_INDEX_BYTES = 64 << 20
_CARD = "adapter/README.md"
# Settings that say where else a run reads and writes: those of a received run must not decide that here.
_OF_ONE_MACHINE: dict[str, Any] = {
    "run.reuse": [],
    "run.publish_to": None,
    "promotion.pointer": None,
    "monitoring.prometheus_dir": None,
    "monitoring.mlflow.tracking_uri": None,
    "cluster.local_scratch": None,
    "cluster.ray_address": None,
}
# Place of each part of an export in a run directory. Folders end with a slash.
PLACES = {
    "adapter/": "stage1/adapter/",
    "model/": "stage1/merged/",
    "mapping.safetensors": "stage2/mapping.safetensors",
    "cf/": "cf/",
    "anchor/": "anchor/",
    "anchored_score.safetensors": "stage1/anchored_score.safetensors",
    "data/": "data/",
    **{f"records/{step}.json": str(RunDir(Path()).record_path(step)) for step in STEPS},
}


def export_model(
    config: Config, run_dir: RunDir, folder: Path, licences: Licences, *, with_events: bool = True
) -> Path:
    """Write the export of a finished run and return its folder, which appears complete or not at all.

    Args:
        config: the run's settings.
        run_dir: directory of the run, with stage 2 or stage 1 done.
        folder: new folder.
        licences: licences for the model card.
        with_events: whether it holds the users' ids, events, texts and vectors; without them it ranks for new users.

    Raises:
        ArtifactError: the folder exists, or the run is unfinished, damaged, or made with other settings.
    """
    stage = find_stage(run_dir)
    config = check_settings(config, run_dir, trust_code=True, accept_stage1=True)  # nothing is loaded
    has_events = load_manifest(run_dir.step_dir("data")).has_events
    removes, with_events = has_events and not with_events, has_events and with_events
    recorded = _list_recorded(run_dir)
    check_anchor(config, run_dir)
    check_files(run_dir, "eval", "report.md")  # not copied, but part of the card
    with explain_read_errors(run_dir.path), _make_whole(folder) as part:
        sources = [file for file in _list_sources(run_dir) if not (removes and is_of_users(file[1]))]
        for source, name in follow(sources, "export: copying and checking", "files"):
            target = part / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            expected = recorded.get(source)
            if expected is not None and compute_file_hash(target) != expected:
                raise ArtifactError(
                    f"{source} is damaged (its SHA-256 is not the recorded one): restore it from a copy, or redo its "
                    "step with --force"
                )
        (part / "prompt").mkdir()
        for name in STAGES:
            if run_dir.is_done(name):
                prompt = run_dir.read_record(name)["fingerprint"]["input.prompt"]
                (part / "prompt" / f"{name}.txt").write_text(prompt, encoding="utf-8")
        (part / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        write_card(part / "README.md", config, run_dir, stage, licences, with_events=with_events)
        if removes:
            config = change_settings(config, {"dataset.row_filter": None})  # it may name users
        _remove_paths(part, config, run_dir, remove_users(part, config, run_dir) if removes else {})
        files = sorted(path for path in part.rglob("*") if path.is_file())
        with show_phase("export: hashing", sum(path.stat().st_size for path in files), "B") as phase:
            index = {path.relative_to(part).as_posix(): compute_file_hash(path, phase.advance) for path in files}
        about = {
            "format_version": FORMAT_VERSION,
            "stage": stage,
            "with_events": with_events,
            "licences": asdict(licences),
        }
        write_json(part / INDEX, {**about, "report": _read_report_hash(run_dir), "files": index})
    return folder


def check_export(folder: Path, run_dir: RunDir, licences: Licences, *, with_events: bool) -> bool:
    """Return whether a folder is a complete export of a run; False if it is empty or missing.

    Licences that are not stated may be any.

    Raises:
        ArtifactError: it is something else, damaged, or an export of another run or with other contents.
    """
    if not (folder / INDEX).exists():
        return False
    with explain_read_errors(folder):
        _read_index(folder, run_dir.path, check_space=False)
        about = read_json_file(folder / INDEX, "stage", "licences", "report", remedy="export again to a new folder")
        stage = find_stage(run_dir)
        path = folder / "records" / f"{stage}.json"
        is_same = about["stage"] == stage and path.exists() and _read_hash(path) == run_dir.read_content_hash(stage)
    if not is_same or about.get("with_events", True) != with_events:
        raise ArtifactError(
            f"{folder} is an export of another run, or {'without' if with_events else 'with'} events; choose a new "
            "folder, or remove it"
        )
    stated = {name: text for name, text in asdict(licences).items() if text != NOT_STATED}
    if about["licences"] != about["licences"] | stated or about["report"] != _read_report_hash(run_dir):
        raise ArtifactError(
            f"{folder}: the model card of this export has other licences, or the report of an earlier evaluation; "
            "choose a new folder, or remove it"
        )
    return True


def _read_report_hash(run_dir: RunDir) -> str | None:
    return read_hashes(run_dir, "eval").get("report.md")


def _read_hash(path: Path) -> str:
    return str(read_json_file(path, "content_hash", remedy="export again to a new folder")["content_hash"])


def import_model(folder: Path, run_dir: RunDir, *, trust_code: bool = False) -> RunDir:
    """Make a run directory from an export, for ``load_recommender``. It appears complete or not at all.

    It lacks the shards, which only training needs.

    Args:
        folder: output of ``export_model``.
        run_dir: new run directory.
        trust_code: accept code that the export names (``llm.trust_remote_code``, a ``cf.model`` of its own);
            ``load_recommender`` then runs it.

    Raises:
        ArtifactError: the export is incomplete, damaged, of another version, names code that is not trusted, or has a
            link or a name that leads out of it; or the run directory exists.
        ConfigError: its settings are not valid in this version.
        DiskError: its files do not fit on the disk.
    """
    with explain_read_errors(folder):
        return _import_model(folder, run_dir, trust_code)


def _import_model(folder: Path, run_dir: RunDir, trust_code: bool) -> RunDir:
    index = _read_index(folder, run_dir.path)
    config = load_run_config(folder / "config.yaml")
    if (code := list_code(config, folder / "config.yaml", folder / "cf")) and not trust_code:
        refuse_code(code, folder)
    config = change_settings(config, _OF_ONE_MACHINE | {"run.dir": str(run_dir.path)})
    with _make_whole(run_dir.path) as part:
        for name, expected in follow(list(index.items()), "import: copying and checking", "files"):
            place = _find_place(name)
            if place is not None:
                target = part / place
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, target)
                if compute_file_hash(target) != expected:  # changed or damaged since the check
                    raise ArtifactError(f"{folder / name} is damaged (its SHA-256 differs): copy the export again")
        (part / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    if trust_code:
        keep_trust_in_all(config, run_dir)
    return run_dir


def _remove_paths(part: Path, config: Config, run_dir: RunDir, records: Mapping[Step, dict[str, Any]]) -> None:
    """Remove this machine's paths from the settings, the records and the cards of an export.

    ``records`` has those that differ from the run's.
    """
    remover = PathRemover(config, run_dir)
    (part / "config.yaml").write_text(dump_config(remover.clean_config(config)), encoding="utf-8")
    for name in ("README.md", _CARD):
        path = part / name
        if path.exists():
            path.write_text(remover.clean_text(path.read_text(encoding="utf-8")), encoding="utf-8")
    for step in STEPS:
        path = part / "records" / f"{step}.json"
        if not path.exists():
            continue
        record, card = records.get(step) or run_dir.read_record(step), part / _CARD
        if step == "eval":  # an export has the report alone, in its card
            record.pop("files", None)
        write_json(path, remover.clean_record(record, {_CARD: compute_file_hash(card)} if card.exists() else {}))


def _list_sources(run_dir: RunDir) -> Iterator[tuple[Path, str]]:
    """Yield the files of an export and their names in it."""
    data_dir = run_dir.step_dir("data")
    needed = {data_dir / bucket.path for bucket in load_manifest(data_dir).buckets}
    needed |= {data_dir / name for name in ("users.parquet", "items.parquet", USER_TEXTS, ITEM_COUNTS)}
    needed |= set(run_dir.step_dir("cf").glob("*.safetensors"))
    for name, place in PLACES.items():
        source = run_dir.path / place
        if not place.endswith("/"):
            if source.exists():
                check_link(source, run_dir.path / PurePosixPath(place).parts[0])
                yield source, name
            continue
        for path in sorted(source.rglob("*")):
            if path.is_file() and (name in ("adapter/", "model/", "anchor/") or path in needed):
                check_link(path, run_dir.path / PurePosixPath(place).parts[0])
                yield path, name + path.relative_to(source).as_posix()


def _list_recorded(run_dir: RunDir) -> dict[Path, str]:
    """Return the recorded hashes of a run's files, after checking that none of the files is missing.

    An imported run lacks the shards, and the events if it was exported without them.
    """
    left_out: tuple[str, ...] = ("shards/",)
    if not load_manifest(run_dir.step_dir("data")).has_events:
        left_out += ("interactions/",)
    recorded = {
        run_dir.step_dir(step) / name: value
        for step in STEPS
        for name, value in read_hashes(run_dir, step).items()
        if not name.startswith(left_out) and (step != "eval" or name == "report.md")
    }
    for path in recorded:
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: restore it from a copy, or redo its step with --force")
    return recorded


def _find_place(name: str) -> str | None:
    """Return the place of an exported file in a run directory, None for files that only readers need."""
    if name in PLACES:
        return PLACES[name]
    head, _, rest = name.partition("/")
    return PLACES[f"{head}/"] + rest if f"{head}/" in PLACES else None


def _read_index(folder: Path, target: Path, *, check_space: bool = True) -> dict[str, str]:
    """Return the files of an export with their hashes, after checking names, sizes and hashes."""
    path = folder / INDEX
    if not path.exists():
        raise ArtifactError(f"{path} is missing: give the folder that launch/export_model.py wrote")
    remedy = "copy the export again"
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise ArtifactError(f"{path} has more than {_MAX_INDEX_BYTES >> 20} MiB, so it is not an index; {remedy}")
    record = read_json_file(path, "format_version", "files", remedy=remedy)
    with name_damage(path, remedy):
        version, files = record["format_version"], {str(name): str(value) for name, value in record["files"].items()}
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{path} has format version {version}, this release reads {FORMAT_VERSION}")
    for name in files:
        path_in_export = PurePosixPath(name)
        if path_in_export.is_absolute() or ".." in path_in_export.parts:
            raise ArtifactError(f"{path} names {name!r}, which is outside the export; obtain the export again")
        source = folder / name
        if not source.is_file() or not source.resolve().is_relative_to(folder.resolve() / path_in_export):
            raise ArtifactError(f"{source} is missing, or a link: copy the export again, with files in place of links")
    if check_space:
        _check_space(sum((folder / name).stat().st_size for name in files), target)  # sparse files may claim any size
    for name, expected in follow(list(files.items()), "import: checking", "files"):
        if compute_file_hash(folder / name) != expected:
            raise ArtifactError(f"{folder / name} is damaged (its SHA-256 is not that of {INDEX}): copy it again")
    return files


def _check_space(size: int, target: Path) -> None:
    parent = next(path for path in normalize(target).parents if path.exists())
    if size > (free := shutil.disk_usage(parent).free):
        raise DiskError(
            f"{target}: the export has {size / 2**20:,.1f} MiB, but {parent} has {free / 2**20:,.1f} MiB free; make "
            "space there, or choose another folder"
        )


@contextmanager
def _make_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is synced to disk and renamed once it is complete."""
    folder = normalize(folder)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ArtifactError(f"{folder} exists already; choose a new folder, or remove it")
    missing = list_missing(folder.parent)
    with ExitStack() as on_exit, explain_disk_errors(folder):
        on_exit.callback(remove_empty, missing)
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*part"):  # of a killed export or import
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
        # A new name, so that nobody can have put a link or a file in its place; known before the folder is there, so
        # that it is removed whenever an interruption comes.
        scratch = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.part"
        try:
            scratch.mkdir(mode=0o700)
            part = scratch / "whole"
            part.mkdir()
            yield part
            sync_files(part)
            part.replace(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
