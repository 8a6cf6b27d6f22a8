"""Tiny models and tokenizers of the real architectures, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt_neox")


def make_tokenizer(*, with_bos: bool = True) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer with tokens for the two answers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", "<unk>", *alphabet, "\u0120Yes", "\u0120No"])}
    merges = []
    for word in ("\u0120Yes", "\u0120No"):
        for end in range(2, len(word)):
            vocab.setdefault(word[:end], len(vocab))
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if with_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_model(
    architecture: str,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    attention: str = "sdpa",
    layers: int = 2,
):
    """Build a causal language model of width 32."""
    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if architecture == "mistral":
        settings["sliding_window"] = 8
    if architecture == "gemma3_text":
        settings |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    if architecture == "gpt_neox":
        settings.pop("head_dim")
        settings.pop("num_key_value_heads")
    config = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # Weights larger than the usual initialization make attention far from uniform, so errors show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.to(dtype).eval().requires_grad_(False)


def save_backbone(folder: Path, architecture: str = "llama") -> Path:
    """Save a tiny backbone as a local folder for ``llm.backbone``."""
    make_model(architecture, dtype=torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
