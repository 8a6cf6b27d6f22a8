"""Settings of earlier versions: ignored at their defaults, which an old run's ``config.yaml`` holds, else refused."""

from __future__ import annotations

from typing import Any

# Dotted name: default value, and the remedy.
_REMOVED: dict[str, tuple[Any, str]] = {
    "cluster.hostfile": (
        None,
        "pipelines no longer run over ssh; set cluster.tuning to ray, or start a stage at a time with deepspeed "
        "--hostfile (docs/cluster.md)",
    ),
    "cluster.master_address": (None, "give --master_addr to deepspeed --hostfile (docs/cluster.md)"),
}


def drop_removed_settings(document: dict[str, Any]) -> list[str]:
    """Delete removed settings from a document and return an error for each that is not at its default."""
    errors = []
    for dotted, (default, remedy) in _REMOVED.items():
        *parents, last = dotted.split(".")
        section: Any = document
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and last in section:
            value = section.pop(last)
            if value != default:
                errors.append(f"{dotted}: no such setting any more: {remedy}")
    return errors
