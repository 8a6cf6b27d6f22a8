"""Settings of machines and processes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from collm_dist.config.section import Section, operational


class ClusterConfig(Section):
    """Machines and processes. No setting here changes results beyond floating-point rounding."""

    ray_address: str | None = operational(
        None, "Ray cluster to join (auto, ray://..., host:port); default: the job's own cluster, else a local one."
    )
    ray_num_cpus: int | None = operational(None, "CPUs of a local Ray; default: all.", ge=1)
    object_store_gb: float = operational(0.5, "Object store of a local Ray, in GB.", gt=0.08)
    preprocess_parallelism: int = operational(64, "Maximum number of preprocessing tasks in flight.", ge=1)
    tuning: Literal["launcher", "ray"] = operational(
        "launcher",
        "How the pipeline runs the tuning stages and the evaluation. launcher: with the deepspeed "
        "launcher, on this machine. ray: with Ray Train workers, on all nodes of the Ray cluster.",
    )
    num_processes: int | None = operational(
        None,
        "Tuning processes, on this machine or with tuning: ray on the cluster; default: one per GPU, or "
        "one without GPUs.",
        ge=1,
    )
    local_scratch: str | None = operational(
        None,
        "Folder on a local disk of each machine, for a run.dir on a slow or distant file system: tuning "
        "and evaluation copy the shards to it, once per machine, and read the copies.",
    )
    zero_stage: Literal[0, 1, 2, 3] = operational(
        2, "DeepSpeed ZeRO stage. 3 also shards the frozen weights; 0 becomes 1 in bfloat16."
    )
    collective_timeout_minutes: float = operational(
        30.0, "The job ends if a tuning process completes no step and no validation batch for this long.", gt=0
    )
    max_restarts: int = operational(3, "Maximum number of reruns of a step whose processes were stopped or lost.", ge=0)
    restart_backoff_seconds: float = operational(
        10.0, "Wait before the first rerun; it doubles with each further one.", ge=0
    )
    deepspeed_extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Merged last into the DeepSpeed configuration; keys that other settings decide are refused.",
        json_schema_extra={"operational": True},
    )
