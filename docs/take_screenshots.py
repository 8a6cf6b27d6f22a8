"""The pictures of docs/monitoring.md and docs/serving.md, from a real TensorBoard and service in a real browser.

    python docs/take_screenshots.py RUNS [--output docs/images]
    python docs/take_screenshots.py RUNS --only page --run runs/ml100k_demo

RUNS is a folder of finished runs; the page is that of ``--run``. Needed: ``pip install 'collm-dist[docs]'``, Chromium
and its driver (Debian: packages chromium and chromium-driver). Nothing but this machine's loopback interface is used.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 180
BROWSERS, DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)
BROWSER_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"
)
# Elements that a selector finds, also inside the shadow trees and frames that TensorBoard's pages are made of.
FIND = """
const found = [];
const visit = (root) => {
  found.push(...root.querySelectorAll(arguments[0]));
  root.querySelectorAll('*').forEach((one) => {
    if (one.shadowRoot || one.contentDocument) visit(one.shadowRoot || one.contentDocument);
  });
};
visit(document);
"""
# The search box is the first field on the right.
SEARCH = """
const box = found.find((one) => one.getBoundingClientRect().x > 1000);
box.value = arguments[1];
for (const name of ['input', 'change']) box.dispatchEvent(new Event(name, {bubbles: true, composed: true}));
"""


@dataclass(frozen=True)
class Picture:
    """One page.

    Attributes:
        name: of the file, after ``tensorboard_``.
        page: TensorBoard's address of it: its name, after what it is asked for.
        height, width: of the window in pixels.
        ready: selector of what the page shows once it has its data; at least ``least`` of it.
        settle_seconds: waited then, for what is still drawn or turned.
        searches: whether the text of ``--search`` is put into the projector's search box.
    """

    name: str
    page: str
    height: int
    ready: str
    least: int = 1
    settle_seconds: float = 3.0
    searches: bool = False
    width: int = 1400


PICTURES = (
    Picture("scalars", "?tagFilter=train/loss|valid/&smoothing=0#timeseries", 1000, "line-chart", 2),
    Picture("custom_scalars", "#custom_scalars", 1250, "vz-line-chart2", 3),
    Picture("hparams", "#hparams", 560, "vaadin-grid-cell-content", 8, width=2100),
    Picture("projector", "#projector", 900, "canvas", settle_seconds=8.0, searches=True),
    Picture("images", "#images", 1000, "img"),
)


@contextmanager
def serve_tensorboard(logdir: Path) -> Iterator[str]:
    """Start TensorBoard on a free loopback port; yields its address once it has read the runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([*command, "--port", str(port), "--load_fast=false"], **quiet)  # type: ignore[call-overload]  # noqa: S603
    try:
        address = f"http://127.0.0.1:{port}"
        _await_runs(server, address)
        yield address
    finally:
        server.terminate()
        server.wait()


def _await_runs(server: subprocess.Popen[bytes], address: str) -> None:
    """Wait until the number of runs that TensorBoard has read no longer grows."""
    before, deadline = 0, time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"TensorBoard ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/data/runs", timeout=TIMEOUT_SECONDS) as reply:  # noqa: S310
                runs = len(json.load(reply))
        except (urllib.error.URLError, ConnectionError):
            runs = 0
        if runs and runs == before:
            return
        before = runs
        time.sleep(3)
    raise SystemExit(f"TensorBoard found no runs in {TIMEOUT_SECONDS} s")


@contextmanager
def serve_run(run: Path) -> Iterator[str]:
    """Start the ranking service of a finished run on a free loopback port; yields its address once it answers."""
    command = [sys.executable, "launch/serve.py", "--config", str(run / "config.yaml"), f"run.dir={run}", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:  # noqa: S603
        try:
            assert server.stdout is not None
            lines = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in server.stdout)
            found = next(filter(None, lines), None)
            if found is None:
                raise SystemExit(f"the service of {run} did not start")
            yield found[0]
        finally:
            server.terminate()


