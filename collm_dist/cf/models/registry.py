"""Which class a model's name stands for, and what it is built with."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from collm_dist.cf.models.din import Din
from collm_dist.cf.models.id_tokens import IdTokens
from collm_dist.cf.models.interface import TrainableCfModel
from collm_dist.cf.models.lightgcn import LightGcn
from collm_dist.cf.models.mf import MatrixFactorization
from collm_dist.cf.models.sasrec import SasRec
from collm_dist.cf.models.vector_table import VectorTable
from collm_dist.config import CfConfig
from collm_dist.errors import ConfigError

MODEL_CLASSES: dict[str, type[TrainableCfModel]] = {
    "mf": MatrixFactorization,
    "lightgcn": LightGcn,
    "sasrec": SasRec,
    "din": Din,
    "table": VectorTable,
    "none": IdTokens,
}

# What every class is built with, whatever the arguments.
_GIVEN = ("num_users", "num_items", "embedding_dim", "history_length")


def get_model_class(name: str) -> type[TrainableCfModel]:
    """Return the class of a name or of an import path, ``package.module:Class``.

    Raises:
        ConfigError: there is none, or it is no ``TrainableCfModel``.
    """
    if name in MODEL_CLASSES:
        return MODEL_CLASSES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"cf.model: '{name}' is none of {', '.join(MODEL_CLASSES)}, nor an import path, package.module:Class"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cf.model: '{name}' cannot be imported ({error}); is its folder on PYTHONPATH?") from error
    if not (isinstance(found, type) and issubclass(found, TrainableCfModel)):
        raise ConfigError(f"cf.model: '{name}' is not a subclass of collm_dist.cf.models.TrainableCfModel")
    return found


def check_tuning(name: str) -> None:
    """Refuse a model that stage 2 cannot go on training.

    Raises:
        ConfigError: its class says so; see also ``get_model_class``.
    """
    if not get_model_class(name).supports_tuning:
        raise ConfigError(f"stage2.train_cf: cf.model '{name}' says that stage 2 cannot train it (supports_tuning); "
                          "set stage2.train_cf to false")  # fmt: skip


def list_arguments(cf: CfConfig, max_history_length: int, seed: int) -> dict[str, Any]:
    """Return what a model's class is built with beside the numbers of users and items: plain JSON values."""
    common = {
        "embedding_dim": cf.embedding_dim,
        "history_length": cf.history_length or max_history_length,
    }
    own: dict[str, dict[str, Any]] = {
        "mf": {"prior_precision": cf.weight_decay},
        "lightgcn": {"num_layers": cf.num_layers},
        "sasrec": {"num_layers": cf.num_layers, "num_heads": cf.num_heads, "dropout": cf.dropout, "seed": seed},
        "din": {
            "attention_sizes": list(cf.attention_sizes),
            "hidden_sizes": list(cf.hidden_sizes),
            "dropout": cf.dropout,
            "seed": seed,
        },
        "table": {},
        "none": {},
    }
    return common | own.get(cf.model, dict(cf.arguments))


def check_arguments(cf: CfConfig) -> None:
    """Refuse arguments that the model's class does not take, or lacks.

    Raises:
        ConfigError: the message says what the class takes; see also ``get_model_class``.
    """
    signature = inspect.signature(get_model_class(cf.model))
    try:
        signature.bind(0, 0, **list_arguments(cf, 1, 0))
    except TypeError as error:
        names = [name for name in signature.parameters if name not in _GIVEN]
        raise ConfigError(f"cf.arguments: {error}; '{cf.model}' takes {', '.join(names) or 'none'}") from error
