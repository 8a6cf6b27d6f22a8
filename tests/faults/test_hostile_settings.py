"""Malicious or damaged settings: refused with file and line, or with the name of the setting, never a traceback.

Elsewhere: ordinary errors (tests/unit/test_config_loader.py), row filters (tests/unit/test_readers.py).
"""

import time

import pytest

from collm_dist.config.loader import MAX_SHOWN_ERRORS, dump_config, load_config
from collm_dist.config.yaml_document import MAX_VALUES
from collm_dist.config.yaml_file import MAX_BYTES
from collm_dist.data.prompts.prompt_template import load_prompt_text
from collm_dist.errors import ConfigError

GOOD = "run: {dir: runs/x}\ndataset: {path: a.csv, columns: {rating: stars}}\n"
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def load(tmp_path, text, *overrides):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, rf":8: more than {MAX_VALUES:,} values"),
        ("x: &a [*a]", ":3: an alias inside its own anchor"),
        ("cf: &a {<<: *a}", ":3: an alias inside its own anchor"),
        ("x: " + "[" * 1000, "nested too deeply"),
        ("x: " + "{a: " * 1000, "nested too deeply"),
        ("stage1: {max_steps: " + "9" * 5000 + "}", ":3: the value is not of type int"),
        ("cf: !!int many", ":3: the value is not of type int"),
        ("cf: !!bool perhaps", ":3: the value is not of type bool"),
        ("cf: !!timestamp someday", ":3: the value is not of type timestamp"),
        ("cf: !!map x", ":3: the value is not of type map"),
        ("cf: !!python/object/apply:os.system [ls]", ":3: the value is not of type python/object/apply:os.system"),
        ('prompt: {stage1: "\\ud800"}', ":3: a NUL character or half a surrogate pair"),
        ('llm: {backbone: "a\\0b"}', ":3: a NUL character or half a surrogate pair"),
        ('x: "\\U00110000"', "beyond the last Unicode character"),
        ("cf: {[1]: 2}", ":3: a list or mapping as a key"),
        ("1: 2", "1: Keys should be strings"),
        ("stage1: {learning_rate: 1e999}", r"stage1\.learning_rate: should be a finite number"),
        ("cluster: {deepspeed_extra: {1: 2}}", r"cluster\.deepspeed_extra\.1"),
    ],
    ids=lambda value: value[:30],
)
def test_hostile_yaml(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, GOOD + text + "\n")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (GOOD.encode("utf-16"), "is not UTF-8 .*save it as UTF-8"),
        (GOOD.encode() + b"x: caf\xe9\n", "is not UTF-8"),
        (GOOD.encode() + b"\x00", "special characters are not allowed"),
        (GOOD.encode() + b"#" * MAX_BYTES, "more than 256 KiB"),
    ],
)
def test_files_that_are_not_settings(tmp_path, data, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, data)


def test_endless_and_impossible_files(tmp_path):
    for path, message in (("/dev/zero", "more than 256 KiB"), ("a\0b", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            load_config(path)


def test_very_many_errors_are_counted_and_the_first_are_shown(tmp_path):
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD + "".join(f"k{number}: 1\n" for number in range(5000)))
    lines = str(caught.value).splitlines()
    assert "5000 errors" in lines[0]
    assert lines[-1].strip() == f"and {5000 - MAX_SHOWN_ERRORS} more"
    assert len(lines) == MAX_SHOWN_ERRORS + 2
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("x=" + "[" * 1000, "x: malformed list, mapping or quoted string"),
        ("stage1.max_steps=!!int abc", r"stage1\.max_steps: should be a valid integer"),
        ("stage1.max_steps=[!!int abc]", r"stage1\.max_steps: "),
        ("run.dir=\udcff", "is not UTF-8"),
        ("a" + ".a" * 5000 + "=1", "settings are not nested that deeply"),
        (f"run.seed={2**64}", r"run\.seed: should be less than or equal"),
        ("dataset.split.test_months=[29, 99999999999999999999]", r"dataset\.split: a window of months"),
    ],
    ids=lambda value: value[:30],
)
def test_hostile_overrides(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, GOOD, override)


def test_an_alias_is_a_copy(tmp_path):
    text = GOOD + "stage1: &s {warmup_steps: 3}\nstage2: *s\ncluster: {deepspeed_extra: {a: &d {x: 1}, b: *d}}\n"
    config = load(tmp_path, text, "stage1.warmup_steps=9", "cluster.deepspeed_extra.a.x=2")
    assert (config.stage1.warmup_steps, config.stage2.warmup_steps) == (9, 3)
    assert config.cluster.deepspeed_extra == {"a": {"x": 2}, "b": {"x": 1}}
    assert "&" not in dump_config(config)


def test_prompts_that_are_neither_a_string_nor_a_file(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for spec in ("Would they like it? " * 50, str(tmp_path / "latin.txt")):
        with pytest.raises(
            ConfigError, match=r"prompt: .* cannot be read \(.*\), and it is not a prompt: it has no field"
        ):
            load_prompt_text(spec)
