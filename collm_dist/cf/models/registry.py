"""Model classes by name or import path, and their constructor arguments."""

from __future__ import annotations

import difflib
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

# Constructor parameters of every class. Built-in classes get their others from settings (``list_arguments``), custom
# classes from ``cf.arguments``.
_COMMON_ARGUMENTS = ("num_users", "num_items", "embedding_dim", "history_length")


def get_model_class(name: str) -> type[TrainableCfModel]:
    """Return the class of a name or of an import path, ``package.module:Class``.

    Raises:
        ConfigError: the class does not exist or is not a subclass of ``TrainableCfModel``.
    """
    if name in MODEL_CLASSES:
        return MODEL_CLASSES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        matches = difflib.get_close_matches(name, MODEL_CLASSES, n=1)
        hint = f"; did you mean {matches[0]}?" if matches else ""
        raise ConfigError(
            f"cf.model: '{name}' is neither one of {', '.join(MODEL_CLASSES)} nor an import path, package.module:Class"
            + hint
        )
    try:
        model_class = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cf.model: '{name}' cannot be imported ({error}); is its folder on PYTHONPATH?") from error
    if not (isinstance(model_class, type) and issubclass(model_class, TrainableCfModel)):
        raise ConfigError(f"cf.model: '{name}' is not a subclass of collm_dist.cf.models.TrainableCfModel")
    return model_class


def check_tuning(name: str) -> None:
    """Check that stage 2 can train a model.

    Raises:
        ConfigError: the class sets ``supports_tuning`` to False; see also ``get_model_class``.
    """
    if not get_model_class(name).supports_tuning:
        raise ConfigError(f"stage2.train_cf: stage 2 cannot train cf.model '{name}' (its class sets supports_tuning to "
                          "False); set stage2.train_cf to false")  # fmt: skip


def list_arguments(cf: CfConfig, max_history_length: int, seed: int) -> dict[str, Any]:
    """Return the constructor arguments of a model except the numbers of users and items: plain JSON values.

    A new built-in model needs an entry here and in ``MODEL_CLASSES``.
    """
    common = {
        "embedding_dim": cf.embedding_dim,
        "history_length": cf.history_length or max_history_length,
    }
    by_model: dict[str, dict[str, Any]] = {
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
    return common | (by_model[cf.model] if cf.model in MODEL_CLASSES else dict(cf.arguments))


def check_arguments(cf: CfConfig) -> None:
    """Check ``cf.arguments`` against the constructor of the model's class.

    Raises:
        ConfigError: an argument is unknown or missing; see also ``get_model_class``.
    """
    signature = inspect.signature(get_model_class(cf.model))
    try:
        signature.bind(0, 0, **list_arguments(cf, 1, 0))
    except TypeError as error:
        names = [name for name in signature.parameters if name not in _COMMON_ARGUMENTS]
        raise ConfigError(f"cf.arguments: {error}; '{cf.model}' takes {', '.join(names) or 'no arguments'}") from error
