"""Vectors with names, for TensorBoard's embedding projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from collm_dist.runs.atomic_files import open_atomic


@dataclass(frozen=True)
class VectorSet:
    """Vectors that are shown together.

    Attributes:
        name: what the projector calls them, and, with hyphens for blanks, their file.
        vectors: (N, D).
    """

    name: str
    vectors: NDArray[np.floating]


def write_projector(folder: Path, sets: Sequence[VectorSet], columns: Mapping[str, Sequence[object]]) -> None:
    """Write what the projector reads, below a folder of event files.

    Args:
        folder: of the event files.
        sets: of N vectors each, for the same N things.
        columns: two or more names or numbers of each thing, by what they are; the first is the label.
    """
    from google.protobuf import text_format
    from tensorboard.plugins.projector.metadata import PROJECTOR_FILENAME
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    with open_atomic(folder / "projector" / "metadata.tsv") as file:
        file.write("\t".join(columns) + "\n")
        for row in zip(*columns.values(), strict=True):
            # A tab or a line break of a title would be another column or row.
            file.write("\t".join(" ".join(str(cell).split()) or "-" for cell in row) + "\n")
    config = ProjectorConfig()
    for vector_set in sets:
        name = f"{vector_set.name.replace(' ', '-')}.tsv"
        with open_atomic(folder / "projector" / name) as file:
            np.savetxt(file, vector_set.vectors, fmt="%.5g", delimiter="\t")
        config.embeddings.add(
            tensor_name=vector_set.name,
            tensor_shape=vector_set.vectors.shape,
            tensor_path=f"projector/{name}",
            metadata_path="projector/metadata.tsv",
        )
    with open_atomic(folder / PROJECTOR_FILENAME) as file:
        file.write(text_format.MessageToString(config))
