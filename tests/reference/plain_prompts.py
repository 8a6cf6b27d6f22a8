"""Prompts built from lists, one sample at a time: the independent reference for the collator.

Nothing here is shared with collm_dist: a template is cut at its fields by hand, every segment is tokenized on its own
and appended to a list, and a slot notes the length of that list.
"""

from dataclasses import dataclass, field

SLOT_NAMES = ("UserID", "ItemIDList", "TargetItemID", "MatchID")
FIELD_NAMES = (*SLOT_NAMES, "ItemTitleList", "DislikedTitleList", "RatedTitleList", "UserText", "TargetItemTitle")


@dataclass
class PlainPrompt:
    """One sample: token ids (0 under slots), and the first position of each slot by field; ItemIDList has many."""

    input_ids: list[int] = field(default_factory=list)
    slots: dict[str, list[int]] = field(default_factory=dict)
    history: list[int] = field(default_factory=list)
    dislikes: list[int] = field(default_factory=list)
    rated: list[tuple[int, int]] = field(default_factory=list)


def split_template(text: str) -> list[tuple[str, str]]:
    """Cut a template into (kind, text)."""
    pieces: list[tuple[str, str]] = []
    literal = ""
    while text:
        name = next((name for name in FIELD_NAMES if text.startswith(f"<{name}>")), None)
        if name is None:
            literal, text = literal + text[0], text[1:]
            continue
        if literal:
            pieces.append(("text", literal))
        pieces.append((name, ""))
        literal, text = "", text[len(name) + 2 :]
    return [*pieces, ("text", literal)] if literal else pieces


def tokenize(tokenizer, text: str, *, is_data: bool = False) -> list[int]:
    if is_data:  # special tokens spelt out in a title are ordinary characters
        return tokenizer([text], add_special_tokens=False, split_special_tokens=True)["input_ids"][0]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokenize_title(tokenizer, title: str, max_title_tokens: int) -> list[int]:
    ids = tokenize(tokenizer, f'"{title}"', is_data=True)
    quote = tokenize(tokenizer, '"')
    # The limit is one of the text, the quotes not counted.
    return ids if len(ids) <= max_title_tokens + 2 * len(quote) else ids[: max_title_tokens + len(quote)] + quote


def build_plain_prompt(
    tokenizer,
    template: str,
    titles: list[str],
    history: list[int],
    target: int,
    *,
    history_length: int,
    max_title_tokens: int,
    max_prompt_tokens: int,
    empty_history_text: str,
    tokens_per_slot: int = 1,
    bos: list[int] = (),
    dislikes: list[int] = (),
    empty_dislikes_text: str | None = None,
    user_text: str = "",
    max_user_text_tokens: int = 48,
    rated: list[tuple[int, int]] = (),
) -> PlainPrompt:
    """Build one sample's prompt; drops the oldest items until the prompt with the longest title as target fits."""
    longest = max(len(tokenize_title(tokenizer, title, max_title_tokens)) for title in titles)

    def build(shown: list[int], ratings: list[tuple[int, int]] = (), disliked: list[int] = ()) -> PlainPrompt:
        prompt = PlainPrompt(input_ids=list(bos), history=shown, dislikes=list(disliked), rated=list(ratings))
        for kind, text in split_template(template):
            ids = prompt.input_ids
            if kind == "text":
                ids += tokenize(tokenizer, text)
            elif kind in ("ItemTitleList", "DislikedTitleList"):
                listed = shown if kind == "ItemTitleList" else disliked
                for number, item in enumerate(listed):
                    ids += (tokenize(tokenizer, ", ") if number else []) + tokenize_title(
                        tokenizer, titles[item], max_title_tokens
                    )
                if not listed:
                    is_default = kind == "ItemTitleList" or empty_dislikes_text is None
                    ids += tokenize(tokenizer, empty_history_text if is_default else empty_dislikes_text)
            elif kind == "RatedTitleList":
                for number, (item, liked) in enumerate(ratings):
                    ids += (tokenize(tokenizer, ", ") if number else []) + tokenize_title(
                        tokenizer, titles[item], max_title_tokens
                    )
                    ids += tokenize(tokenizer, " (liked)" if liked else " (disliked)")
                if not ratings:
                    ids += tokenize(tokenizer, empty_history_text)
            elif kind == "UserText":
                ids += tokenize(tokenizer, user_text, is_data=True)[:max_user_text_tokens]
            elif kind == "TargetItemTitle":
                ids += tokenize_title(tokenizer, titles[target], max_title_tokens)
            else:
                starts = prompt.slots.setdefault(kind, [])
                for _ in shown if kind == "ItemIDList" else [None]:
                    starts.append(len(ids))
                    ids += [0] * tokens_per_slot
        return prompt

    own = len(tokenize_title(tokenizer, titles[target], max_title_tokens)) if "<TargetItemTitle>" in template else 0
    shown = list(history)[-history_length:] if history_length else []
    while True:
        prompt = build(shown)
        worst = len(prompt.input_ids) - own + (longest if own else 0)
        if worst <= max_prompt_tokens or not shown:
            break
        shown = shown[1:]

    # Rated items get the room that the history leaves, and dislikes the rest.
    def fits(prompt: PlainPrompt) -> bool:
        return len(prompt.input_ids) - own + (longest if own else 0) <= max_prompt_tokens

    ratings = list(rated) if "<RatedTitleList>" in template else []
    while ratings and not fits(build(shown, ratings)):
        ratings = ratings[1:]
    disliked = list(dislikes)
    while disliked and not fits(build(shown, ratings, disliked)):
        disliked = disliked[1:]
    return build(shown, ratings, disliked)


def merge_events(history: list[int], dislikes: list[int], likes_since: list[int]) -> list[tuple[int, int]]:
    """Return (item, 1 = liked) in order, given the number of likes after each dislike."""
    waiting, events = list(zip(dislikes, likes_since, strict=True)), []
    for number, item in enumerate(history):
        while waiting and waiting[0][1] > len(history) - 1 - number:
            events.append((waiting.pop(0)[0], 0))
        events.append((item, 1))
    return events + [(item, 0) for item, _ in waiting]
