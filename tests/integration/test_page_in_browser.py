"""The page of the ranking service in a real browser, in front of a real model."""

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import uvicorn

import collm_dist
from collm_dist.serving.access import Access, hash_token
from collm_dist.serving.batching import Batcher
from collm_dist.serving.exploration import ModelComparison, add_comparison, add_search
from collm_dist.serving.http_app import build_app
from collm_dist.serving.http_schemas import HealthAnswer
from collm_dist.serving.ranking_comparison import compare_each
from collm_dist.serving.requests import RankingQuery
from collm_dist.serving.service_options import ServiceOptions
from collm_dist.serving.web_page import add_page
from tests.integration.test_screenshots import load_script

pytestmark = pytest.mark.slow  # needs a browser
pytest.importorskip("selenium", reason="needs pip install 'collm-dist[docs]'")

HOSTILE = '<img src=x onerror="document.title=\'owned\'"> & \u202e"quoted"'
WAIT_S = 60
OPTIONS = ServiceOptions(max_history=3, max_candidates=100)


class Doorkeeper:
    """Middleware that asks the server's ``access``, as the gateway does."""

    def __init__(self, app, server):
        self.app, self.server = app, server

    async def __call__(self, scope, receive, send):
        refusal = self.server.access.refuse(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)


class Server:
    """The application of a run on a port of its own; comparisons wait for ``delay_s`` first."""

    def __init__(self, recommender):
        self.delay_s = 0.0
        thread = ThreadPoolExecutor(max_workers=1)
        rank = Batcher(recommender.rank_many, max_size=8, wait_s=0, max_waiting=8, thread=thread)
        compare = Batcher(
            lambda queries: compare_each(recommender.compare, queries),
            max_size=1,
            wait_s=0,
            max_waiting=8,
            thread=thread,
        )

        async def compare_later(query):
            await asyncio.sleep(self.delay_s)
            done = await compare.submit(query)
            is_refused = isinstance(done.answer, Exception)
            return done if is_refused else replace(done, answer=ModelComparison(done.answer, "abc"))

        ids = recommender.item_ids
        health = HealthAnswer(
            ready=True, run="tiny", stage=recommender.stage, model="abc", device="cpu", users=60, items=len(ids)
        )
        examples = [{"history": ids[:3]}, {"user": recommender.user_ids[0]}]
        app = build_app(rank.submit, lambda: health, OPTIONS, examples)
        index = recommender.build_search()
        add_search(app, lambda: index)
        add_comparison(app, compare_later, OPTIONS, examples)
        add_page(app)
        self.access = Access(None, None)
        app.add_middleware(Doorkeeper, server=self)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()

    def stop(self):
        self._server.should_exit = True
        self._thread.join(30)


@pytest.fixture(scope="module")
def window():
    script = load_script()
    with script.open_browser() as window:
        yield window


@pytest.fixture(scope="module")
def recommender(anchored_run):
    recommender = collm_dist.load_recommender(anchored_run, device="cpu")
    recommender._titles[0] = HOSTILE
    return recommender


@pytest.fixture(scope="module")
def server(recommender):
    server = Server(recommender)
    yield server
    server.stop()


class Page:
    """Actions of a person on the page."""

    def __init__(self, window, address):
        self.window, self.address = window, address

    def open(self):
        self.window.get(self.address)
        self.wait(lambda: self.find_all("#results li") and self.find_all("#count option"))

    def find_all(self, selector):
        return self.window.find_elements("css selector", selector)

    def find(self, selector):
        return self.window.find_element("css selector", selector)

    def read(self, selector):
        return self.window.execute_script("return document.querySelector(arguments[0]).textContent", selector).strip()

    def wait(self, condition, seconds=WAIT_S):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.find("body").text
            time.sleep(0.05)

    def search(self, text):
        box = self.find("#search")
        box.clear()
        box.send_keys(text)
        self.wait(lambda: text.lower() in self.read("#results li .title").lower())

    def like(self, text):
        self.search(text)
        self.find("#results .liked").click()

    def choose_known(self, user):
        self.find("[name=mode][value=known]").click()
        self.find("#user").clear()
        self.find("#user").send_keys(user)

    def compare(self):
        self.find("#ask").click()

    def await_lists(self):
        self.wait(lambda: self.find_all("#lists ol") and self.find("#result").get_attribute("aria-busy") == "false")

    def read_list(self, key):
        """Return rank, title and score of each row."""
        rows = self.find_all(f"[aria-labelledby=list-{key}] .row")
        return [
            tuple(row.find_element("css selector", f".{part}").text for part in ("rank", "title", "score"))
            for row in rows
        ]

    def focused(self):
        return self.window.switch_to.active_element

    def press(self, *keys):
        for key in keys:
            self.focused().send_keys(key)


