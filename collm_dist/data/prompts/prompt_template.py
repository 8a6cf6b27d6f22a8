"""Prompt templates: text with fields and slots, divided into what is constant, what the context and what the target
decides.

A prompt is a sequence of segments, each tokenized on its own; that is the one definition of its token ids. Slots are
positions, never tokens of the vocabulary, so no title can collide with them.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from collm_dist.errors import ConfigError

Depends = Literal["nothing", "context", "target"]

# Each field with what decides it and whether it is a slot (filled with soft tokens).
FIELDS: dict[str, tuple[Depends, bool]] = {
    "<ItemTitleList>": ("context", False),
    "<TargetItemTitle>": ("target", False),
    "<UserID>": ("context", True),
    "<ItemIDList>": ("context", True),
    "<TargetItemID>": ("target", True),
    "<MatchID>": ("target", True),
}
# The shipped texts bear names below this folder, which links to them in a checkout.
SHIPPED = "configs/prompts/"
_HISTORY_FIELDS = frozenset({"<ItemTitleList>", "<ItemIDList>"})
_FIELD = re.compile(r"(<[A-Za-z_]+>)")
# Looks like one of our fields, though it is none; other markup, such as <s> or <b>, is text.
_LIKE_A_FIELD = re.compile(r"<[A-Za-z_]*(ID|IDs|List|Title|Titles)>")


@dataclass(frozen=True)
class Segment:
    """One piece of a prompt.

    Attributes:
        text: literal text, or the field's name with its brackets.
        depends_on: what decides its tokens.
        is_field, is_slot: what it is.
    """

    text: str
    depends_on: Depends
    is_field: bool = False
    is_slot: bool = False


@dataclass(frozen=True)
class PromptTemplate:
    """The regions of a prompt, in order.

    Attributes:
        prefix: before the first slot and before anything that the target decides; nothing in it trains in stage 2.
        tail: up to the first segment that the target decides.
        branch: the rest, one for each target.
    """

    prefix: tuple[Segment, ...]
    tail: tuple[Segment, ...]
    branch: tuple[Segment, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments in order."""
        return self.prefix + self.tail + self.branch

    def has(self, field: str) -> bool:
        """Whether the field occurs."""
        return any(segment.is_field and segment.text == field for segment in self.segments)

    @classmethod
    def parse(cls, text: str, *, allow_slots: bool, user_depends_on_target: bool = False) -> PromptTemplate:
        """Parse a template.

        Args:
            text: the template.
            allow_slots: whether slots may (and then must) occur: stage 2.
            user_depends_on_target: whether the user's vector is a function of the target item too (DIN).

        Raises:
            ConfigError: unknown, repeated or missing fields.
        """
        name = "prompt.stage2" if allow_slots else "prompt.stage1"
        segments: list[Segment] = []
        for piece in _split_at_fields(name, text.strip()):
            if piece not in FIELDS:
                segments.append(Segment(piece, "nothing"))
                continue
            depends_on, is_slot = FIELDS[piece]
            if piece == "<UserID>" and user_depends_on_target:
                depends_on = "target"
            if any(one.text == piece for one in segments):
                raise ConfigError(f"{name}: {piece} occurs twice")
            segments.append(Segment(piece, depends_on, is_field=True, is_slot=is_slot))
        _check_fields(name, segments, allow_slots)
        branch = next(i for i, one in enumerate(segments) if one.depends_on == "target")
        slot = next((i for i, one in enumerate(segments) if one.is_slot), branch)
        prefix = min(slot, branch) if allow_slots else 0
        return cls(tuple(segments[:prefix]), tuple(segments[prefix:branch]), tuple(segments[branch:]))


def _split_at_fields(name: str, text: str) -> list[str]:
    """Return fields and the literal texts between them."""
    pieces = [""]
    for piece in _FIELD.split(text):
        if piece in FIELDS:
            pieces += [piece, ""]
            continue
        near = difflib.get_close_matches(piece.lower(), [field.lower() for field in FIELDS], n=1, cutoff=0.75)
        if _FIELD.fullmatch(piece) and (near or _LIKE_A_FIELD.fullmatch(piece)):
            meant = [field for field in FIELDS if field.lower() in near]
            hint = f"did you mean {meant[0]}? " if meant else ""
            raise ConfigError(f"{name}: there is no field {piece}; {hint}known: {' '.join(FIELDS)}")
        pieces[-1] += piece
    return [piece for piece in pieces if piece]


def _check_fields(name: str, segments: list[Segment], allow_slots: bool) -> None:
    found = {one.text for one in segments if one.is_field}
    slots = {one.text for one in segments if one.is_slot}
    if not found & {"<TargetItemTitle>", "<TargetItemID>"}:
        raise ConfigError(f"{name}: the prompt never names the target; add <TargetItemTitle> or <TargetItemID>")
    if slots and not allow_slots:
        raise ConfigError(f"{name}: slots ({' '.join(sorted(slots))}) have nothing to carry before stage 2")
    if allow_slots and not slots:
        raise ConfigError(
            f"{name}: the prompt has no slot, so stage 2 would have nothing to train; add <UserID>, <TargetItemID> or "
            "<MatchID>"
        )
    first = next(i for i, one in enumerate(segments) if one.depends_on == "target")
    late = [one.text for one in segments[first:] if one.text in _HISTORY_FIELDS]
    if late:
        raise ConfigError(
            f"{name}: {late[0]} stands after {segments[first].text}, which differs between targets; put the history "
            "first, so that all targets of a user share it"
        )
    if segments[-1].is_field:
        raise ConfigError(f"{name}: the prompt must end in text, such as 'Answer:', since its last token is read out")


def load_prompt_text(spec: str) -> str:
    """Return a template's text: the file's content if the setting names a file, else the setting itself.

    A shipped prompt is found by its name below ``configs/prompts/`` from any folder.

    Raises:
        ConfigError: it looks like a file but there is none, or none that can be read.
    """
    if "<" in spec:
        return spec
    places = [Path(spec)]
    if spec.startswith(SHIPPED):
        places.append(Path(__file__).parent / "texts" / spec.removeprefix(SHIPPED))
    try:
        for path in places:
            if path.is_file():
                return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:  # such as a text that is too long for a file's name
        raise ConfigError(f"prompt: '{spec[:60]}' cannot be read ({error}), and it is no prompt either") from None
    raise ConfigError(f"prompt: there is no file '{spec}' (relative to {Path.cwd()}), and it is no prompt either")


def resolve_answer_ids(tokenizer: Any, yes: str, no: str) -> tuple[int, int]:
    """Return the token ids of the answers: the first token of each, which must differ.

    Raises:
        ConfigError: an answer has no token, or both begin with the same one.
    """
    tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in (yes, no)]
    if not tokens[0] or not tokens[1] or tokens[0][0] == tokens[1][0]:
        spelt = [
            f"{text!r} is {tokenizer.convert_ids_to_tokens(ids)} {ids}"
            for text, ids in zip((yes, no), tokens, strict=True)
        ]
        raise ConfigError(
            f"prompt.yes and prompt.no must differ in their first token, but {'; '.join(spelt)}. Try them with or "
            "without the leading space"
        )
    return int(tokens[0][0]), int(tokens[1][0])
