"""Prompt templates: text with fields and slots, in three regions (constant prefix, context tail, target branch).

A prompt is a sequence of segments, each tokenized separately; this alone defines its token ids. Slots are positions,
not tokens of the vocabulary, so no title can collide with them.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from collm_dist.errors import ConfigError

Depends = Literal["nothing", "context", "target"]

# For each field what it depends on, and whether it is a slot (filled with soft tokens).
FIELDS: dict[str, tuple[Depends, bool]] = {
    "<ItemTitleList>": ("context", False),
    "<DislikedTitleList>": ("context", False),  # contexts are cut where the dislikes change
    "<RatedTitleList>": ("context", False),  # the same
    "<UserText>": ("context", False),
    "<TargetItemTitle>": ("target", False),
    "<UserID>": ("context", True),
    "<ItemIDList>": ("context", True),
    "<TargetItemID>": ("target", True),
    "<MatchID>": ("target", True),
}
# Prefix of the names of shipped templates; in a checkout this folder links to them.
SHIPPED = "configs/prompts/"
TEXTS = Path(__file__).parent / "texts"
_USER_FIELDS = frozenset({"<ItemTitleList>", "<DislikedTitleList>", "<RatedTitleList>", "<ItemIDList>", "<UserText>"})
_FIELD = re.compile(r"(<[A-Za-z_]+>)")
# Resembles a field, so it is probably a typo; other markup, such as <s> or <b>, is text.
_LIKE_A_FIELD = re.compile(r"<[A-Za-z_]*(ID|IDs|List|Text|Title|Titles)>")


@dataclass(frozen=True)
class Segment:
    """Segment of a prompt: literal text or a field.

    Attributes:
        text: literal text, or the field's name with brackets.
        depends_on: what its tokens depend on.
        is_field, is_slot: whether it is a field, and whether that field is a slot.
    """

    text: str
    depends_on: Depends
    is_field: bool = False
    is_slot: bool = False


@dataclass(frozen=True)
class PromptTemplate:
    """The regions of a prompt, in order.

    Attributes:
        prefix: segments before the first slot and the first target-dependent segment; constant in stage 2.
        tail: segments from there to the first target-dependent segment.
        branch: the rest, repeated for each target.
    """

    prefix: tuple[Segment, ...]
    tail: tuple[Segment, ...]
    branch: tuple[Segment, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments in order."""
        return self.prefix + self.tail + self.branch

    def has(self, field: str) -> bool:
        """Return whether the field occurs."""
        return any(segment.is_field and segment.text == field for segment in self.segments)

    @classmethod
    def parse(cls, text: str, *, allow_slots: bool, user_depends_on_target: bool = False) -> PromptTemplate:
        """Parse a template.

        Args:
            text: the template.
            allow_slots: whether slots are allowed, and required (stage 2).
            user_depends_on_target: whether the user vector also depends on the target item (DIN).

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
            if any(segment.text == piece for segment in segments):
                raise ConfigError(f"{name}: {piece} occurs twice")
            segments.append(Segment(piece, depends_on, is_field=True, is_slot=is_slot))
        _check_fields(name, segments, allow_slots)
        branch = next(i for i, segment in enumerate(segments) if segment.depends_on == "target")
        slot = next((i for i, segment in enumerate(segments) if segment.is_slot), branch)
        prefix = min(slot, branch) if allow_slots else 0
        return cls(tuple(segments[:prefix]), tuple(segments[prefix:branch]), tuple(segments[branch:]))


def _split_at_fields(name: str, text: str) -> list[str]:
    """Return the fields and the literal texts between them."""
    pieces = [""]
    for piece in _FIELD.split(text):
        if piece in FIELDS:
            pieces += [piece, ""]
            continue
        matches = difflib.get_close_matches(piece.lower(), [field.lower() for field in FIELDS], n=1, cutoff=0.75)
        if _FIELD.fullmatch(piece) and (matches or _LIKE_A_FIELD.fullmatch(piece)):
            fields = [field for field in FIELDS if field.lower() in matches]
            hint = f"did you mean {fields[0]}? " if fields else ""
            raise ConfigError(f"{name}: there is no field {piece}; {hint}known: {' '.join(FIELDS)}")
        pieces[-1] += piece
    return [piece for piece in pieces if piece]


def _check_fields(name: str, segments: list[Segment], allow_slots: bool) -> None:
    fields = {segment.text for segment in segments if segment.is_field}
    slots = {segment.text for segment in segments if segment.is_slot}
    if not fields & {"<TargetItemTitle>", "<TargetItemID>"}:
        raise ConfigError(f"{name}: the prompt never names the target; add <TargetItemTitle> or <TargetItemID>")
    if slots and not allow_slots:
        raise ConfigError(f"{name}: slots ({' '.join(sorted(slots))}) have nothing to carry before stage 2")
    if allow_slots and not slots:
        raise ConfigError(
            f"{name}: the prompt has no slot, so stage 2 would have nothing to train; add <UserID>, <TargetItemID> or "
            "<MatchID>"
        )
    first = next(i for i, segment in enumerate(segments) if segment.depends_on == "target")
    late = [segment.text for segment in segments[first:] if segment.text in _USER_FIELDS]
    if late:
        raise ConfigError(
            f"{name}: {late[0]} stands after {segments[first].text}, which differs between targets; put it first, so "
            "that all targets of a user share it"
        )
    if segments[-1].is_field:
        raise ConfigError(f"{name}: the prompt must end in text, such as 'Answer:', since its last token is read out")


def load_prompt_text(spec: str) -> str:
    """Return a template's text: the content of the file that the setting names, else the setting itself.

    Shipped templates, ``configs/prompts/NAME``, are found from any working directory.

    Raises:
        ConfigError: the setting names a file that is missing or cannot be read.
    """
    if "<" in spec:
        return spec
    paths = [Path(spec)]
    if spec.startswith(SHIPPED):
        paths.append(TEXTS / spec.removeprefix(SHIPPED))
    try:
        for path in paths:
            if path.is_file():
                return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:  # for example a text too long for a file name
        raise ConfigError(
            f"prompt: '{spec[:60]}' cannot be read ({error}), and it is not a prompt: it has no field"
        ) from None
    raise ConfigError(
        f"prompt: there is no file '{spec}' (relative to {Path.cwd()}), and it is not a prompt: it has no field"
    )


def resolve_answer_ids(tokenizer: Any, yes: str, no: str) -> tuple[int, int]:
    """Return the first token id of each answer.

    Raises:
        ConfigError: an answer has no token, or both start with the same token.
    """
    tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in (yes, no)]
    if not tokens[0] or not tokens[1] or tokens[0][0] == tokens[1][0]:
        spellings = [
            f"{text!r} is {tokenizer.convert_ids_to_tokens(ids)} {ids}"
            for text, ids in zip((yes, no), tokens, strict=True)
        ]
        raise ConfigError(
            f"prompt.yes and prompt.no must differ in their first token, but {'; '.join(spellings)}. Try them with or "
            "without the leading space"
        )
    return int(tokens[0][0]), int(tokens[1][0])