@pytest.fixture
def page(window, server):
    server.delay_s = 0.0
    page = Page(window, server.address)
    page.open()
    window.get_log("browser")
    return page


def test_likes_are_found_and_chosen_from_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    assert "likes" in page.read("#results li small")  # the most liked items, before any search
    page.find("#search").click()
    page.press("amelie")
    page.wait(lambda: page.read("#results li .title") == "Am\u00e9lie \u2014 2001")
    assert page.read("#found").startswith("1 title")
    page.press(Keys.ARROW_DOWN)
    assert page.focused().get_attribute("aria-label") == "Like Am\u00e9lie \u2014 2001"
    page.press(Keys.SPACE)
    assert page.focused().get_attribute("aria-pressed") == "true"
    assert page.read("#picks-liked bdi") == "Am\u00e9lie \u2014 2001"
    page.press(Keys.TAB, Keys.ENTER)  # Dislike takes its place
    assert page.read("#picks-disliked bdi") == "Am\u00e9lie \u2014 2001"
    assert not page.find("#picks-liked").is_displayed()
    page.press(Keys.ESCAPE)
    assert page.focused().get_attribute("id") == "search"
    page.find("#picks-disliked button").click()
    assert not page.find("#picks-disliked").is_displayed()
    page.find("#search").send_keys("qqq")
    page.wait(lambda: "No title has" in page.read("#found"))
    page.find("#search").send_keys(Keys.CONTROL, "a")
    page.find("#search").send_keys(Keys.DELETE)
    page.wait(lambda: len(page.find_all("#results li")) == 12)
    assert page.window.get_log("browser") == []


def test_lists_are_asked_for_and_explained_from_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    def tab_to(found):
        for _ in range(80):
            if found(page.focused()):
                return
            page.press(Keys.TAB)
        raise AssertionError("not reached by TAB")

    page.like("Film 17 ")
    page.find("#search").click()
    tab_to(lambda element: element.get_attribute("id") == "ask")
    page.press(Keys.ENTER)
    page.await_lists()
    tab_to(lambda element: "row" in element.get_attribute("class").split())
    page.press(Keys.ENTER)
    assert page.focused().get_attribute("aria-expanded") == "true"
    assert page.find(".why").is_displayed()
    assert page.window.get_log("browser") == []


def test_the_lists_are_those_of_the_service(page, recommender):
    for title in ("Film 17 ", "Film 40 "):
        page.like(title)
    page.compare()
    page.await_lists()
    expected = recommender.compare(RankingQuery(history=["17", "40"], disliked=[], num_retrieved=20)).items
    for key in ("popularity", "collaborative", "language_model"):
        places = {getattr(item, key).rank: item for item in expected}
        shown = page.read_list(key)
        assert [int(rank) for rank, _, _ in shown] == list(range(1, 11))
        for rank, title, score in shown:
            item = places[int(rank)]
            assert title == item.title
            assert float(score.replace("\u2212", "-").replace(",", "")) == pytest.approx(
                getattr(item, key).score, abs=6e-4
            )
    first = expected[0]
    page.find("[aria-labelledby=list-language_model] .row").click()
    assert page.focused().get_attribute("aria-expanded") == "true"
    why = page.read(".why").replace("\u2212", "-")
    for value in (first.anchor.score, first.llm, first.bias):
        assert f"{value:+.3f}" in why
    assert len(page.find_all(".selected")) == sum(
        getattr(first, key).rank <= 10 for key in ("popularity", "collaborative", "language_model")
    )
    widths = [float(bar.value_of_css_property("width")[:-2]) for bar in page.find_all(".row .bar.llm")]
    assert max(widths) >= 1
    page.find("#all").click()
    assert len(page.read_list("popularity")) == 20
    assert page.window.get_log("browser") == []


