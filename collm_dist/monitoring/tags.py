"""Tags of logged values, ``group/name_unit``, and the layout of TensorBoard's custom scalars."""

from __future__ import annotations

TRAIN_LOSS = "train/loss"
TRAIN_LOSS_BCE = "train/loss_bce"
TRAIN_LOSS_PAIRWISE = "train/loss_pairwise"
TRAIN_LOSS_LISTWISE = "train/loss_listwise"
LEARNING_RATE = "train/learning_rate"
GRAD_NORM = "train/grad_norm"
SAMPLES_PER_SECOND = "speed/samples_per_second"
TOKENS_PER_SECOND = "speed/tokens_per_second_per_device"
STEP_SECONDS = "speed/step_seconds"
EPOCH_SECONDS = "speed/epoch_seconds"
DATA_WAIT_SHARE = "speed/data_wait_share"
PEAK_MEMORY = "memory/peak_gib"
TOTAL_MEMORY = "memory/total_gib"
VALID_AUC = "valid/auc"
VALID_UAUC = "valid/uauc"
VALID_LOGLOSS = "valid/logloss"
# With a cutoff, as in valid/ndcg@10.
VALID_NDCG = "valid/ndcg"
VALID_HR = "valid/hr"

# Category -> chart -> tags. A chart draws one line per tag, step and run.
LAYOUT: dict[str, dict[str, tuple[str, ...]]] = {
    "loss": {
        "training loss": (TRAIN_LOSS,),
        "training loss and validation log-loss": (TRAIN_LOSS, VALID_LOGLOSS),
        "terms of the training loss": (TRAIN_LOSS_BCE, TRAIN_LOSS_PAIRWISE, TRAIN_LOSS_LISTWISE),
        "gradient norm": (GRAD_NORM,),
        "learning rate": (LEARNING_RATE,),
    },
    "quality": {
        "validation AUC and UAUC": (VALID_AUC, VALID_UAUC),
        "validation log-loss": (VALID_LOGLOSS,),
        "validation NDCG and hit rate": (VALID_NDCG, VALID_HR),
    },
    "speed": {
        "samples per second": (SAMPLES_PER_SECOND,),
        "tokens per second per device": (TOKENS_PER_SECOND,),
        "seconds per step, or per epoch of the CF model": (STEP_SECONDS, EPOCH_SECONDS),
        "share of time spent waiting for data": (DATA_WAIT_SHARE,),
    },
    "memory": {"peak and total, GiB": (PEAK_MEMORY, TOTAL_MEMORY)},
}


# TensorBoard sorts charts by name: losses and validation come first, so these groups have names below them.
_LAST_GROUPS = {"speed/": "work/", "memory/": "work/memory_"}


def name_scalar(tag: str) -> str:
    """Return the name of a tag's chart in TensorBoard."""
    for group, name in _LAST_GROUPS.items():
        if tag.startswith(group):
            return tag.replace(group, name, 1)
    return tag


def build_layout() -> dict[str, dict[str, list[object]]]:
    """Return the layout for ``SummaryWriter.add_custom_scalars``, whose tags are regular expressions.

    Logs of version 0.1 have the tags themselves as names.
    """

    def match(tag: str) -> str:
        names = dict.fromkeys((name_scalar(tag), tag))
        return f"({'|'.join(names)})(@[0-9]+)?$"

    return {
        category: {title: ["Multiline", [match(tag) for tag in tags]] for title, tags in charts.items()}
        for category, charts in LAYOUT.items()
    }
