"""ARCHITECTURE.md: the files it names exist, and a training step needs few of them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
PACKAGE_FILES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "collm_dist").rglob("*") if path.is_file()]
MAX_FILES_OF_A_STEP = 18


def test_every_file_that_it_names_exists():
    named = {name for name in re.findall(r"`([\w/]+\.(?:py|txt))`", PAGE) if not name.startswith(("launch/", "tests/"))}
    assert len(named) > 40
    for name in sorted(named):
        assert any(path == name or path.endswith(f"/{name}") for path in PACKAGE_FILES), name
    for name in re.findall(r"`((?:launch|tests)/[\w/.]+)`", PAGE):
        assert (ROOT / name).exists(), name


def test_rooms_are_those_of_the_package():
    rooms = {path.parent.name for path in (ROOT / "collm_dist").glob("*/__init__.py")}
    described = set(re.findall(r"\b(\w+)/", PAGE.split("```text")[1].split("```")[0])) - {"launch", "benchmarks"}
    assert rooms == described


def test_a_training_step_is_understood_from_few_files():
    (section,) = re.findall(r"## Follow one training step\n(.*?)\n## ", PAGE, re.S)
    steps = "\n".join(line for line in section.splitlines() if re.match(r"\d+\. ", line))
    files = set(re.findall(r"`([\w/]+\.py)`", steps))
    assert len(files) <= MAX_FILES_OF_A_STEP
    (stated_count,) = re.findall(r"These are (\d+) files", section)
    assert int(stated_count) == len(files)
