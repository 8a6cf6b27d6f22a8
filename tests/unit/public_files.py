"""Small invented files in the shapes of public data sets: names, headers, delimiters, encodings, forms of times.

``CASES`` has, by the heading of docs/own-data-formats.md, the files; the rows that they give, as (user, item, time or
None, label); and the texts of the items, if the settings name an item file.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """Files of a data set, and what is read from them."""

    files: dict[str, bytes]
    rows: list[tuple[str, str, int | None, int]]
    texts: dict[str, str] = field(default_factory=dict)


def text(*lines: str, encoding: str = "utf8", end: str = "\n") -> bytes:
    return "".join(line + end for line in lines).encode(encoding)


def packed(*rows: object) -> bytes:
    """Return gzip of lines: strings as they are, others as JSON."""
    return gzip.compress(text(*(row if isinstance(row, str) else json.dumps(row) for row in rows)))


OLD_REVIEW = {"reviewerID": "A1", "asin": "B0", "reviewerName": "J", "helpful": [0, 1], "reviewText": "It's \"good\"",
              "overall": 5.0, "summary": "s", "unixReviewTime": 1262304000, "reviewTime": "01 1, 2010"}  # fmt: skip
OLD_META = ("{'asin': 'B0', 'salesRank': {'Books': 7}, 'imUrl': 'http://x', 'categories': [['Books']], "
            "'title': \"Emma's, or: \\\"yes\\\"\"}")  # fmt: skip
FLAGS = "|".join("0" * 19)
ARTIST = "00000000-1111-2222-3333-444444444444"
H_AND_M = ("article_id,product_code,prod_name,product_type_no,product_type_name,product_group_name,"
           "graphical_appearance_no,graphical_appearance_name,colour_group_code,colour_group_name,"
           "perceived_colour_value_id,perceived_colour_value_name,perceived_colour_master_id,"
           "perceived_colour_master_name,department_no,department_name,index_code,index_name,index_group_no,"
           "index_group_name,section_no,section_name,garment_group_no,garment_group_name,detail_desc")  # fmt: skip
GAMES = ("app_id,title,date_release,win,mac,linux,rating,positive_ratio,user_reviews,price_final,price_original,"
         "discount,steam_deck")  # fmt: skip
KUAI = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio"
CAPTIONS = ("video_id,manual_cover_text,caption,topic_tag,first_level_category_id,first_level_category_name,"
            "second_level_category_id,second_level_category_name,third_level_category_id,"
            "third_level_category_name")  # fmt: skip
STEAM_REVIEW = ("{u'username': u\"Robin's, S.\", u'hours': 0.1, u'products': 4, u'product_id': u'11', "
                "u'page_order': 0, u'date': u'2016-02-03', u'text': u'It\\'s \"ok\"\\n', u'early_access': False, "
                "u'page': 1}")  # fmt: skip
STEAM_GAME = ("{u'publisher': u'K', u'genres': [u'Action'], u'app_name': u'Caf\\xe9 Run', u'title': u'Caf\\xe9 Run', "
              "u'release_date': u'2015-01-04', u'price': 1.99, u'early_access': False, u'id': u'11'}")  # fmt: skip

CASES = {
    "MovieLens 100K": Case(
        {
            "ml-100k/u.data": text("12\t345\t3\t880000001", "13\t345\t5\t890000002"),
            "ml-100k/u.item": text(f"345|Café Río (1995)|01-Feb-1995||http://x|{FLAGS}", encoding="latin1"),
        },
        [("12", "345", 880000001, 0), ("13", "345", 890000002, 1)],
        {"345": "Café Río (1995)"},
    ),
    "MovieLens 1M, 10M": Case(
        {
            "ml-1m/ratings.dat": text("7::1001::5::970000001", "7::502::3.5::970000002"),
            "ml-1m/movies.dat": text("502::Été, L': 2 (1998)::Drama|Musical", encoding="latin1"),
        },
        [("7", "1001", 970000001, 1), ("7", "502", 970000002, 0)],
        {"502": "Été, L': 2 (1998)"},
    ),
    "MovieLens 20M, 25M, 32M, latest": Case(
        {
            "ml-20m/ratings.csv": text("userId,movieId,rating,timestamp", "7,3,3.5,1100000001", "7,40,4.0,1100000002"),
            "ml-20m/movies.csv": text("movieId,title,genres", '40,"Lost Island, The (1996)",Drama|War'),
        },
        [("7", "3", 1100000001, 0), ("7", "40", 1100000002, 1)],
        {"40": "Lost Island, The (1996)"},
    ),
    "Amazon 2014": Case(
        {"amazon-2014/reviews_Books_5.json.gz": packed(OLD_REVIEW), "amazon-2014/meta_Books.json.gz": packed(OLD_META)},
        [("A1", "B0", 1262304000, 1)],
        {"B0": 'Emma\'s, or: "yes"'},
    ),
    "Amazon 2014, ratings only": Case(
        {"ratings_Books.csv": text("A1B2,0000000123,4.0,1344470400"), "meta_Books.json.gz": packed(OLD_META)},
        [("A1B2", "0000000123", 1344470400, 1)],
        {"B0": 'Emma\'s, or: "yes"'},
    ),
    "Amazon 2018": Case(
        {
            "amazon-2018/Books_5.json.gz": packed(
                {"overall": 3.0, "vote": "2", "verified": True, "reviewTime": "04 5, 2016", "reviewerID": "A1",
                 "asin": "000123", "style": {"Format:": " Hardcover"}, "reviewerName": "J", "reviewText": "x",
                 "summary": "s", "unixReviewTime": 1459814400}
            ),
            "amazon-2018/meta_Books.json.gz": packed(
                {"category": ["Books"], "tech1": "", "description": [], "fit": "", "title": "The Egg", "also_buy": [],
                 "rank": "7 in Books", "details": {}, "price": "", "asin": "000123"}
            ),
        },
        [("A1", "000123", 1459814400, 0)],
        {"000123": "The Egg"},
    ),
    "Amazon 2023": Case(
        {
            "amazon-2023/Books.jsonl.gz": packed(
                {"rating": 5.0, "title": "x", "text": "y", "images": [], "asin": "B01", "parent_asin": "B0C",
                 "user_id": "AE12", "timestamp": 1617602828684, "helpful_vote": 0, "verified_purchase": True}
            ),
            "amazon-2023/meta_Books.jsonl.gz": packed({"main_category": "Books", "title": "The Egg", "price": None,
                                                       "details": {}, "parent_asin": "B0C"}),
        },
        [("AE12", "B0C", 1617602828, 1)],
        {"B0C": "The Egg"},
    ),
    "Book-Crossing": Case(
        {
            "BX-Book-Ratings.csv": text('"User-ID";"ISBN";"Book-Rating"', '"11";"012345678X";"0"',
                                        '"12";"0123456789";"5"', '"13";"9012345678";"8"', end="\r\n"),
            "BX-Books.csv": text(
                '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher";"Image-URL-S";"Image-URL-M";'
                '"Image-URL-L"',
                '"9012345678";"Die Straße; € 1";"K. Böll";"1999";"Verlag";"http://a";"http://b";"http://c"',
                '"0123456789";"The \\"Kings\\" of U. &amp; B.";"E. W.";"1999";"Press";"http://a";"http://b";"http://c"',
                encoding="cp1252", end="\r\n",
            ),
        },
        [("12", "0123456789", None, 0), ("13", "9012345678", None, 1)],
        {"9012345678": "Die Straße; € 1 by K. Böll", "0123456789": 'The "Kings" of U. & B. by E. W.'},
    ),
    "Goodreads": Case(
        {
            "goodreads_interactions_poetry.json.gz": packed(
                *({"user_id": "0a1b", "book_id": "123", "review_id": "2c3d", "is_read": rating > 0,
                   "rating": rating, "review_text_incomplete": "", "date_added": "Sun Mar 04 10:20:30 -0700 2012",
                   "date_updated": "Sun Mar 04 10:20:30 -0700 2012", "read_at": "", "started_at": ""}
                  for rating in (4, 0))
            ),
            "goodreads_books_poetry.json.gz": packed(
                {"isbn": "", "popular_shelves": [{"count": "12", "name": "to-read"}], "average_rating": "4.0",
                 "book_id": "123", "work_id": "45", "title": "The Sea", "title_without_series": "The Sea"}
            ),
        },
        [("0a1b", "123", 1330881630, 1)],
        {"123": "The Sea"},
    ),
    "Goodreads, all interactions": Case(
        {"goodreads_interactions.csv": text("user_id,book_id,is_read,rating,is_reviewed", "7,12,1,5,0", "7,13,1,3,1",
                                            "7,14,0,0,0")},
        [("7", "12", None, 1), ("7", "13", None, 0)],
    ),
    "Yelp": Case(
        {
            "yelp_academic_dataset_review.json": text(
                json.dumps({"review_id": "R-1", "user_id": "U_-", "business_id": "B-2", "stars": 3.0, "useful": 0,
                            "funny": 0, "cool": 0, "text": "If\n\"you\"", "date": "2015-06-07 08:09:10"})
            ),
            "yelp_academic_dataset_business.json": text(
                json.dumps({"business_id": "B-2", "name": "Corner Café", "address": "1 Main St", "city": "Springfield",
                            "state": "PA", "postal_code": "00001", "latitude": 40.0, "longitude": -75.0, "stars": 3.0,
                            "review_count": 9, "is_open": 1, "attributes": {"WiFi": "u'free'"},
                            "categories": "Cafes, Food", "hours": None})
            ),
        },
        [("U_-", "B-2", 1433664550, 0)],
        {"B-2": "Corner Café, Springfield"},
    ),
    "Netflix Prize": Case(
        {
            "combined_data_1.txt": text("1:", "1001,3,2004-01-02", "1002,5,2004-02-03", "23:", "1003,4,2005-03-04"),
            "movie_titles.csv": text("1,2003,Island Life", "23,1974,Home, Café", encoding="latin1"),
        },
        [("1001", "1", 1073001600, 0), ("1002", "1", 1075766400, 1), ("1003", "23", 1109894400, 1)],
        {"1": "Island Life (2003)", "23": "Home, Café (1974)"},
    ),
    "Steam, recommendations (Kaggle)": Case(
        {
            "recommendations.csv": text("app_id,helpful,funny,date,is_recommended,hours,user_id,review_id",
                                        "1230,0,0,2021-05-06,true,12.3,77,0", "4560,4,0,2018-07-08,false,4.5,78,1"),
            "games.csv": text(GAMES,
                              '1230,"Tower, Bridge",2020-12-06,true,false,false,Positive,95,9,29.9,29.9,0.0,true'),
        },
        [("77", "1230", 1620259200, 1), ("78", "4560", 1531008000, 0)],
        {"1230": "Tower, Bridge"},
    ),
    "KuaiRec": Case(
        {
            "KuaiRec 2.0/data/big_matrix.csv": text(
                KUAI, "7,11,13000,10000,2020-07-06 01:02:03.438,20200706,1593968523.438,1.3",
                "7,12,25000,10000,2020-07-06 02:03:04.297,20200706,1593972184.297,2.5",
            ),
            "KuaiRec 2.0/data/kuairec_caption_category.csv": text(
                CAPTIONS, '12,UNKNOWN,"小猫,真好",[猫],8,宠物,123,宠物猫,-124,UNKNOWN',
                "13,UNKNOWN,第一\r第二,[],8,宠物,123,宠物猫,-124,UNKNOWN",
            ),
        },
        [("7", "11", 1593968523, 0), ("7", "12", 1593972184, 1)],
        {"12": "小猫,真好", "13": "第一 第二"},
    ),
    "MIND": Case(
        {
            "MINDsmall_train/behaviors.tsv": text("1\tU12\t11/10/2019 8:07:06 AM\tN11 N12\tN13-1 N14-0",
                                                  "2\tU9\t11/12/2019 6:17:16 PM\t\tN5-1"),
            "MINDsmall_train/news.tsv": text(
                'N13\tsports\tgolf\tThe "Swings" we like\tLook at the\thttps://x\t[{"Label": "P"}]\t[]'),
        },
        [("U12", "N13", 1573373226, 1), ("U12", "N14", 1573373226, 0), ("U9", "N5", 1573582636, 1)],
        {"N13": 'The "Swings" we like'},
    ),
    "RetailRocket": Case(
        {"events.csv": text("timestamp,visitorid,event,itemid,transactionid", "1433304300007,12,view,345,",
                            "1433304306789,13,transaction,346,21")},
        [("13", "346", 1433304306, 1)],
    ),
    "REES46": Case(
        {"2019-Oct.csv": text(
            "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session",
            "2019-10-02 03:04:00 UTC,view,1001,2000000000000000001,,acme,12.5,51,0a1b2c3d-4e5f",
            "2019-10-02 03:04:05 UTC,purchase,1002,2000000000000000002,electronics.phone,acme,99.9,52,1a2b3c4d-5e6f")},
        [("52", "1002", 1569985445, 1)],
    ),
    "Yoochoose": Case(
        {"yoochoose-clicks.dat": text("11,2014-05-06T07:08:09.277Z,210000001,0",
                                      "12,2014-05-06T17:18:19.277Z,210000002,S")},
        [("11", "210000001", 1399360089, 1), ("12", "210000002", 1399396699, 1)],
    ),
    "Diginetica": Case(
        {"train-item-views.csv": text("sessionId;userId;itemId;timeframe;eventdate", "5;NA;101;90000;2016-03-04",
                                      "5;NA;102;8000;2016-03-04")},
        [("5", "102", 1457049600, 1), ("5", "101", 1457049600, 1)],
    ),
    "Taobao user behavior": Case(
        {"UserBehavior.csv": text("7,1001,201,pv,1511658100", "7,1002,202,buy,1511658123")},
        [("7", "1002", 1511658123, 1)],
    ),
    "Tmall, IJCAI-15": Case(
        {"data_format1/user_log_format1.csv": text("user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type",
                                                   "77,1001,83,28,266,0703,0", "77,1002,84,28,266,0703,2",
                                                   "77,1003,84,28,,1111,2")},
        [("77", "1002", 703, 1), ("77", "1003", 1111, 1)],
    ),
    "Tmall, IJCAI-16": Case(
        {"ijcai2016_taobao.csv": text("use_ID,sel_ID,ite_ID,cat_ID,act_ID,time", "77,91,1001,1,0,20150909",
                                      "77,91,1002,1,1,20150910")},
        [("77", "1002", 1441843200, 1)],
    ),
    "H&M": Case(
        {
            "transactions_train.csv": text("t_dat,customer_id,article_id,price,sales_channel_id",
                                           "2019-02-03,0a1b2c3d,0100200001,0.0254067796610169,2"),
            "articles.csv": text(H_AND_M, "0100200001,0100200,Soft Top,253,Vest top,Upper body,1010016,Solid,09,Black,"
                                 "4,Dark,5,Black,1676,Jersey,A,Ladies,1,Ladies,16,Basics,1002,Jersey,"
                                 '"Top, with ""straps"""'),
        },
        [("0a1b2c3d", "0100200001", 1549152000, 1)],
        {"0100200001": "Soft Top, Vest top"},
    ),
    "Last.fm, HetRec 2011": Case(
        {
            "user_artists.dat": text("userID\tartistID\tweight", "7\t12\t345", end="\r\n"),
            "artists.dat": text("id\tname\turl\tpictureURL", '12\tDüo "Zwei\thttp://x\thttp://y', end="\r\n"),
        },
        [("7", "12", None, 1)],
        {"12": 'Düo "Zwei'},
    ),
    "Last.fm 360K": Case(
        {"usersha1-artmbid-artname-plays.tsv": text(f"0a1b2c3d\t{ARTIST}\tdie äpfel\t12", '0a1b2c3d\t\t"odd one"\t3')},
        [("0a1b2c3d", "die äpfel", None, 1), ("0a1b2c3d", '"odd one"', None, 1)],
    ),
    "Last.fm 1K": Case(
        {"userid-timestamp-artid-artname-traid-traname.tsv": text(
            f"user_000012\t2008-09-10T11:12:13Z\t{ARTIST}\tdie äpfel\t\tTrack 7 (\"Live\")")},
        [("user_000012", "die äpfel", 1221045133, 1)],
    ),
    "Steam, reviews (UCSD)": Case(
        {"steam_reviews.json.gz": packed(STEAM_REVIEW), "steam_games.json.gz": packed(STEAM_GAME)},
        [("Robin's, S.", "11", 1454457600, 1)],
        {"11": "Café Run"},
    ),
    "Steam-200k": Case(
        {"steam-200k.csv": text("1001,Tower Bridge,purchase,1.0,0", "1001,Tower Bridge,play,12.3,0",
                                '1002,"Castle 10,000 Walls",play,2.2,0')},
        [("1001", "Tower Bridge", None, 1), ("1002", "Castle 10,000 Walls", None, 1)],
    ),
    "Gowalla": Case(
        {"loc-gowalla_totalCheckins.txt.gz": packed("7\t2010-03-04T05:06:07Z\t30.0000000001\t-97.0000000002\t12345")},
        [("7", "12345", 1267679167, 1)],
    ),
    "RecBole atomic files": Case(
        {
            "ml-100k/ml-100k.inter": text("user_id:token\titem_id:token\trating:float\ttimestamp:float",
                                          "12\t345\t3\t880000001"),
            "ml-100k/ml-100k.item": text("item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
                                         '345\tThe "Odd" One\t1995\tComedy Drama'),
        },
        [("12", "345", 880000001, 0)],
        {"345": 'The "Odd" One'},
    ),
}  # fmt: skip
