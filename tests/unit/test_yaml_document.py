"""YAML documents of settings: the value of each literal, guards, and documents read back equal."""

import math

import pytest
import yaml
from ruamel.yaml.error import YAMLError

from collm_dist.config.yaml_document import dump_yaml, parse_value, parse_yaml

LITERALS = {
    "3": 3, "-3": -3, "+3": 3, "0": 0, "-0": 0, "1_000": 1000, "99999999999999999999": 99999999999999999999,
    "1e-3": 0.001, "1e5": 100000.0, "1E5": 100000.0, "1.5": 1.5, "1.": 1.0, ".5": 0.5, "-.5": -0.5, "+.5e3": 500.0,
    "1.5e+3": 1500.0, ".inf": math.inf, "-.inf": -math.inf, "1e400": math.inf,
    "true": True, "false": False, "null": None, "~": None, "": None,
    "007": "007", "08": "08", "0x10": "0x10", "0o17": "0o17", "0b11": "0b11", "_1": "_1", "1_": "1_", "1_0.5": "1_0.5",
    ".Inf": ".Inf", ".nan": ".nan", "nan": "nan", "1e": "1e", "e5": "e5", "1.2.3": "1.2.3", "1,000": "1,000",
    "True": "True", "TRUE": "TRUE", "Null": "Null", "yes": "yes", "no": "no", "on": "on", "off": "off", "y": "y",
    "12:30": "12:30", "1:30:00": "1:30:00", "2026-01-01": "2026-01-01", "2026-01-01 12:00:00": "2026-01-01 12:00:00",
    "=": "=", "'3'": "3", '"3"': "3", '"a\\nb"': "a\nb", "'it''s'": "it's", "a: b": {"a": "b"}, "a:b": "a:b",
    "a #b": "a", "C:\\x": "C:\\x", "s3://b/k?x=1#f": "s3://b/k?x=1#f", "!!str 5": "5", "!!float 1": 1.0,
    "[1e-3, yes, ~]": [0.001, "yes", None], "{a: 007, b: 1e5}": {"a": "007", "b": 100000.0},
    "{1: a, ~: b}": {1: "a", None: "b"},
    "a: |\n  x\n  y\n": {"a": "x\ny\n"}, "a: |-\n  x\n": {"a": "x"}, "a: >\n  x\n  y\n\n  z\n": {"a": "x y\nz\n"},
    "a: x\n  y\n": {"a": "x y"}, "a: 'x\n\n  y'\n": {"a": "x\ny"}, 'a: "x\\\n  y"\n': {"a": "xy"},
    "a: x\r\nb:\r\n  - c\r\n  -\r\n": {"a": "x", "b": ["c", None]}, "%YAML 1.1\n---\na: yes\n": {"a": "yes"},
    "a: &s {b: 1, c: 2}\nd: {<<: *s, b: 3}\n": {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}},
    "<<: [{a: 1}, {a: 2, b: 3}]\nc: 4\n": {"a": 1, "b": 3, "c": 4},
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), LITERALS.items(), ids=lambda value: repr(value)[:30])
def test_literals(text, value):
    parsed = parse_yaml(text)
    assert repr(parsed) == repr(value) or parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-.5", -0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("yes", "yes"),
        ("1e-3", 0.001),
        ("007", "007"),
        ("a: b", "a: b"),
        ("a #b", "a #b"),
        ("- 1", "- 1"),
        ("%x", "%x"),
        ("@x", "@x"),
        ("12:30", "12:30"),
        ("<<", "<<"),
        ("  [1, 2]", [1, 2]),
        ("{a: 1}", {"a": 1}),
        ("'3'", "3"),
        ("Liked: <ItemTitleList>. #Answer:", "Liked: <ItemTitleList>. #Answer:"),
        ("s3://bucket/a.parquet", "s3://bucket/a.parquet"),
    ],
)
def test_values_of_overrides(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\na: 2\n", "duplicate key 'a', first in line 1"),
        ("s: &s {a: 1}\nt: {<<: *s, b: 1, b: 2}\n", "duplicate key 'b'"),
        ("<<: {a: 1}\n<<: {b: 1}\n", "duplicate key '<<'"),
        ("<<: 3\n", "expected a mapping or list of mappings for merging"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a:\n\tb: 1\n", "cannot start any token"),
        ("a: b: c\n", "mapping values are not allowed here"),
        ("a: *x\n", "undefined alias"),
        ("a: !x 1\n", "not of type !x"),
    ],
)
def test_refused_documents(text, problem):
    with pytest.raises(YAMLError) as caught:
        parse_yaml(text)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "value", ["yes", "off", "null", "~", "1", "1e5", "1e-5", "007", "0x10", "12:30", "2026-01-01", "=", "<<", "a\nb"]
)
def test_dumped_strings_are_strings_for_any_reader(value):
    text = dump_yaml({"key": value, value: [value]})
    assert parse_yaml(text) == yaml.safe_load(text) == {"key": value, value: [value]}


def test_form_of_a_dump():
    shared = [1, 2.5e-7]
    document = {"z": {"score": "yes", "x": None, "w": True}, "a": shared, "b": shared, "c": [], "d": {}, "e": "x\ny"}
    assert dump_yaml(document) == (
        "z:\n  score: 'yes'\n  x: null\n  w: true\na:\n- 1\n- 2.5e-07\nb:\n- 1\n- 2.5e-07\nc: []\nd: {}\ne: \"x\\ny\"\n"
    )
