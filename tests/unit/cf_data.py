"""CF models of every kind on the small data step, to score or to train."""

from dataclasses import replace

import torch

from collm_dist.cf.cross_fit import fit_job
from collm_dist.cf.fitting import build_plan, build_untrained
from collm_dist.cf.jobs import Job
from collm_dist.cf.model_export import export_models
from collm_dist.cf.user_shards import count_contexts, load_worker_data, number_contexts, number_globally
from collm_dist.config import CfConfig
from collm_dist.data.shards.manifest import load_manifest

MODELS = ("mf", "lightgcn", "sasrec", "din")
SETTINGS = {
    "embedding_dim": 6,
    "history_length": 8,
    "num_heads": 2,
    "attention_sizes": (7, 5),
    "hidden_sizes": (9, 4),
    "global_batch_size": 64,
    "learning_rate": 1e-2,
    "weight_decay": 1.0,
    "num_epochs": 6,
    "early_stop_patience": 6,
    "checkpoint_every_epochs": 2,
}


def make_cf(model, **settings) -> CfConfig:
    return CfConfig(model=model, **SETTINGS | settings)


def load_data(run_dir):
    """Return (manifest, data of a single worker) of a finished data step."""
    data_dir = run_dir.step_dir("data")
    manifest = load_manifest(data_dir)
    data = load_worker_data(data_dir, manifest)
    splits = {name: number_globally(rows, data.users) for name, rows in data.splits.items()}
    return manifest, replace(data, splits=splits)


def load_workers(run_dir, world_size, split):
    """Return the (users, rows) of every worker, as ``number_globally`` would return them to each."""
    data_dir = run_dir.step_dir("data")
    manifest = load_manifest(data_dir)
    parts = [load_worker_data(data_dir, manifest, rank, world_size) for rank in range(world_size)]
    counts = [count_contexts(part.splits[split], part.users) for part in parts]
    total_rows = sum(len(part.splits[split].label) for part in parts)
    return [
        (part.users, replace(number_contexts(part.splits[split], part.users, counts), total_rows=total_rows))
        for part in parts
    ]


def build(run_dir, cf, *, seed=0, spread=0.3):
    """Return (untrained model in evaluation mode, data); no weight has a special value such as zero."""
    manifest, data = load_data(run_dir)
    model = build_untrained(cf, manifest, data.users, data.splits["train"], seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("_norm.weight", "_norm.bias")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
        model.users.weight[~model.users.known] = 0
    model.prepare(data.splits["train"])
    model.refresh()
    return model.eval(), data


def make_plan(cf, seed=0):
    return build_plan(cf, seed)


def fit_and_export(run_dir, cf, folder, fold_starts=(), seed=0, item_text=None):
    """Train in this process and write the model files like the CF step; return their hash."""
    data_dir = run_dir.step_dir("data")
    job = Job(data_dir, folder, "key", cf, seed, tuple(fold_starts), item_text=item_text)
    fit_job(job, torch.device("cpu"), 0, 1, lambda *_: None)
    return export_models(job, run_dir.step_dir("cf"), load_manifest(data_dir))
