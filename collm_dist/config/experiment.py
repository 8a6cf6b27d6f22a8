"""The configuration of an experiment: all sections, in the order of the data, and the checks across them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from collm_dist.config.anchor_section import RECENT_SHARE, AnchorConfig
from collm_dist.config.cf_search_section import CfSearchConfig
from collm_dist.config.cf_section import CfConfig
from collm_dist.config.cluster_section import ClusterConfig
from collm_dist.config.dataset_section import DatasetConfig
from collm_dist.config.evaluation_section import EvaluationConfig
from collm_dist.config.llm_section import LlmConfig, LoraConfig, MappingConfig
from collm_dist.config.monitoring_section import MonitoringConfig
from collm_dist.config.preprocessing_section import PreprocessingConfig
from collm_dist.config.promotion_section import PromotionConfig
from collm_dist.config.prompt_section import PromptConfig
from collm_dist.config.run_section import RunConfig
from collm_dist.config.section import Section
from collm_dist.config.stage_search_section import StageSearchConfig
from collm_dist.config.stage_sections import Stage1Config, Stage2Config


class Config(Section):
    """The settings of one experiment."""

    run: RunConfig = Field(..., description="Where results go, and the seed.")
    dataset: DatasetConfig = Field(..., description="The raw logs.")
    preprocessing: PreprocessingConfig = Field(default_factory=PreprocessingConfig, description="Samples and shards.")
    cf: CfConfig = Field(default_factory=CfConfig, description="The collaborative-filtering model.")
    cf_search: CfSearchConfig = Field(default_factory=CfSearchConfig, description="A search for its settings.")
    anchor: AnchorConfig = Field(default_factory=AnchorConfig, description="The simple score that the LLM adds to.")
    prompt: PromptConfig = Field(default_factory=PromptConfig, description="What the language model reads.")
    llm: LlmConfig = Field(default_factory=LlmConfig, description="The language model.")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="What stage 1 trains.")
    mapping: MappingConfig = Field(default_factory=MappingConfig, description="The mapping of stage 2.")
    stage1: Stage1Config = Field(default_factory=Stage1Config, description="LoRA on text-only prompts.")
    stage2: Stage2Config = Field(default_factory=Stage2Config, description="The mapping on prompts with slots.")
    stage_search: StageSearchConfig = Field(
        default_factory=StageSearchConfig, description="A search for the settings of a stage."
    )
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="The report.")
    promotion: PromotionConfig = Field(default_factory=PromotionConfig, description="When a run replaces another.")
    monitoring: MonitoringConfig = Field(default_factory=MonitoringConfig, description="Logs and progress.")
    cluster: ClusterConfig = Field(default_factory=ClusterConfig, description="Machines and processes.")

    @model_validator(mode="after")
    def _fill_in_defaults(self) -> Config:
        """Give settings that are not set the default that follows from other sections."""
        for name, values in self._find_following_defaults().items():
            section = getattr(self, name)
            given = set(section.model_fields_set)
            section = section.model_copy(update={key: values[key] for key in set(values) - given})
            section.model_fields_set.intersection_update(given)  # the others remain defaults
            self.__dict__[name] = section
        return self

    def _find_following_defaults(self) -> dict[str, dict[str, Any]]:
        """Return the defaults that follow from other settings, by section and name.

        With implicit feedback the metric is the one that the report ranks by: the AUC of all rows compares scores of
        different users, and can rise while the lists of each get worse. With an anchor the language model's own score
        is in the loss, unless it is a title's likelihood, of which only comparisons of targets count, and there are
        none. All weights of the layers take a lower learning rate than an adapter.
        """
        has_anchor = self.anchor.kind is not None
        defaults: dict[str, dict[str, Any]] = {
            "anchor": {"recent_share": RECENT_SHARE if has_anchor else None},
            "promotion": {"metric": self.main_metric},
        }
        for name in ("stage1", "stage2"):
            stage = getattr(self, name)
            compares = stage.pairwise_weight is not None or stage.listwise_weight is not None
            has_own_loss = has_anchor and (self.prompt.score != "title" or compares)
            defaults[name] = {"select_metric": self.main_metric, "llm_loss_weight": 1.0 if has_own_loss else None}
        rate = Stage1Config.model_fields["learning_rate"].default
        defaults["stage1"]["learning_rate"] = 1e-4 if self.lora.rank == "full" else rate
        return defaults

    def list_following(self) -> dict[str, Any]:
        """Return the settings that are not given and follow from others, by dotted name."""
        return {
            f"{name}.{key}": getattr(getattr(self, name), key)
            for name, values in self._find_following_defaults().items()
            for key in values
            if key not in getattr(self, name).model_fields_set
        }

    def to_document(self) -> dict[str, Any]:
        """Return the settings as plain JSON without those of ``list_following``, which follow from the others again."""
        document = self.model_dump(mode="json")
        for dotted in self.list_following():
            section, key = dotted.split(".")
            del document[section][key]
        return document

    @property
    def main_metric(self) -> str:
        """The metric that the report ranks by: auc, with implicit feedback NDCG at the middle cutoff."""
        cutoffs = self.evaluation.cutoffs if self.dataset.feedback == "implicit" else ()
        return f"ndcg@{cutoffs[len(cutoffs) // 2]}" if cutoffs else "auc"

    @model_validator(mode="after")
    def _check(self) -> Config:
        stored, prompted = self.preprocessing.max_history_length, self.prompt.history_length
        if prompted > stored:
            raise ValueError(
                f"prompt.history_length {prompted} exceeds preprocessing.max_history_length {stored}, the longest "
                "history in the shards: raise the latter"
            )
        if (shown := self.prompt.disliked_length) is not None and shown > self.preprocessing.max_dislikes:
            raise ValueError(
                f"prompt.disliked_length {shown} exceeds preprocessing.max_dislikes {self.preprocessing.max_dislikes}, "
                "the most dislikes in the shards: raise the latter"
            )
        most = min(stored, self.preprocessing.max_dislikes)
        if (rated := self.prompt.rated_length) is not None and rated > most:
            raise ValueError(
                f"prompt.rated_length {rated} exceeds {most}, the most likes and dislikes in the shards: raise "
                "preprocessing.max_history_length and preprocessing.max_dislikes to it"
            )
        if (cf_length := self.cf.history_length) is not None and cf_length > stored:
            raise ValueError(
                f"cf.history_length {cf_length} exceeds preprocessing.max_history_length {stored}, the longest "
                "history in the shards: raise the latter"
            )
        if self.cf.model == "none" and self.stage2.train_cf != "scratch":
            raise ValueError(
                "cf.model 'none' needs a stage 2 that learns the id tokens: set stage2.train_cf to scratch"
            )
        if self.anchor.kind in ("cf", "blend") and (self.cf.model == "none" or self.cf.cross_fit == "off"):
            raise ValueError(
                f"anchor.kind {self.anchor.kind} reads a CF model that has not seen the labels of the training rows: "
                "set cf.cross_fit to a number of time folds such as 8, or anchor.kind to as_of or none"
            )
        if self.stage2.train_cf and (self.cf.cross_fit != "off" or self.cf.model in ("lightgcn", "table")):
            raise ValueError(
                "stage2.train_cf trains the weights of a single model: set cf.cross_fit to off, and cf.model to mf, "
                "sasrec, din or none"
            )
        if self.stage2.train_cf and self.cluster.zero_stage == 3:
            raise ValueError(
                "stage2.train_cf: a process cannot look up rows of a table that ZeRO 3 partitions; set "
                "cluster.zero_stage to 2 or less"
            )
        for setting, is_used in (
            ("llm.compile", self.llm.compile),
            ("llm.quantization", self.llm.quantization != "none"),
            ("prompt.score title", self.prompt.score == "title"),
        ):
            if is_used and self.cluster.zero_stage == 3:
                raise ValueError(
                    f"{setting} needs the whole weights of the backbone on each process: set cluster.zero_stage to "
                    "2 or less"
                )
        if self.stage1.enabled and self.lora.rank == "full" and self.llm.quantization != "none":
            raise ValueError(
                f"lora.rank full trains the weights that llm.quantization {self.llm.quantization} stores in fewer "
                "bits: set llm.quantization to none, or lora.rank to a number such as 16"
            )
        has_dropout = self.lora.rank != "full" and self.lora.dropout > 0
        if self.prompt.score == "title" and self.llm.activation_checkpointing and has_dropout:
            raise ValueError(
                "prompt.score title has two passes in a step, and llm.activation_checkpointing would compute one again "
                f"with the dropout of the other: set lora.dropout to 0 (it is {self.lora.dropout}), or "
                "llm.activation_checkpointing to false"
            )
        self._check_baseline()
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            if self.anchor.kind is None and stage.llm_loss_weight is not None:
                raise ValueError(
                    f"{name}.llm_loss_weight {stage.llm_loss_weight} adds the loss of the language model alone to that "
                    "of the anchored score, but anchor.kind is none: set it, or llm_loss_weight to null"
                )
        if self.promotion.min_paired_difference is not None:
            self._check_promotion()
        self._check_ranking_settings()
        return self

    def _check_ranking_settings(self) -> None:
        """Refuse settings of the stages that need sampled negatives, unless feedback is implicit."""
        if self.dataset.feedback == "implicit":
            return
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            if stage.listwise_weight is not None:
                raise ValueError(
                    f"{name}.listwise_weight {stage.listwise_weight} compares a like with its sampled dislikes, which "
                    "dataset.feedback: explicit does not have; use pairwise_weight, or leave it out"
                )
            for setting in ("select_metric", "guard_metric"):
                if "@" in (metric := getattr(stage, setting) or ""):
                    raise ValueError(
                        f"{name}.{setting} {metric} ranks a like among its sampled dislikes, which dataset.feedback: "
                        "explicit does not have; choose auc, uauc or logloss"
                    )

    def _check_baseline(self) -> None:
        """Refuse a baseline that the report cannot have."""
        ratings_only = "it is reported for dataset.feedback: explicit only; choose popularity or blend"
        is_implicit = self.dataset.feedback == "implicit"
        obstacles = {
            "cf": (self.cf.model == "none", "cf.model 'none' has no CF model to compare with; choose another baseline"),
            "anchor": (self.anchor.kind is None, "anchor.kind is none; set it, or choose the baseline blend"),
            "stage1": (not self.stage1.enabled, "stage1.enabled is false; set it to true, or choose another baseline"),
            "slots_without_llm": (
                not self.evaluation.slots_ablation,
                "evaluation.slots_ablation is false; set it to true, or choose another baseline",
            ),
            "bias_logistic": (is_implicit, ratings_only),
            "as_of_logistic": (is_implicit, ratings_only),
            "popularity": (
                not is_implicit,
                "it is reported for dataset.feedback: implicit only; choose as_of_logistic or blend",
            ),
        }
        is_impossible, reason = obstacles.get(self.promotion.baseline, (False, ""))
        if is_impossible:
            raise ValueError(f"promotion.baseline {self.promotion.baseline}: {reason}")

    def _check_promotion(self) -> None:
        evaluation, metric = self.evaluation, self.promotion.metric
        if "test" not in evaluation.splits or evaluation.bootstrap_samples == 0:
            raise ValueError("promotion is decided by an interval on test: evaluation.splits must include test, "
                             "and evaluation.bootstrap_samples must not be 0")  # fmt: skip
        name, _, cutoff = metric.partition("@")
        if cutoff and (self.dataset.feedback != "implicit" or int(cutoff) not in evaluation.cutoffs):
            raise ValueError(f"promotion.metric {metric}: {name} is reported for dataset.feedback: implicit only, at "
                             f"evaluation.cutoffs {list(evaluation.cutoffs)}; choose auc or one of these")  # fmt: skip
