"""Backbones with random weights: throughput and memory do not depend on trained ones.

    python -m benchmarks.lib.random_backbone FOLDER --shape qwen2-1.5b [--tokenizer smollm2-135m-instruct-q4_1]

The folder is a value for ``llm.backbone``. The tokenizer is another backbone's; the vocabulary grows if needed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from collm_dist.llm.backbone import load_tokenizer


@dataclass(frozen=True)
class Shape:
    """Model type and sizes: hidden and intermediate width, layers, heads for queries and keys, vocabulary."""

    kind: str
    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int = 49152
    tied: bool = True


# Published shapes, and small shapes for a CPU.
SHAPES = {
    "llama-7b": Shape("llama", 4096, 11008, 32, 32, 32, 32000, tied=False),
    "qwen3-0.6b": Shape("qwen3", 1024, 3072, 28, 16, 8, 151936),
    "qwen2-1.5b": Shape("qwen2", 1536, 8960, 28, 12, 2, 151936),
    "smollm2-135m": Shape("llama", 576, 1536, 30, 9, 3),
    "40m": Shape("llama", 512, 1376, 8, 8, 8),
    "20m": Shape("llama", 256, 704, 8, 4, 4),
    "7m": Shape("llama", 128, 352, 4, 2, 2),
    "tiny": Shape("llama", 64, 176, 2, 2, 2),
}


def build_random_model(shape: str, dtype: torch.dtype, least_vocabulary: int = 0, **special: int | None) -> Any:
    """Return a causal language model with random weights, on the first GPU if there is one.

    Args:
        shape: name of its shape.
        dtype: of its weights.
        least_vocabulary: entries that the vocabulary has at least.
        special: ids of special tokens, by the name of the setting.
    """
    sizes = SHAPES[shape]
    config = AutoConfig.for_model(
        sizes.kind,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        vocab_size=max(sizes.vocabulary, least_vocabulary),
        tie_word_embeddings=sizes.tied,
        **special,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def write_random_backbone(folder: Path, shape: str, tokenizer: str, dtype: torch.dtype) -> None:
    """Write config, weights and tokenizer."""
    tokens = load_tokenizer(tokenizer)
    special = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    build_random_model(shape, dtype, len(tokens), **special).save_pretrained(folder)
    tokens.save_pretrained(folder)


def main() -> None:
    """Write a backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct-q4_1", help="backbone that lends its tokenizer")
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    write_random_backbone(arguments.folder, arguments.shape, arguments.tokenizer, dtype)


if __name__ == "__main__":
    main()
