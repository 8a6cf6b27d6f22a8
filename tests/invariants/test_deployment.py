"""Image, lock files and manifests, checked without Docker, Kubernetes and Slurm."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "launch" / "cluster"
SCRIPTS = [*sorted(CLUSTER.glob("*.sh")), ROOT / ".ci" / "run"]
BIN = Path(sys.executable).parent
PYTHONS = ("3.11", "3.12")

# Of the API reference of KubeRay 1.4 (ray.io/v1: RayJobSpec, RayClusterSpec, HeadGroupSpec, WorkerGroupSpec) and of
# Kubernetes 1.28's core/v1: the fields that our manifests use, each with the type of its value. A list has the form of
# its elements; a mapping of free keys has the key "*".
POD = {
    "spec": {
        "securityContext": {
            "runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "fsGroup": int, "seccompProfile": {"type": str},
        },
        "containers": [{
            "name": str, "image": str, "env": [{"name": str, "value": str}],
            "securityContext": {"allowPrivilegeEscalation": bool, "capabilities": {"drop": [str]}},
            "resources": {"requests": {"*": str}, "limits": {"*": str}},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }],
        "volumes": [{
            "name": str, "persistentVolumeClaim": {"claimName": str}, "emptyDir": {"medium": str, "sizeLimit": str},
        }],
    },
}  # fmt: skip
FORMS = {
    "RayJob": {
        "apiVersion": str, "kind": str, "metadata": {"name": str},
        "spec": {
            "entrypoint": str, "backoffLimit": int, "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int,
            "submissionMode": str,
            "rayClusterSpec": {
                "rayVersion": str,
                "headGroupSpec": {"rayStartParams": {"*": str}, "template": POD},
                "workerGroupSpecs": [{
                    "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int,
                    "rayStartParams": {"*": str}, "template": POD,
                }],
            },
        },
    },
    "PersistentVolumeClaim": {
        "apiVersion": str, "kind": str, "metadata": {"name": str},
        "spec": {"accessModes": [str], "resources": {"requests": {"*": str}}},
    },
}  # fmt: skip


def check_form(value, form, place):
    if isinstance(form, dict):
        assert isinstance(value, dict), place
        for key, entry in value.items():
            assert key in form or "*" in form, f"{place}.{key} is not a field that is known here"
            check_form(entry, form.get(key, form.get("*")), f"{place}.{key}")
    elif isinstance(form, list):
        assert isinstance(value, list), place
        for entry in value:
            check_form(entry, form[0], f"{place}[]")
    else:
        assert type(value) is form, f"{place}: {value!r} is no {form.__name__}"


def load_lock(name: str) -> dict[str, Requirement]:
    """Return the pins of a lock file by name; every one of them must have hashes."""
    text = (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8")
    entries = text.replace("\\\n", " ").splitlines()
    assert all(re.search(r" --hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    pins = [Requirement(entry.partition(" --hash")[0]) for entry in entries]
    assert all(len(pin.specifier) == 1 and pin.url is None and str(pin.specifier).startswith("==") for pin in pins)
    return {canonicalize_name(pin.name): pin for pin in pins}


def get_dependencies() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_locks_satisfy_the_project_and_name_no_registry(name):
    pins = load_lock(name)
    assert "://" not in (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8")
    expected = [dependency for dependency in get_dependencies() if (name, dependency.name) != ("cpu", "torch")]
    for requirement in expected:
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(next(iter(pin.specifier)).version), (
            f"{pin} is not {requirement}; run: make lock"
        )
        for python in PYTHONS:
            surroundings = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
            assert pin.marker is None or pin.marker.evaluate(surroundings), pin
    from_torch = [name for name in pins if name.startswith(("nvidia-", "cuda-", "torch", "triton"))]
    assert bool(from_torch) == (name == "gpu")


def test_locks_agree():
    gpu, cpu = load_lock("gpu"), load_lock("cpu")
    assert {name: str(pin) for name, pin in cpu.items()} == {name: str(gpu[name]) for name in cpu}


def test_the_image_is_made_of_what_is_there():
    """Every source exists and passes .dockerignore, which excludes everything by default; no argument is a secret."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert ignore[1] == "*"
    sources = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {"collm_dist/", "requirements/", "pyproject.toml"} <= set(sources)
    for name in sources:
        assert (ROOT / name).exists(), name
        assert f"!{name.rstrip('/')}" in ignore, name
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == [line.split("--uid ")[1].split()[0] for line in lines if "useradd" in line]
    assert users != ["0"]
    (command,) = (line for line in lines if line.startswith("CMD "))
    assert (ROOT / yaml.safe_load(command.removeprefix("CMD "))[1]).is_file()
    for lock in ("gpu", "cpu"):
        assert (ROOT / "requirements" / f"{lock}.lock").is_file()


