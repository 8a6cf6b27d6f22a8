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
              "overall": 5.0, "summary": "s", "unixReviewTime": 1252800000, "reviewTime": "09 13, 2009"}  # fmt: skip
OLD_META = "{'asin': 'B0', 'salesRank': {'Books': 7}, 'imUrl': 'http://x', 'title': \"Emma's, or: \\\"yes\\\"\"}"
FLAGS = "|".join("0" * 19)
ARTIST = "3bd73256-3905-4f3a-97e2-8b341527f805"
H_AND_M = "article_id,product_code,prod_name,product_type_no,product_type_name,detail_desc"
GAMES = "app_id,title,date_release,win,mac,linux,rating,positive_ratio,user_reviews,price_final,price_original,discount"
KUAI = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio"
CAPTIONS = ("video_id,manual_cover_text,caption,topic_tag,first_level_category_id,first_level_category_name,"
            "second_level_category_id,second_level_category_name")  # fmt: skip
STEAM_REVIEW = ("{u'username': u'Chaos, S.', u'hours': 0.1, u'products': 41, u'product_id': u'725', u'page_order': 0, "
                "u'date': u'2017-12-17', u'text': u'It\\'s \"ok\"\\n', u'page': 1}")  # fmt: skip
STEAM_GAME = "{u'publisher': u'K', u'genres': [u'Action'], u'app_name': u'Lost \\xe9', u'price': 4.99, u'id': u'725'}"