def take_page(window: Any, address: str, liked: Sequence[str]) -> dict[str, Image.Image]:
    """Return pictures of the ranking service's page, for a new user who likes titles, by name."""
    window.set_window_size(1400, 1040)
    window.get(address)
    wait = WebDriverWait(window, TIMEOUT_SECONDS)
    first = "return document.querySelector('#results li .title')?.textContent ?? ''"
    for title in liked:
        box = window.find_element("id", "search")
        box.clear()
        box.send_keys(title)
        wait.until(lambda _, title=title: window.execute_script(first).startswith(title), f"no title '{title}'")
        window.find_element("css selector", "#results .liked").click()
    window.find_element("id", "ask").click()
    rows = "[aria-labelledby=list-language_model] .row"
    wait.until(lambda _: window.find_elements("css selector", rows), "no rankings")
    moved = [row for row in window.find_elements("css selector", rows) if row.find_elements("css selector", ".move.up")]
    (moved or window.find_elements("css selector", rows))[0].click()
    window.execute_script("window.scrollTo(0, 0)")
    pictures = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        time.sleep(0.5)
        pictures[scheme] = Image.open(io.BytesIO(window.get_screenshot_as_png())).convert("RGB")
    return pictures


@contextmanager
def open_browser() -> Iterator[Any]:
    """Start a headless browser with a profile of its own, which is removed afterwards."""
    browser, driver = (next(filter(None, map(shutil.which, names)), None) for names in (BROWSERS, DRIVERS))
    if browser is None or driver is None:
        raise SystemExit("needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)")
    os.environ["SE_AVOID_STATS"] = "true"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*BROWSER_FLAGS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        window = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield window
        finally:
            window.quit()


def take(window: Any, address: str, picture: Picture, search: str) -> Image.Image:
    """Open a page, wait until it shows its data, and return what is seen; the projector marks what ``search`` finds."""
    window.set_window_size(picture.width, picture.height)
    window.get("about:blank")  # a change of the fragment alone would not load the page anew
    window.get(f"{address}/{picture.page}")

    def is_ready(_: Any) -> bool:
        visible = "return found.filter((one) => one.getBoundingClientRect().width > 0).length"
        return int(window.execute_script(FIND + visible, picture.ready)) >= picture.least

    WebDriverWait(window, TIMEOUT_SECONDS).until(is_ready, f"{picture.page} shows no '{picture.ready}'")
    time.sleep(picture.settle_seconds)
    if picture.searches:
        window.execute_script(FIND + SEARCH, "input", search)
        time.sleep(picture.settle_seconds)
    return Image.open(io.BytesIO(window.get_screenshot_as_png())).convert("RGB")


def save_small(image: Image.Image, path: Path) -> None:
    """Write a PNG of 128 colours, which a screenshot does well with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def main(arguments: list[str] | None = None) -> int:
    """Take the pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of finished runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images", help="where pictures go")
    parser.add_argument("--search", default="Star ", help="what to mark in the projector")
    parser.add_argument("--only", choices=[*(one.name for one in PICTURES), "page"], help="take this one alone")
    parser.add_argument("--run", type=Path, help="finished run whose ranking service shows its page")
    parser.add_argument("--liked", nargs="+", default=["Star Wars", "Alien", "Blade Runner"], help="titles to like")
    given = parser.parse_args(arguments)
    if not given.runs.is_dir():
        parser.error(f"there is no folder '{given.runs}'")
    if given.only == "page" and given.run is None:
        parser.error("--only page needs --run")
    if given.run is not None:
        with serve_run(given.run.resolve()) as address, open_browser() as window:
            for name, image in take_page(window, address, given.liked).items():
                save_small(image, given.output / f"page_{name}.png")
    if given.only == "page":
        return 0
    with serve_tensorboard(given.runs) as address, open_browser() as window:
        for picture in PICTURES:
            if given.only in (None, picture.name):
                path = given.output / f"tensorboard_{picture.name}.png"
                save_small(take(window, address, picture, given.search), path)
                print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
