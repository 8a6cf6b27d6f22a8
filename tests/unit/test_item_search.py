"""Search of items by title."""

import numpy as np
import pytest

from collm_dist.serving.item_search import FoundItem, ItemSearch, fold

TITLES = [
    "Star Wars", "The Empire Strikes Back", "Amélie — 2001", "Mustard Seed", "Starship Troopers", "A Star Is Born",
    "千と千尋の神隠し", "<script>alert(1)</script>", "Straße", "star\nwars\u2028again", "",
]  # fmt: skip
LIKES = [5, 9, 3, 1, 7, 2, 4, 0, 0, 6, 0]


@pytest.fixture(scope="module")
def search():
    ids = [f"i{number}" for number in range(len(TITLES))]
    return ItemSearch(ids, TITLES, np.array(LIKES), {item_id: index for index, item_id in enumerate(ids)})


def list_found(search, query, limit=20):
    return [int(item.item_id[1:]) for item in search.find(query, limit)[0]]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("star", [4, 9, 0, 5, 3]),  # at the beginning, of a word, anywhere; among equals by likes
        ("STAR wars", [9, 0]),
        ("wars star", [9, 0]),
        ("is b", [5]),  # the query as it stands comes first
        ("amelie", [2]),
        ("AMÉLIE", [2]),
        ("strasse", [8]),
        ("千尋", [6]),
        ("<script>", [7]),
        ("i3", [3]),
        (" i3 ", [3]),
        ("strikes  the", [1]),
        ("again star", [9]),
        ("(", [7]),
        ("nowhere", []),
        ("star nowhere", []),
        ("\n", [1, 4, 9, 0, 6, 2, 5, 3, 7, 8, 10]),
        ("", [1, 4, 9, 0, 6, 2, 5, 3, 7, 8, 10]),
        ("\ud800", []),
    ],
)
def test_what_a_query_finds(search, query, found):
    assert list_found(search, query) == found


def test_the_number_of_answers_is_bounded(search):
    assert search.find("star", 2) == ([FoundItem("i4", "Starship Troopers", 7), FoundItem("i9", TITLES[9], 6)], True)
    assert [search.find("star", limit)[1] for limit in (4, 5, 6)] == [True, False, False]
    assert search.find("", 3)[1]


def test_it_finds_what_a_plain_scan_finds():
    random = np.random.default_rng(0)
    words = ["an", "ana", "ban", "na", "b", "a n"]
    titles = [" ".join(random.choice(words, random.integers(0, 4))) for _ in range(200)]
    ids = [str(number) for number in range(1000, 1200)]
    index = ItemSearch(ids, titles, random.integers(0, 9, 200), {item_id: i for i, item_id in enumerate(ids)})
    for query in [*words, "b an", "nab", "ana na"]:
        expected = {
            item_id
            for item_id, title in zip(ids, titles, strict=True)
            if all(word in fold(title) for word in query.split())
        }
        assert {item.item_id for item in index.find(query, 200)[0]} == expected


def test_no_items():
    assert ItemSearch([], [], np.zeros(0, np.int64), {}).find("a", 5) == ([], False)
    assert ItemSearch([], [], np.zeros(0, np.int64), {}).find("", 5) == ([], False)
