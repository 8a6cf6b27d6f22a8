"""Import rules, checked in the source: layers, and libraries that only some rooms may import."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "collm_dist"

BASE = (
    "errors",
    "metrics",
    "random_keys",
    "distributed",
    "prompt_batch",
    "storage",
    "config",
    "runs",
    "monitoring",
    "phases",
    "cli",
    "assets",
)
# A room may import rooms of lower levels; of its own level only itself. The base rooms may import each other.
LEVELS = {
    **dict.fromkeys(BASE, 0),
    "data": 1,
    "llm": 1,
    "cf": 2,
    "anchor": 3,
    "tuning": 4,
    "evaluation": 5,
    "serving": 6,
    "orchestration": 7,
    "commands": 8,
}
# llm takes tensors and a protocol; it knows neither the collaborative models nor the data.
FORBIDDEN = {"llm": {"cf", "data"}}

# Library: files, or folders that end in a slash, below collm_dist/.
WALLS = {
    "ray": ("orchestration/",),
    "deepspeed": ("tuning/engine.py",),
    "peft": ("llm/lora.py",),
    "webdataset": ("data/shards/",),
    "tensorboard": ("monitoring/",),
    "mlflow": ("monitoring/mlflow_run.py",),
    "huggingface_hub": ("serving/hub.py",),
    "prometheus_client": ("monitoring/prometheus.py",),
    "deltalake": ("data/ingest/delta_tables.py",),
    "pyiceberg": ("data/ingest/iceberg_tables.py",),
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def list_imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_room(dotted: str) -> str:
    """Return the room of a module, given its name below the package."""
    return dotted.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path):
    room = find_room(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    if room == "__init__":
        return
    assert room in LEVELS, f"{path} is in no layer: tell this test where it belongs"
    for name in list_imports(path):
        if not name.startswith("collm_dist."):
            continue
        other = find_room(name.removeprefix("collm_dist."))
        if other in (room, "__version__"):
            continue
        same_base = LEVELS[room] == LEVELS[other] == 0
        assert same_base or LEVELS[other] < LEVELS[room], f"{path.name}: '{room}' must not import '{other}'"
        assert other not in FORBIDDEN.get(room, ()), f"{path.name}: '{room}' must not import '{other}'"


def test_what_a_run_directory_is_needs_neither_ray_nor_torch():
    for path in (PACKAGE / "runs").glob("*.py"):
        assert not {name.split(".")[0] for name in list_imports(path)} & {"ray", "torch"}, path


def test_a_file_name_stands_for_one_thing():
    names = Counter(path.stem for path in MODULES if path.stem != "__init__")
    assert not {name for name, count in names.items() if count > 1}


@pytest.mark.parametrize("library", WALLS)
def test_walls(library):
    for path in MODULES:
        place = path.relative_to(PACKAGE).as_posix()
        allowed = any(place == wall or (wall.endswith("/") and place.startswith(wall)) for wall in WALLS[library])
        for name in list_imports(path):
            parts = name.split(".")
            is_library = parts[0] == library or (library == "tensorboard" and "tensorboard" in parts)
            assert allowed or not is_library, f"{place} imports {name}: only {', '.join(WALLS[library])} may"


def test_launch_imports_no_library_of_its_own():
    standard = {"__future__", "argparse", "json", "sys", "pathlib", "typing", "collections"}
    for path in (ROOT / "launch").glob("*.py"):
        assert {name.split(".")[0] for name in list_imports(path)} <= standard | {"collm_dist"}, path
