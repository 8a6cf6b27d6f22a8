import pytest

from collm_dist.data.prompts.prompt_template import PromptTemplate, load_prompt_text, resolve_answer_ids
from collm_dist.errors import ConfigError
from tests.unit.loader_data import make_tokenizer

FULL = "Liked: <ItemTitleList>. By <UserID>. Like <TargetItemTitle> <TargetItemID>? Answer:"


def names(segments):
    return [segment.text for segment in segments]


def test_regions_of_stage_2():
    template = PromptTemplate.parse(FULL, allow_slots=True)
    assert names(template.prefix) == ["Liked: ", "<ItemTitleList>", ". By "]
    assert names(template.tail) == ["<UserID>", ". Like "]
    assert names(template.branch) == ["<TargetItemTitle>", " ", "<TargetItemID>", "? Answer:"]


def test_a_user_vector_that_depends_on_the_target_ends_the_tail():
    template = PromptTemplate.parse(FULL, allow_slots=True, user_depends_on_target=True)
    assert names(template.prefix) == ["Liked: ", "<ItemTitleList>", ". By "]
    assert template.tail == ()
    assert names(template.branch)[0] == "<UserID>"


def test_stage_1_has_no_prefix():
    template = PromptTemplate.parse("A <ItemTitleList> b <TargetItemTitle> c", allow_slots=False)
    assert template.prefix == ()
    assert names(template.tail) == ["A ", "<ItemTitleList>", " b "]


def test_other_markup_is_text():
    text = "<s>[INST] <TargetItemTitle> <b>x</b> [/INST] <|end|>"
    template = PromptTemplate.parse(text, allow_slots=False)
    assert names(template.segments) == ["<s>[INST] ", "<TargetItemTitle>", " <b>x</b> [/INST] <|end|>"]


@pytest.mark.parametrize(
    ("text", "slots", "message"),
    [
        ("<TargetItmTitle>?", False, "no field <TargetItmTitle>; did you mean <TargetItemTitle>"),
        ("<TargetItemTitle> <userid>?", True, "did you mean <UserID>"),
        ("<SellerID> <TargetItemTitle>?", True, "no field <SellerID>"),
        ("<TargetItemTitle> <TargetItemTitle>?", False, "occurs twice"),
        ("<TargetItemTitle>?", True, "has no slot"),
        ("<TargetItemTitle> <UserID>?", False, "slots .<UserID>. have nothing to carry"),
        ("<UserID>?", True, "never names the target"),
        ("<TargetItemTitle> after <ItemTitleList>?", False, "<ItemTitleList> stands after <TargetItemTitle>"),
        ("Like <TargetItemTitle>", False, "must end in text"),
    ],
)
def test_mistakes_are_named(text, slots, message):
    with pytest.raises(ConfigError, match=message):
        PromptTemplate.parse(text, allow_slots=slots)


@pytest.mark.parametrize("folder", ["configs/prompts", "configs/prompts/question_last"])
@pytest.mark.parametrize("name", ["stage1", "stage2", "stage2_pair", "stage2_ids"])
def test_shipped_prompts_parse(name, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # found from anywhere
    text = load_prompt_text(f"{folder}/{name}.txt")
    is_second = name != "stage1"
    template = PromptTemplate.parse(text, allow_slots=is_second)
    assert text.endswith("Answer:")
    assert template.has("<ItemTitleList>")
    assert template.has("<TargetItemTitle>")


def test_prompt_texts_come_inline_or_from_a_file(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Über <TargetItemTitle>?\n", encoding="utf-8")
    assert load_prompt_text(str(path)) == "Über <TargetItemTitle>?"
    assert load_prompt_text("Inline <TargetItemTitle>?") == "Inline <TargetItemTitle>?"
    with pytest.raises(ConfigError, match=r"no file 'no/such\.txt'"):
        load_prompt_text("no/such.txt")


def test_answers_must_differ_in_their_first_token():
    tokenizer = make_tokenizer()
    yes, no = resolve_answer_ids(tokenizer, " Yes", " No")
    assert yes != no
    with pytest.raises(ConfigError, match=r"' Yes' is \[.*\]; ' Yes!' is \["):
        resolve_answer_ids(tokenizer, " Yes", " Yes!")
    with pytest.raises(ConfigError, match="must differ"):
        resolve_answer_ids(tokenizer, " Yes", "")