def test_titles_are_text(page, recommender):
    page.search("<img")
    assert page.read("#results li .title") == HOSTILE
    page.find("#results .disliked").click()
    page.like("<unk>")
    page.compare()
    page.await_lists()
    assert HOSTILE in page.read("#about")
    assert "<unk> <UserID> [PAD]" in page.read("#about")
    assert page.find_all("img") == []
    assert "owned" not in page.window.title
    assert page.window.get_log("browser") == []


def test_a_user_of_the_log_and_a_stranger(page, recommender):
    page.choose_known("7")
    page.compare()
    page.await_lists()
    expected = recommender.compare(RankingQuery(user="7", num_retrieved=20))
    assert expected.history[-1].title in page.read("#about")
    assert [title for _, title, _ in page.read_list("language_model")] == [item.title for item in expected.items[:10]]
    page.choose_known("nobody <b>")
    page.compare()
    page.wait(lambda: "user: 'nobody <b>' is not in the run's log" in page.read("#state"))
    assert len(page.read_list("language_model")) == 10
    page.choose_known(" ")
    page.compare()
    page.wait(lambda: page.read("#alert") == "Give the id of a user of the log.")


def test_errors_are_shown_as_the_service_says_them(page):
    for number in (17, 40, 41, 42):
        page.like(f"Film {number} ")
    page.compare()
    page.wait(lambda: "history: 4 items exceed the limit of 3" in page.read("#alert"))
    assert page.find("#result").get_attribute("aria-busy") == "false"
    page.find("#picks-liked button").click()
    page.find("#alert button").click()  # try again
    page.await_lists()
    assert page.read("#alert") == ""
    page.window.execute_cdp_cmd("Network.enable", {})
    lost = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    page.window.execute_cdp_cmd("Network.emulateNetworkConditions", lost)
    try:
        page.compare()
        page.wait(lambda: "The service does not answer" in page.read("#alert"))
    finally:
        found = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        page.window.execute_cdp_cmd("Network.emulateNetworkConditions", found)


def test_a_slow_answer_can_be_cancelled(page, server):
    server.delay_s = 30.0
    page.like("Film 17 ")
    page.compare()
    assert page.find("#result").get_attribute("aria-busy") == "true"
    page.wait(lambda: "is reading 20 candidates" in page.read("#state"))
    page.find("#state button").click()
    page.wait(lambda: page.read("#state") == "Cancelled.")
    assert page.find("#result").get_attribute("aria-busy") == "false"
    server.delay_s = 0.0
    page.compare()
    page.await_lists()


def test_a_token_is_asked_for_and_sent(page, server):
    server.access = Access(hash_token("a-token-for-the-tests"), None)
    try:
        page.window.get(page.address)
        page.wait(lambda: page.find("#token-form").is_displayed())
        assert not page.find("#docs").is_displayed()
        page.find("#token").send_keys("wrong")
        page.find("#token-form button").click()
        page.wait(lambda: page.find("#token-form").is_displayed())
        page.find("#token").clear()
        page.find("#token").send_keys("a-token-for-the-tests")
        page.find("#token-form button").click()
        page.wait(lambda: len(page.find_all("#results li")) == 12)
        assert not page.find("#token-form").is_displayed()
        page.compare()
        page.await_lists()
    finally:
        server.access = Access(None, None)


def test_a_phone_and_the_dark(page):
    window = page.window
    light = page.find("body").value_of_css_property("background-color")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    phone = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    try:
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        assert page.find("body").value_of_css_property("background-color") != light
        window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        page.like("Film 17 ")
        page.compare()
        page.await_lists()
        page.find("[aria-labelledby=list-language_model] .row").click()
        assert page.find(".why").is_displayed()
        assert window.execute_script("return document.documentElement.scrollWidth") <= 320
        tops = [one.rect["y"] for one in page.find_all(".list")]
        assert tops == sorted(set(tops))  # below each other
    finally:
        window.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
