"""Settings: one YAML file is one experiment through all steps, one module a section."""

from collm_dist.config.cf_search_section import CfSearchConfig
from collm_dist.config.cf_section import CfConfig
from collm_dist.config.cluster_section import ClusterConfig
from collm_dist.config.dataset_section import ColumnsConfig, DatasetConfig, ExpectConfig, ItemColumnsConfig, SplitConfig
from collm_dist.config.evaluation_section import EvaluationConfig
from collm_dist.config.experiment import Config
from collm_dist.config.llm_section import LlmConfig, LoraConfig, MappingConfig
from collm_dist.config.monitoring_section import MonitoringConfig
from collm_dist.config.preprocessing_section import PreprocessingConfig
from collm_dist.config.promotion_section import PromotionConfig
from collm_dist.config.prompt_section import PromptConfig
from collm_dist.config.run_section import RunConfig
from collm_dist.config.stage_sections import Stage1Config, Stage2Config, StageConfig

__all__ = [
    "CfConfig",
    "CfSearchConfig",
    "ClusterConfig",
    "ColumnsConfig",
    "Config",
    "DatasetConfig",
    "EvaluationConfig",
    "ExpectConfig",
    "ItemColumnsConfig",
    "LlmConfig",
    "LoraConfig",
    "MappingConfig",
    "MonitoringConfig",
    "PreprocessingConfig",
    "PromotionConfig",
    "PromptConfig",
    "RunConfig",
    "SplitConfig",
    "Stage1Config",
    "Stage2Config",
    "StageConfig",
]