CASES = {
    "MovieLens 100K": Case(
        {
            "ml-100k/u.data": text("196\t242\t3\t881250949", "186\t242\t5\t891717742"),
            "ml-100k/u.item": text(f"242|Kolyá (1996)|24-Jan-1997||http://x|{FLAGS}", encoding="latin1"),
        },
        [("196", "242", 881250949, 0), ("186", "242", 891717742, 1)],
        {"242": "Kolyá (1996)"},
    ),
    "MovieLens 1M, 10M": Case(
        {
            "ml-1m/ratings.dat": text("1::1193::5::978300760", "1::661::3.5::978302109"),
            "ml-1m/movies.dat": text("661::Misérables, Les: 2 (1995)::Drama|Musical", encoding="latin1"),
        },
        [("1", "1193", 978300760, 1), ("1", "661", 978302109, 0)],
        {"661": "Misérables, Les: 2 (1995)"},
    ),
    "MovieLens 20M, 25M, 32M, latest": Case(
        {
            "ml-20m/ratings.csv": text("userId,movieId,rating,timestamp", "1,2,3.5,1112486027", "1,29,4.0,1112484676"),
            "ml-20m/movies.csv": text("movieId,title,genres", '29,"City of Lost Children, The (1995)",Drama'),
        },
        [("1", "2", 1112486027, 0), ("1", "29", 1112484676, 1)],
        {"29": "City of Lost Children, The (1995)"},
    ),
    "Amazon 2014": Case(
        {"amazon-2014/reviews_Books_5.json.gz": packed(OLD_REVIEW), "amazon-2014/meta_Books.json.gz": packed(OLD_META)},
        [("A1", "B0", 1252800000, 1)],
        {"B0": 'Emma\'s, or: "yes"'},
    ),
    "Amazon 2014, ratings only": Case(
        {"ratings_Books.csv": text("AH2L,0000000116,4.0,1019865600"), "meta_Books.json.gz": packed(OLD_META)},
        [("AH2L", "0000000116", 1019865600, 1)],
        {"B0": 'Emma\'s, or: "yes"'},
    ),
    "Amazon 2018": Case(
        {
            "amazon-2018/Books_5.json.gz": packed(
                {"overall": 3.0, "verified": True, "reviewTime": "03 30, 2005", "reviewerID": "A1", "asin": "000171",
                 "style": {"Format:": " Hardcover"}, "reviewText": "x", "unixReviewTime": 1112140800}
            ),
            "amazon-2018/meta_Books.json.gz": packed({"category": ["Books"], "title": "The Egg", "asin": "000171"}),
        },
        [("A1", "000171", 1112140800, 0)],
        {"000171": "The Egg"},
    ),
    "Amazon 2023": Case(
        {
            "amazon-2023/Books.jsonl.gz": packed(
                {"rating": 5.0, "title": "x", "text": "y", "images": [], "asin": "B09", "parent_asin": "B0C",
                 "user_id": "AGKH", "timestamp": 1686283870684, "helpful_vote": 0, "verified_purchase": True}
            ),
            "amazon-2023/meta_Books.jsonl.gz": packed({"main_category": "Books", "title": "The Egg", "price": None,
                                                       "details": {}, "parent_asin": "B0C"}),
        },
        [("AGKH", "B0C", 1686283870, 1)],
        {"B0C": "The Egg"},
    ),
    "Book-Crossing": Case(
        {
            "BX-Book-Ratings.csv": text('"User-ID";"ISBN";"Book-Rating"', '"276725";"034545104X";"0"',
                                        '"276726";"0155061224";"5"', '"276736";"3257224281";"8"', end="\r\n"),
            "BX-Books.csv": text(
                '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher";"Image-URL-S";"Image-URL-M";'
                '"Image-URL-L"',
                '"3257224281";"Die Straße; € 1";"K. Böll";"1999";"Diogenes";"http://a";"http://b";"http://c"',
'"0393045218";"The \\"Mummies\\" of U. &amp; B.";"E. W. Barber";"1999";"Norton";"http://a";"http://b";"http://c"',
                encoding="cp1252", end="\r\n",
            ),
        },
        [("276726", "0155061224", None, 0), ("276736", "3257224281", None, 1)],
        {"3257224281": "Die Straße; € 1 by K. Böll", "0393045218": 'The "Mummies" of U. & B. by E. W. Barber'},
    ),
    "Goodreads": Case(
        {
            "goodreads_interactions_poetry.json.gz": packed(
                *({"user_id": "8842281e", "book_id": "1384", "review_id": "1bad", "is_read": rating > 0,
                   "rating": rating, "review_text_incomplete": "", "date_added": "Wed May 09 09:33:44 -0700 2007",
                   "date_updated": "Wed May 09 09:33:44 -0700 2007", "read_at": "", "started_at": ""}
                  for rating in (4, 0))
            ),
            "goodreads_books_poetry.json.gz": packed(
                {"isbn": "", "popular_shelves": [{"count": "2979", "name": "to-read"}], "average_rating": "4.03",
                 "book_id": "1384", "title": "The Iliad", "title_without_series": "The Iliad"}
            ),
        },
        [("8842281e", "1384", 1178728424, 1)],
        {"1384": "The Iliad"},
    ),
    "Goodreads, all interactions": Case(
        {"goodreads_interactions.csv": text("user_id,book_id,is_read,rating,is_reviewed", "0,948,1,5,0", "0,947,1,3,1",
                                            "0,946,0,0,0")},
        [("0", "948", None, 1), ("0", "947", None, 0)],
    ),
    "Yelp": Case(
        {
            "yelp_academic_dataset_review.json": text(
                json.dumps({"review_id": "KU_O", "user_id": "mh_-", "business_id": "XQfw", "stars": 3.0, "useful": 0,
                            "funny": 0, "cool": 0, "text": "If\n\"you\"", "date": "2018-07-07 22:09:11"})
            ),
            "yelp_academic_dataset_business.json": text(
                json.dumps({"business_id": "XQfw", "name": "Turning Point", "city": "North Wales", "stars": 3.0,
                            "attributes": {"WiFi": "u'free'"}, "hours": None})
            ),
        },
        [("mh_-", "XQfw", 1531001351, 0)],
        {"XQfw": "Turning Point, North Wales"},
    ),
    "Netflix Prize": Case(
        {
            "combined_data_1.txt": text("1:", "1488844,3,2005-09-06", "822109,5,2005-05-13",
"72:", "885013,4,2005-10-19"),
            "movie_titles.csv": text("1,2003,Dinosaur Planet", "72,1974,At Home, Café", encoding="latin1"),
        },
        [("1488844", "1", 1125964800, 0), ("822109", "1", 1115942400, 1), ("885013", "72", 1129680000, 1)],
        {"1": "Dinosaur Planet (2003)", "72": "At Home, Café (1974)"},
    ),
    "Steam, recommendations (Kaggle)": Case(
        {
            "recommendations.csv": text("app_id,helpful,funny,date,is_recommended,hours,user_id,review_id",
                                        "975370,0,0,2022-12-12,true,36.3,51580,0",
"304390,4,0,2017-02-17,false,11.5,2586,1"),
            "games.csv": text(GAMES, '975370,"Dwarf, Fortress",2022-12-06,true,false,false,Positive,95,9,29.9,29.9,0'),
        },
        [("51580", "975370", 1670803200, 1), ("2586", "304390", 1487289600, 0)],
        {"975370": "Dwarf, Fortress"},
    ),
    "KuaiRec": Case(
        {
            "KuaiRec 2.0/data/big_matrix.csv": text(
                KUAI, "0,3649,13838,10867,2020-07-05 00:08:23.438,20200705,1593878903.438,1.27",
                "0,9598,13665,6000,2020-07-05 00:13:41.297,20200705,1593879221.297,2.2775",
            ),
            "KuaiRec 2.0/data/kuairec_caption_category.csv": text(
                CAPTIONS, '9598,UNKNOWN,"五爱街,最美",[五爱市场],8,颜值,673,颜值随拍'),
        },
        [("0", "3649", 1593878903, 0), ("0", "9598", 1593879221, 1)],
        {"9598": "五爱街,最美"},
    ),
    "MIND": Case(
        {
            "MINDsmall_train/behaviors.tsv": text(
                "1\tU13740\t11/11/2019 9:05:58 AM\tN55189 N42782\tN55689-1 N35729-0",
"2\tU9\t11/12/2019 6:11:30 PM\t\tN5-1"),
            "MINDsmall_train/news.tsv": text(
                'N55689\tlifestyle\troyals\tThe "Brands" we like\tShop the\thttps://x\t[{"Label": "P"}]\t[]'),
        },
        [("U13740", "N55689", 1573463158, 1), ("U13740", "N35729", 1573463158, 0), ("U9", "N5", 1573582290, 1)],
        {"N55689": 'The "Brands" we like'},
    ),
    "RetailRocket": Case(
        {"events.csv": text("timestamp,visitorid,event,itemid,transactionid", "1433221332117,257597,view,355908,",
                            "1433222276276,599528,transaction,356475,4000")},
        [("599528", "356475", 1433222276, 1)],
    ),
    "REES46": Case(
        {"2019-Oct.csv": text(
            "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session",
            "2019-10-01 00:00:00 UTC,view,44600062,2103807459595387724,,shiseido,35.79,541312140,72d76fde-8bb3",
            "2019-10-01 00:02:14 UTC,purchase,1004856,20530135556,electronics.phone,samsung,130.76,543,8187d148")},
        [("543", "1004856", 1569888134, 1)],
    ),
    "Yoochoose": Case(
        {"yoochoose-clicks.dat": text("1,2014-04-07T10:51:09.277Z,214536502,0",
"2,2014-04-07T13:56:37.614Z,214662742,S")},
        [("1", "214536502", 1396867869, 1), ("2", "214662742", 1396878997, 1)],
    ),
    "Diginetica": Case(
        {"train-item-views.csv": text("sessionId;userId;itemId;timeframe;eventdate", "1;NA;81766;526309;2016-05-09",
                                      "1;NA;31331;1031018;2016-05-09")},
        [("1", "81766", 1462752000, 1), ("1", "31331", 1462752000, 1)],
    ),
    "Taobao user behavior": Case(
        {"UserBehavior.csv": text("1,2268318,2520377,pv,1511544070", "1,2333346,2520771,buy,1511561733")},
        [("1", "2333346", 1511561733, 1)],
    ),
    "Tmall, IJCAI-15": Case(
        {"data_format1/user_log_format1.csv": text("user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type",
                                                   "328862,323294,833,2882,2661.0,829,0",
"328862,844400,1271,2882,,1111,2")},
        [("328862", "844400", 1111, 1)],
    ),
    "Tmall, IJCAI-16": Case(
        {"ijcai2016_taobao.csv": text("use_ID,sel_ID,ite_ID,cat_ID,act_ID,time", "1980536,9666,1982415,1,0,20151108",
                                      "1980536,9666,1982416,1,1,20151109")},
        [("1980536", "1982416", 1447027200, 1)],
    ),
    "H&M": Case(
        {
            "transactions_train.csv": text("t_dat,customer_id,article_id,price,sales_channel_id",
                                           "2018-09-20,000058a12d5b43e6,0663713001,0.0508305084745762,2"),
            "articles.csv": text(H_AND_M, '0663713001,0663713,Atlanta Push Body,283,Underwear,"Lace, with ""cups"""'),
        },
        [("000058a12d5b43e6", "0663713001", 1537401600, 1)],
        {"0663713001": "Atlanta Push Body, Underwear"},
    ),
    "Last.fm, HetRec 2011": Case(
        {
            "user_artists.dat": text("userID\tartistID\tweight", "2\t51\t13883", end="\r\n"),
            "artists.dat": text("id\tname\turl\tpictureURL", '51\tMötley "Crüe\thttp://x\thttp://y', end="\r\n"),
        },
        [("2", "51", None, 1)],
        {"51": 'Mötley "Crüe'},
    ),
    "Last.fm 360K": Case(
        {"usersha1-artmbid-artname-plays.tsv": text(f"00000c28\t{ARTIST}\tdie Ärzte\t1099",
'00000c28\t\t"weird al"\t897')},
        [("00000c28", "die Ärzte", None, 1), ("00000c28", '"weird al"', None, 1)],
    ),
    "Last.fm 1K": Case(
        {"userid-timestamp-artid-artname-traid-traname.tsv": text(
            f"user_000001\t2009-05-04T23:08:57Z\t{ARTIST}\tDeep Dish\t\tTrack 7 (\"Live\")")},
        [("user_000001", "Deep Dish", 1241478537, 1)],
    ),
    "Steam, reviews (UCSD)": Case(
        {"steam_reviews.json.gz": packed(STEAM_REVIEW), "steam_games.json.gz": packed(STEAM_GAME)},
        [("Chaos, S.", "725", 1513468800, 1)],
        {"725": "Lost é"},
    ),
    "Steam-200k": Case(
        {"steam-200k.csv": text("151603712,The Elder Scrolls V Skyrim,purchase,1.0,0",
                                "151603712,The Elder Scrolls V Skyrim,play,273.0,0",
                                '59945701,"Warhammer 40,000 Dawn of War",play,2.2,0')},
        [("151603712", "The Elder Scrolls V Skyrim", None, 1), ("59945701", "Warhammer 40,000 Dawn of War", None, 1)],
    ),
    "Gowalla": Case(
        {"loc-gowalla_totalCheckins.txt.gz": packed("0\t2010-10-19T23:55:27Z\t30.2359091167\t-97.7951395833\t22847")},
        [("0", "22847", 1287532527, 1)],
    ),
    "RecBole atomic files": Case(
        {
            "ml-100k/ml-100k.inter": text("user_id:token\titem_id:token\trating:float\ttimestamp:float",
                                          "196\t242\t3\t881250949"),
            "ml-100k/ml-100k.item": text("item_id:token\tmovie_title:token_seq", '242\tThe "Odd" One'),
        },
        [("196", "242", 881250949, 0)],
        {"242": 'The "Odd" One'},
    ),
}  # fmt: skip
