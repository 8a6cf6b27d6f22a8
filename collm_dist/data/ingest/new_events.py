"""Parts of new events beside the log (``dataset.new_events``), of which there are more every hour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collm_dist.config import DatasetConfig
from collm_dist.storage import list_files


def list_new_events(dataset: DatasetConfig) -> list[str]:
    """Return the parts in sorted order, none without the setting.

    Raises:
        DataError: the folder does not exist.
    """
    uri = dataset.new_events
    return [] if uri is None else list_files(uri, "dataset.new_events", may_be_empty=True)


def leave_out_later_parts(
    dataset: DatasetConfig, inputs: Mapping[str, Any], recorded: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the inputs of a data step without the parts that arrived after it was done; all of them before that.

    Args:
        dataset: the settings.
        inputs: entry of each input file by URI.
        recorded: fingerprint of the finished step, empty before that, in which names begin with ``input.``.
    """
    if not recorded:
        return dict(inputs)
    later = {uri for uri in list_new_events(dataset) if f"input.{uri}" not in recorded}
    return {uri: entry for uri, entry in inputs.items() if uri not in later}
