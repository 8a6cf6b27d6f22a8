"""Settings of both tuning stages, of evaluation, monitoring and the machines."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from collm_dist.config.base import Section, operational

MAX_PROFILED_STEPS = 50


class StageConfig(Section):
    """What both tuning stages share."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    final_learning_rate_share: float = Field(
        0.08, ge=0, le=1, description="Cosine decay ends at this share of the peak."
    )
    warmup_steps: int = Field(200, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(1e-3, ge=0, description="Weight decay of AdamW.")
    adam_betas: tuple[float, float] = Field((0.9, 0.999), description="Coefficients of AdamW's running averages.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the global gradient norm at this; 0 switches it off.")
    global_batch_size: int = Field(32, ge=1, description="Rows per optimizer step, over all processes.")
    max_tokens_per_micro_batch: Annotated[int, Field(ge=16)] | Literal["auto"] = operational(
        8192,
        "Most tokens in one forward pass of one process: the memory knob. auto: found before the first step by "
        "a few trials, on a GPU as many as fit, on a CPU fewer if that is faster.",
    )
    num_epochs: int = Field(10, ge=1, description="Most passes over the training contexts.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many steps; also the length of the cosine.")
    max_train_contexts: int | None = Field(
        None, ge=1, description="Train on this many contexts, chosen by hash; default all."
    )
    max_valid_contexts: int | None = Field(
        None, ge=1, description="Validate during training on this many contexts, chosen by hash; default all."
    )
    eval_every_steps: int = Field(100, ge=1, description="Steps between validations.")
    early_stop_patience: int = Field(10, ge=1, description="Validations without a better metric before stopping.")
    select_metric: Literal["auc", "uauc", "logloss"] = Field(
        "auc", description="Validation metric that picks the best checkpoint."
    )
    checkpoint_every_steps: int = operational(100, "Most steps between checkpoints to resume from.", ge=1)
    checkpoint_every_minutes: float = operational(10.0, "Most minutes between them.", gt=0)
    # What a finished stage has made does not depend on these two, and one that was stopped may go on with others.
    on_nonfinite: Literal["stop", "skip"] = operational(
        "stop",
        "Where the loss or a gradient of a step is no finite number: stop before the update, or leave the step out.",
    )
    max_nonfinite_skips: int = operational(10, "skip: steps that may be left out, in all.", ge=0)


class Stage1Config(StageConfig):
    """Stage 1: LoRA on text-only prompts (what TALLRec does)."""

    enabled: bool = Field(True, description="Off: stage 2 trains the mapping on the untouched backbone.")
    refresh_every_days: float | None = Field(
        None,
        gt=0,
        description="With dataset.extend_from: take that run's stage 1 until the training data reach so many days "
        "beyond what it was trained on; default: train it in every run.",
    )


class Stage2Config(StageConfig):
    """Stage 2: the mapping alone, on prompts with slots; language model and adapter frozen."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    train_cf: bool | Literal["scratch"] = Field(
        False,
        description="Also train the collaborative model. true: from where its own step left it (the paper's variant "
        "T1). scratch: from weights drawn anew (T2; what its own step trained is then only compared with).",
    )
    context_cache: Literal["none", "memory"] = operational(
        "none",
        "memory: keep the keys and values of constant prefixes from epoch to epoch. Pays where few contexts are "
        "visited often; --dry-run says what it would take.",
    )
    context_cache_gib: float = operational(4.0, "Host memory granted to it in each process, in GiB.", gt=0)


class EvaluationConfig(Section):
    """What is reported."""

    splits: tuple[Literal["valid", "test"], ...] = Field(("valid", "test"), description="Splits in the report.")
    max_users: int | None = Field(None, ge=1, description="Evaluate this many users, chosen by hash; default all.")
    train_contexts: int = Field(
        500,
        ge=0,
        description="Score stage 1 on this many contexts that it trained on too, to show what it has memorized.",
    )
    bootstrap_samples: int = Field(1000, ge=0, description="Resamples of users behind each interval; 0: none.")
    confidence: float = Field(0.95, gt=0, lt=1, description="Coverage of the intervals.")
    num_candidates: int = Field(
        100, ge=2, description="implicit feedback: candidates that each positive is ranked among, itself included."
    )
    cutoffs: tuple[int, ...] = Field((5, 10, 20), description="k of NDCG@k and HR@k.")
    slots_ablation: bool = Field(
        True, description="Also report stage 2 with slots shuffled between rows, and the slots without the LLM."
    )
    max_tokens_per_micro_batch: Annotated[int, Field(ge=16)] | Literal["auto"] = operational(
        "auto", "Most tokens in one forward pass. auto: 16384 on a GPU, 2048 on a CPU."
    )


class PromotionConfig(Section):
    """Whether a run takes the place of the one in use: decided on today's test rows, by a rule written down before."""

    min_paired_difference: float | None = operational(
        None,
        "Stage 2 less the baseline on the same test rows must be at least this, with the lower end of its "
        "interval: 0 wants proof of a gain, -0.005 accepts no proof of a loss beyond that. Default: no promotion.",
    )
    metric: str = operational("auc", "auc, uauc, ndcg@k or hr@k.", pattern=r"^(auc|uauc|(ndcg|hr)@\d+)$")
    baseline: Literal[
        "previous", "cf", "stage1", "slots_without_llm", "as_of_logistic", "bias_logistic", "popularity"
    ] = Field(
        "previous",
        description="previous: stage 2 of dataset.extend_from, scoring the same rows; or another row of the table.",
    )
    pointer: str | None = operational(
        None,
        "Symbolic link to the run in use, moved by a promotion; default: 'current' beside run.dir. As "
        "dataset.extend_from it stands for the run that it points to when the pipeline first sees it.",
    )


class MonitoringConfig(Section):
    """What is shown while work goes on."""

    log_every_steps: int = operational(10, "Steps between logged points.", ge=1)
    tensorboard: bool = operational(True, "Write TensorBoard files.")
    progress_bar: bool = operational(True, "Show progress bars on the first process.")
    projector_items: int = operational(
        1000,
        "Items whose vectors stage 2 leaves for TensorBoard's projector, the most frequent ones; 0: none.",
        ge=0,
        le=100_000,
    )
    profile_steps: tuple[int, int] | None = operational(
        None,
        "First and last step, also written 10-12, of which the first process writes a profiler's trace in each stage.",
    )
    prometheus_dir: str | None = operational(
        None,
        "Folder, as an absolute path, for text files that node exporter's textfile collector reads: the run's state, "
        "and the numbers of its training; default: none.",
    )

    @field_validator("profile_steps", mode="before")
    @classmethod
    def _parse_steps(cls, value: Any) -> Any:
        if value is None:
            return None
        text = "-".join(str(one) for one in value) if isinstance(value, list | tuple) else str(value)
        found = re.fullmatch(r" *([0-9]{1,12}) *- *([0-9]{1,12}) *", text)
        first, last = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= first <= last < first + MAX_PROFILED_STEPS:
            raise ValueError(
                f"{value!r:.60} is no range of steps: write [10, 12] or 10-12, counted from 1, the first not after the "
                f"last, {MAX_PROFILED_STEPS} at most (a trace takes megabytes a step)"
            )
        return first, last

    @field_validator("prometheus_dir")
    @classmethod
    def _check_absolute(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("/"):
            raise ValueError(f"{value!r:.60} is no absolute path; the processes of a run may start in other folders")
        return value


class ClusterConfig(Section):
    """Machines and processes. Nothing here changes results, beyond floating-point rounding."""

    ray_address: str | None = operational(
        None, "Ray cluster to join (auto, ray://..., host:port); default: the job's own cluster, else a local one."
    )
    ray_num_cpus: int | None = operational(None, "CPUs of a local Ray; default: all.", ge=1)
    object_store_gb: float = operational(0.5, "Object store of a local Ray, in GB.", gt=0.08)
    preprocess_parallelism: int = operational(64, "Most preprocessing tasks in flight.", ge=1)
    tuning: Literal["launcher", "ray"] = operational(
        "launcher",
        "How the pipeline runs the tuning stages and the evaluation: launcher = the deepspeed launcher, on this "
        "machine; ray = Ray Train workers, on all nodes of the Ray cluster.",
    )
    num_processes: int | None = operational(
        None,
        "Tuning processes on this machine, with tuning: ray on the cluster; default: one per GPU, one without.",
        ge=1,
    )
    hostfile: str | None = operational(
        None,
        "launcher: run them on the hosts of this file, one process to each slot, through deepspeed --hostfile (ssh and "
        "pdsh); lines of: name slots=4. Default: this machine alone.",
    )
    master_address: str | None = operational(
        None,
        "hostfile: address at which the hosts find the first of them; default: the first that it names itself, which "
        "may be of the wrong network.",
        pattern=r"^[\w.:-]+$",
    )
    local_scratch: str | None = operational(
        None,
        "Folder on a local disk of each machine: tuning and evaluation copy the shards that they read to it, once per "
        "machine, and read them there. For a run.dir on a slow or distant file system.",
    )
    zero_stage: Literal[0, 1, 2, 3] = operational(
        2, "DeepSpeed ZeRO stage; 3 also shards the frozen weights; 0 is 1 in bfloat16."
    )
    collective_timeout_minutes: float = operational(
        30.0, "A tuning process that completes no step and no validation batch for so long ends the job.", gt=0
    )
    max_restarts: int = operational(
        3, "Times that the pipeline runs a step again whose processes were stopped or lost.", ge=0
    )
    restart_backoff_seconds: float = operational(
        10.0, "Wait before the first of them; it doubles with each further one.", ge=0
    )
    deepspeed_extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Merged last into the DeepSpeed configuration; keys that this project owns are refused.",
        json_schema_extra={"operational": True},
    )

    @model_validator(mode="after")
    def _check(self) -> ClusterConfig:
        if self.hostfile is not None and self.tuning == "ray":
            raise ValueError(
                "hostfile is for tuning: launcher; with tuning: ray the nodes are those of the Ray cluster"
            )
        if self.hostfile is not None and self.num_processes is not None:
            raise ValueError("num_processes: with hostfile its slots count; leave it out")
        if self.master_address is not None and self.hostfile is None:
            raise ValueError("master_address means nothing without hostfile")
        return self
