"""Files of TensorBoard's embedding projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from collm_dist.runs.atomic_files import open_atomic


@dataclass(frozen=True)
class VectorSet:
    """One tensor of the projector.

    Attributes:
        name: shown in the projector; with hyphens for spaces, the name of the file.
        vectors: (N, D).
    """

    name: str
    vectors: NDArray[np.floating]


def write_projector(folder: Path, sets: Sequence[VectorSet], columns: Mapping[str, Sequence[object]]) -> None:
    """Write the projector's files.

    Args:
        folder: folder of the event files.
        sets: tensors of N vectors each, all of the same N objects.
        columns: two or more metadata columns of N cells by title; the first is the label.
    """
    from google.protobuf import text_format
    from tensorboard.plugins.projector.metadata import PROJECTOR_FILENAME
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    with open_atomic(folder / "projector" / "metadata.tsv") as file:
        file.write("\t".join(columns) + "\n")
        for row in zip(*columns.values(), strict=True):
            # A tab or a line break in a title would start another column or row.
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
