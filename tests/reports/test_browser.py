"""The report in a browser: from disk, offline, by keyboard, on a phone, printed.

Requires chromium and chromium-driver; with MU_BROWSER set, their absence is a failure.
"""

import base64
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from mu.images import save_grid
from mu.reports.explorer import read_progress, save_sprite_sheet
from mu.reports.page import write_report

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING) and "MU_BROWSER" not in os.environ,
    reason=f"no {' and no '.join(MISSING)}: apt install chromium chromium-driver",
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
STEPS, RUNS = (0, 50, 100), {"unlearned-0": 0, "meta-0": 1}
IMAGES = [("forget", "a cat", seed) for seed in range(3)] + [("related", "a tiger", 0)]


def color(run, step, seed):
    """Return the colour that identifies an image."""
    return torch.tensor([0.2 + 0.5 * RUNS[run], step / 125, seed / 4])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    base = tmp_path_factory.mktemp("page")
    for run in RUNS:
        folder = base / "attack" / run / "full-0"
        folder.mkdir(parents=True)
        for step in STEPS:
            hit = int(step == 100 and run != "meta-0")
            items = [
                {"group": group, "prompt": prompt, "seed": seed, "step": step, "hit": hit}
                for group, prompt, seed in IMAGES
            ]
            colors = [color(run, step, item["seed"])[:, None, None] for item in items]
            images = torch.stack([one.expand(3, 16, 16) for one in colors])
            save_grid(images, folder / f"step-{step:04d}.png")
            (folder / f"step-{step:04d}.json").write_text(json.dumps(items))
    course = save_sprite_sheet(read_progress(base, "full", list(RUNS)), base / "report")
    return write_report(
        base / "report",
        title="A title",
        claim="A claim.",
        courses=[course],
        tables={"a table": pd.DataFrame({"a": [1]})},
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def shown(browser, page):
    browser.set_window_size(1000, 900)
    browser.get(page.as_uri())
    WebDriverWait(browser, 10).until(
        lambda _: "recognised" in browser.find_element(By.ID, "drawn").text
    )
    return browser


def words(browser):
    return [caption.text for caption in browser.find_elements(By.CSS_SELECTOR, "#drawn figcaption")]


def pixel(browser, number):
    """Return the colour at the centre of a model's image, from a screenshot."""
    canvas = browser.find_elements(By.CSS_SELECTOR, "#drawn canvas")[number]
    picture = np.asarray(Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("RGB"))
    return picture[picture.shape[0] // 2, picture.shape[1] // 2] / 255


def test_the_slider_shows_the_images_of_a_step(shown):
    last = ["unlearned: recognised", "meta-unlearned: not recognised"]
    assert words(shown) == last, "the last step is shown first"
    for run, number in RUNS.items():
        np.testing.assert_allclose(pixel(shown, number), color(run, 100, 0), atol=0.05)
    shown.find_element(By.ID, "step").send_keys(Keys.ARROW_LEFT)
    assert shown.find_element(By.ID, "at").text == "50"
    assert words(shown)[0] == "unlearned: not recognised"
    announced = shown.find_element(By.ID, "told").get_attribute("textContent")
    assert announced == (
        "After 50 steps; unlearned: not recognised; meta-unlearned: not recognised"
    )
    assert len(shown.find_elements(By.CSS_SELECTOR, "[aria-live=polite]")) == 1
    np.testing.assert_allclose(pixel(shown, 0), color("unlearned-0", 50, 0), atol=0.05)


def test_prompt_and_seed_are_chosen(shown):
    Select(shown.find_element(By.ID, "seed")).select_by_visible_text("2")
    np.testing.assert_allclose(pixel(shown, 1), color("meta-0", 100, 2), atol=0.05)
    Select(shown.find_element(By.ID, "prompt")).select_by_visible_text("a tiger")
    assert [option.text for option in Select(shown.find_element(By.ID, "seed")).options] == ["0"]
    np.testing.assert_allclose(pixel(shown, 1), color("meta-0", 100, 0), atol=0.05)


def test_every_control_is_reached_by_keyboard(shown):
    reached = []
    for _ in range(12):
        shown.switch_to.active_element.send_keys(Keys.TAB)
        element = shown.switch_to.active_element
        reached.append(element.get_attribute("id") or element.get_attribute("class"))
    controls = ["attack", "prompt", "seed", "step"]
    assert [name for name in reached if name in controls][:4] == controls
    assert "skip" in reached
    assert "scroll" in reached
    canvas = shown.find_elements(By.CSS_SELECTOR, "#drawn canvas")[0]
    label = canvas.get_attribute("aria-label")
    assert label == "unlearned, a cat, after 100 steps: recognised"
    value = shown.find_element(By.ID, "step").get_attribute("aria-valuetext")
    assert value == "after 100 steps of attack"


def test_a_phone_scrolls_down_only(shown):
    # Windows have a minimum width; the body is made as narrow as a phone.
    shown.set_window_size(500, 800)
    body, document, window = shown.execute_script(
        "document.body.style.width = '360px';"
        "return [document.body.scrollWidth, document.documentElement.scrollWidth,"
        " window.innerWidth]"
    )
    assert body <= 361
    assert document <= window


def test_the_page_loads_nothing_and_logs_no_error(shown):
    loaded = shown.execute_script(
        "return performance.getEntriesByType('resource').map(r => r.name)"
    )
    assert all(name.startswith(("file:", "data:")) for name in loaded)
    assert [entry for entry in shown.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.skipif(
    shutil.which("pdftotext") is None and "MU_BROWSER" not in os.environ,
    reason="no pdftotext: apt install poppler-utils",
)
def test_no_card_is_lost_in_print(browser, tmp_path):
    """A grid of cards would lose those that do not fit on a page, of either paper size."""
    page = Path(__file__).parents[2] / "reports" / "pocket" / "index.html"
    browser.get(page.as_uri())
    questions = [heading.text for heading in browser.find_elements(By.CSS_SELECTOR, ".cards h3")]
    assert len(questions) > 10
    browser.execute_script(
        "document.querySelectorAll('img').forEach(image => image.loading = 'eager')"
    )
    complete = "return [...document.images].every(image => image.complete)"
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(complete))
    for width, height in ((8.5, 11), (8.27, 11.69)):
        size = {"paperWidth": width, "paperHeight": height}
        printed = tmp_path / f"{width}.pdf"
        data = browser.execute_cdp_cmd("Page.printToPDF", size)["data"]
        printed.write_bytes(base64.b64decode(data))
        command = [shutil.which("pdftotext"), str(printed), "-"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        text = " ".join(output.split())
        assert [question for question in questions if question not in text] == []
