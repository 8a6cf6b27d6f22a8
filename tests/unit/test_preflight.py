"""What does not fit a backbone is named before any work, all of it at once."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    CTRLConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
)

from collm_dist.config import Config
from collm_dist.errors import ConfigError, DataError
from collm_dist.llm.lora import find_target_modules
from collm_dist.tuning.preflight import check_backbone
from tests.tiny import ARCHITECTURES, make_model, make_tokenizer

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def save(folder, config):
    """Save a configuration and the tiny tokenizer, without weights."""
    config.architectures = config.architectures or [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_config(backbone, **sections):
    return Config.model_validate(
        {
            "run": {"dir": "runs/x"},
            "dataset": {"path": "a.csv", "columns": {"rating": "r"}},
            "llm": {"backbone": str(backbone)},
            **sections,
        }
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_fits_passes(tmp_path, architecture):
    names = ["query_key_value"] if architecture == "gpt_neox" else ["q_proj", "v_proj"]
    config = make_model(architecture).config
    config.architectures = None
    AutoConfig.for_model(config.model_type)
    check_backbone(make_config(save(tmp_path, config), lora={"target_modules": names}))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["q_proj", "v_prj"], "no linear layer of this backbone is named v_prj; did you mean v_proj?"),
        (["q_proj", "lm_head"], "lm_head is the output head"),
        (["layers"], "no linear layer of this backbone is named layers"),
    ],
)
def test_each_name_of_an_adapter_must_stand_for_layers_that_can_be_trained(tmp_path, names, message):
    save(tmp_path, LlamaConfig(**SMALL))
    with pytest.raises(ConfigError, match=message):
        check_backbone(make_config(tmp_path, lora={"target_modules": names}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_of_all_layers_needs_no_names(tmp_path, architecture):
    check_backbone(make_config(save(tmp_path, make_model(architecture).config)))
    attention = ["dense", "query_key_value"] if architecture == "gpt_neox" else ["k_proj", "o_proj", "q_proj", "v_proj"]
    network = (
        ["dense_4h_to_h", "dense_h_to_4h"] if architecture == "gpt_neox" else ["down_proj", "gate_proj", "up_proj"]
    )
    assert find_target_modules(make_model(architecture), "all") == sorted(attention + network)


def test_all_layers_are_those_outside_mixtures_of_experts():
    mixture = MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    with torch.device("meta"):
        names = find_target_modules(AutoModelForCausalLM.from_config(mixture), "all")
    assert names == ["k_proj", "o_proj", "q_proj", "v_proj"]
    with torch.device("meta"):
        names = find_target_modules(
            AutoModelForCausalLM.from_config(CTRLConfig(vocab_size=300, n_embd=32, dff=48, n_layer=2, n_head=4)), "all"
        )
    # 0 is also the name of the first decoder layer.
    assert names == ["2", "Wk", "Wq", "Wv", "dense", "transformer.h.0.ffn.0", "transformer.h.1.ffn.0"]


def test_an_adapter_may_name_ends_of_full_names(tmp_path):
    save(tmp_path, LlamaConfig(**SMALL))
    check_backbone(make_config(tmp_path, lora={"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BloomConfig(**SMALL), "a bloom model has its own attention code"),
        (MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2), "has layers of type linear_attention"),
        (GptOssConfig(**SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=2), "has attention sinks"),
        (GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=256), "lower it to 256"),
        (LlamaConfig(**SMALL, max_position_embeddings=300), "exceeds its window of 300 tokens, its positions"),
        (
            LlamaConfig(
                **SMALL,
                rope_parameters={
                    "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 128,
                },
            ),
            r"window of 128 tokens, beyond it its rotary embedding \(dynamic\) depends on the other prompts",
        ),
        (LlamaConfig(**SMALL | {"vocab_size": 100}), "tokens without an embedding: the model has 100"),
    ],
    ids=["bloom", "mamba", "gpt_oss", "gpt2", "window", "dynamic", "vocabulary"],
)  # fmt: skip
def test_a_backbone_that_does_not_fit_is_refused(tmp_path, config, message):
    names = {"gpt2": ["c_attn"], "bloom": ["query_key_value"], "mamba": ["in_proj"]}
    lora = {"target_modules": names.get(config.model_type, ["q_proj"])}
    with pytest.raises(ConfigError, match=message):
        check_backbone(make_config(save(tmp_path, config), lora=lora))


def test_all_mismatches_are_named_at_once(tmp_path):
    save(tmp_path, LlamaConfig(**SMALL | {"vocab_size": 100}, max_position_embeddings=300))
    with pytest.raises(ConfigError) as caught:
        check_backbone(make_config(tmp_path, lora={"target_modules": ["q"]}, prompt={"yes": "A", "no": "A"}))
    lines = str(caught.value).splitlines()
    assert len(lines) == 5, lines
    for line, part in zip(
        lines[1:], ["first token", "named q;", "without an embedding", "lower it to 300"], strict=True
    ):
        assert part in line


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("smolm2-135m", DataError, "did you mean smollm2-135m"),
        ("./nowhere", DataError, "is not a folder"),
    ],
)
def test_a_backbone_that_does_not_exist_is_named(name, error, message):
    with pytest.raises(error, match=message):
        check_backbone(make_config(name))


def test_an_encoder_is_refused(tmp_path):
    config = AutoConfig.for_model("bert", vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    config.architectures = ["BertForMaskedLM"]
    with pytest.raises(ConfigError, match="not a causal language model"):
        check_backbone(make_config(save(tmp_path, config)))