@pytest.mark.parametrize(
    ("tool", "files"),
    [("hadolint", [ROOT / "Dockerfile"]), ("shellcheck", SCRIPTS), ("bash", SCRIPTS)],
    ids=["hadolint", "shellcheck", "bash"],
)
def test_linters_have_nothing_to_say(tool, files):
    assert files
    program = shutil.which(tool, path=f"{BIN}:/usr/bin:/bin")
    assert program, f"{tool} is missing: pip install -e '.[dev]'"
    for path in files:
        done = subprocess.run([program, *(["-n"] if tool == "bash" else []), path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def load_manifest() -> dict[str, dict]:
    documents = yaml.safe_load_all((CLUSTER / "kuberay_rayjob.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def test_the_manifest_has_the_form_of_its_kinds():
    manifest = load_manifest()
    assert set(manifest) == set(FORMS)
    for kind, document in manifest.items():
        check_form(document, FORMS[kind], kind)
    assert manifest["RayJob"]["apiVersion"] == "ray.io/v1"


def test_the_manifest_fits_the_image_and_the_locks():
    manifest = load_manifest()
    cluster = manifest["RayJob"]["spec"]["rayClusterSpec"]
    assert load_lock("gpu")["ray"].specifier.contains(cluster["rayVersion"])
    user = int(re.search(r"^USER (\d+)", (ROOT / "Dockerfile").read_text(), re.M)[1])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        assert container["image"] == f"collm-dist:{version}"
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == user
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {entry["name"] for entry in container["volumeMounts"]} == {entry["name"] for entry in pod["volumes"]}
        claims = [entry["persistentVolumeClaim"]["claimName"] for entry in pod["volumes"] if "emptyDir" not in entry]
        assert claims == [manifest["PersistentVolumeClaim"]["metadata"]["name"]]
    assert manifest["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    mounts = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    shared = next(mount["mountPath"] for mount in mounts if mount["name"] == "runs")
    assert f" run.dir={shared}/" in manifest["RayJob"]["spec"]["entrypoint"]


def list_commands() -> dict[str, str]:
    """The commands that manifests and scripts run, as their first lines show how to start them."""
    commands = {"kuberay_rayjob.yaml": load_manifest()["RayJob"]["spec"]["entrypoint"]}
    text = (CLUSTER / "slurm.sh").read_text(encoding="utf-8")
    (usage,) = re.findall(r"^#   .*slurm.sh (.*)$", text, re.M)
    (line,) = re.findall(r"^(python launch/.*?) &$", text, re.M)
    commands["slurm.sh"] = line.replace('"$@"', usage)
    return commands


@pytest.mark.parametrize(("place", "command"), list_commands().items(), ids=list_commands())
def test_commands_in_manifests_are_real(place, command, monkeypatch, capsys):
    """They go through with ``--dry-run``, in this process, by the very words that a shell would make of them."""
    words = shlex.split(command)
    assert words[0] == "python"
    assert not re.search(r"[$`;|<>()\[\]{}*?]", command), f"{place}: a shell would read {command} otherwise"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*words[1:], "--dry-run"])
    from launch.run_pipeline import main

    assert main() == 0
    printed = capsys.readouterr().out
    assert "stage2" in printed
    assert "tuning: ray" in printed
