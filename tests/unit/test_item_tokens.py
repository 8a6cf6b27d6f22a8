import numpy as np

from collm_dist.data.prompts.item_tokens import load_item_tokens
from tests.unit.loader_data import make_tokenizer

TEXTS = ["Heat", "Toy Story", "Über", "a b c d e f g h i j k l m n o p"]


def test_table_is_made_once_for_each_combination(tmp_path):
    tokenizer = make_tokenizer()
    table = load_item_tokens(tmp_path, TEXTS, tokenizer, 20)
    assert isinstance(table.ids, np.memmap)
    assert tokenizer.decode(table.ids[table.offsets[1] : table.offsets[2]]) == '"Toy Story"'
    stamps = [path.stat().st_mtime_ns for path in tmp_path.iterdir()]
    load_item_tokens(tmp_path, TEXTS, tokenizer, 20)
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == stamps
    load_item_tokens(tmp_path, TEXTS, tokenizer, 3)
    load_item_tokens(tmp_path, TEXTS, make_tokenizer(adds_bos=True), 20)
    load_item_tokens(tmp_path, [*TEXTS[:3], "another"], tokenizer, 20)
    assert len(list(tmp_path.iterdir())) == 4


def test_special_tokens_in_titles_are_ordinary_text(tmp_path):
    tokenizer = make_tokenizer()
    ids = load_item_tokens(tmp_path, ["</s> <unk>"], tokenizer, 50).ids
    assert not set(ids.tolist()) & {tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id}
    assert tokenizer.decode(ids) == '"</s> <unk>"'


def test_a_cut_title_still_closes(tmp_path):
    tokenizer = make_tokenizer()
    table = load_item_tokens(tmp_path, TEXTS, tokenizer, 10)
    assert table.num_cut == 1
    assert table.offsets[4] - table.offsets[3] == 12
    assert tokenizer.decode(table.ids[table.offsets[3] :]).endswith('"')
