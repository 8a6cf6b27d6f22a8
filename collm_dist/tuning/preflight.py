"""Check, before any work, that backbone, adapter, tokenizer and prompts fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from collm_dist.config import Config
from collm_dist.data.prompts.prompt_template import resolve_answer_ids
from collm_dist.errors import ConfigError
from collm_dist.llm.backbone import load_backbone_config, load_tokenizer
from collm_dist.llm.lora import find_target_modules
from collm_dist.llm.packed.decoder import check_support, find_decoder

# Kinds of rotary embedding whose angles change for a whole batch once one prompt exceeds the original window.
_GROWING_ROPE = {"dynamic", "longrope"}


def check_backbone(config: Config) -> None:
    """Check the configured backbone without loading its weights.

    Raises:
        ConfigError: it does not fit; the message lists every mismatch with its remedy.
        DataError: it cannot be found.
    """
    llm = config.llm
    backbone_config = load_backbone_config(llm.backbone, llm.revision, trust_remote_code=llm.trust_remote_code)
    tokenizer = load_tokenizer(llm.backbone, llm.revision, trust_remote_code=llm.trust_remote_code)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(backbone_config, trust_remote_code=llm.trust_remote_code)
    problems = list(_list_problems(config, skeleton, tokenizer))
    if problems:
        raise ConfigError(f"llm.backbone '{llm.backbone}' does not fit:\n  " + "\n  ".join(problems))


def _list_problems(config: Config, skeleton: Any, tokenizer: Any) -> Iterator[str]:
    checks: list[Callable[[], object]] = [
        lambda: check_support(find_decoder(skeleton)),
        lambda: resolve_answer_ids(tokenizer, config.prompt.yes, config.prompt.no),
    ]
    if config.stage1.enabled and config.lora.rank != "full":
        checks.append(lambda: find_target_modules(skeleton, config.lora.target_modules))
    for check in checks:
        try:
            check()
        except ConfigError as error:
            yield str(error)
    yield from _check_head(skeleton)
    yield from _check_vocabulary(skeleton, tokenizer)
    yield from _check_positions(config, skeleton.config.get_text_config())


def _check_head(skeleton: Any) -> Iterator[str]:
    """Yield a problem if more than one linear layer leads from the last hidden state to the logits.

    Scores are products of that state with two rows of the head.
    """
    head = skeleton.get_output_embeddings()
    if head is None:
        yield f"a {skeleton.config.model_type} model has no output head; choose another backbone"
        return
    decoder, known = find_decoder(skeleton), {id(parameter) for parameter in head.parameters()}
    for name, child in skeleton.named_children():
        if any(module is decoder for module in child.modules()):
            continue
        if any(id(parameter) not in known for parameter in child.parameters()):
            yield (
                f"a {skeleton.config.model_type} model has further layers ({name}) between its last hidden state and "
                "its logits, which scores would leave out; choose another backbone"
            )


def _check_vocabulary(skeleton: Any, tokenizer: Any) -> Iterator[str]:
    """Yield a problem if texts can contain tokens that the model has no embedding for."""
    rows = skeleton.get_input_embeddings().weight.shape[0]
    special = set(tokenizer.all_special_tokens)  # of these, prompts contain the first one at most
    beyond = {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and (token not in special or number == tokenizer.bos_token_id)
    }
    if beyond:
        token, number = min(beyond.items(), key=lambda item: item[1])
        yield (
            f"its tokenizer has {len(beyond)} tokens without an embedding: the model has {rows}, and {token!r} is "
            f"number {number}; use the tokenizer that the model was trained with"
        )


def _check_positions(config: Config, text_config: Any) -> Iterator[str]:
    """Yield a problem if a prompt may be longer than the positions that the model knows."""
    window = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    nested = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    kinds = {str(part.get("rope_type")) for part in nested} & _GROWING_ROPE
    reason = "its positions end there"
    if kinds:
        original = getattr(text_config, "original_max_position_embeddings", None)
        key = "original_max_position_embeddings"
        window = next((part[key] for part in nested if part.get(key)), original or window)
        reason = f"beyond it its rotary embedding ({', '.join(sorted(kinds))}) depends on the other prompts of a batch"
    longest = config.prompt.max_prompt_tokens
    if window is not None and 0 < window < longest:  # some families write -1 for no limit
        yield (
            f"prompt.max_prompt_tokens {longest} exceeds its window of {window} tokens, {reason}; lower it to {window}"
        )
