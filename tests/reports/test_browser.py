"""The report in a real browser: from disk, offline, by keyboard, on a phone. It needs Debian's chromium and chromium-driver; where MU_BROWSER is set they must be there."""

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
    reason=f"no {' and no '.join(MISSING)} here: apt install chromium chromium-driver",
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


def color(run, step, seed):
    """Each picture is one colour that says which it is."""
    return torch.tensor([0.2 + 0.5 * RUNS[run], step / 125, seed / 4])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    base = tmp_path_factory.mktemp("page")
    for run in RUNS:
        folder = base / "attack" / run / "full-0"
        folder.mkdir(parents=True)
        for step in STEPS:
            items = [
                {
                    "group": group,
                    "prompt": prompt,
                    "seed": seed,
                    "step": step,
                    "hit": int(step == 100 and run != "meta-0"),
                }
                for group, prompt, seeds in (
                    ("forget", "a cat", range(3)),
                    ("related", "a tiger", range(1)),
                )
                for seed in seeds
            ]
            save_grid(
                torch.stack(
                    [
                        color(run, step, item["seed"])[:, None, None].expand(3, 16, 16)
                        for item in items
                    ]
                ),
                folder / f"step-{step:04d}.png",
            )
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
    """The middle of what the page shows of one model, from a screenshot of it."""
    canvas = browser.find_elements(By.CSS_SELECTOR, "#drawn canvas")[number]
    picture = np.asarray(Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("RGB"))
    return picture[picture.shape[0] // 2, picture.shape[1] // 2] / 255


def test_the_slider_shows_each_models_picture_of_the_step(shown):
    assert words(shown) == ["unlearned: recognised", "meta-unlearned: not recognised"], (
        "it begins with the last step"
    )
    for run, number in RUNS.items():
        np.testing.assert_allclose(pixel(shown, number), color(run, 100, 0), atol=0.05)
    shown.find_element(By.ID, "step").send_keys(Keys.ARROW_LEFT)
    assert (
        shown.find_element(By.ID, "at").text == "50"
        and words(shown)[0] == "unlearned: not recognised"
    )
    told = shown.find_element(By.ID, "told")
    assert (
        told.get_attribute("textContent")
        == "After 50 steps; unlearned: not recognised; meta-unlearned: not recognised"
        and len(shown.find_elements(By.CSS_SELECTOR, "[aria-live=polite]")) == 1
    )
    np.testing.assert_allclose(pixel(shown, 0), color("unlearned-0", 50, 0), atol=0.05)


def test_prompt_and_seed_are_chosen(shown):
    Select(shown.find_element(By.ID, "seed")).select_by_visible_text("2")
    np.testing.assert_allclose(pixel(shown, 1), color("meta-0", 100, 2), atol=0.05)
    Select(shown.find_element(By.ID, "prompt")).select_by_visible_text("a tiger")
    assert [option.text for option in Select(shown.find_element(By.ID, "seed")).options] == ["0"]
    np.testing.assert_allclose(pixel(shown, 1), color("meta-0", 100, 0), atol=0.05)


def test_everything_is_reached_by_keyboard(shown):
    reached = []
    for _ in range(12):
        shown.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(
            shown.switch_to.active_element.get_attribute("id")
            or shown.switch_to.active_element.get_attribute("class")
        )
    assert (
        [name for name in reached if name in ("attack", "prompt", "seed", "step")][:4]
        == ["attack", "prompt", "seed", "step"]
        and "skip" in reached
        and "scroll" in reached
    )
    label = shown.find_elements(By.CSS_SELECTOR, "#drawn canvas")[0].get_attribute("aria-label")
    assert (
        label == "unlearned, a cat, after 100 steps: recognised"
        and shown.find_element(By.ID, "step").get_attribute("aria-valuetext")
        == "after 100 steps of attack"
    )


def test_a_phone_scrolls_down_only(shown):
    shown.set_window_size(
        500, 800
    )  # no window is narrower; what would be is asked of the page below
    width = shown.execute_script(
        "document.body.style.width = '360px'; return [document.body.scrollWidth, document.documentElement.scrollWidth, window.innerWidth]"
    )
    assert width[0] <= 361 and width[1] <= width[2]


def test_nothing_is_asked_of_the_network_and_no_error_is_logged(shown):
    loaded = shown.execute_script(
        "return performance.getEntriesByType('resource').map(r => r.name)"
    )
    assert all(name.startswith(("file:", "data:")) for name in loaded)
    assert [entry for entry in shown.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.skipif(
    shutil.which("pdftotext") is None and "MU_BROWSER" not in os.environ,
    reason="no pdftotext here: apt install poppler-utils",
)
def test_on_paper_no_card_is_lost(browser, tmp_path):
    """Of the committed page, on paper of either size: a grid of cards with figures loses those that do not fit."""
    page = Path(__file__).parents[2] / "reports" / "pocket" / "index.html"
    browser.get(page.as_uri())
    asked = [heading.text for heading in browser.find_elements(By.CSS_SELECTOR, ".cards h3")]
    browser.execute_script(
        "document.querySelectorAll('img').forEach(image => image.loading = 'eager')"
    )
    WebDriverWait(browser, 20).until(
        lambda _: browser.execute_script(
            "return [...document.images].every(image => image.complete)"
        )
    )
    for width, height in ((8.5, 11), (8.27, 11.69)):
        printed = tmp_path / f"{width}.pdf"
        printed.write_bytes(
            base64.b64decode(
                browser.execute_cdp_cmd(
                    "Page.printToPDF", {"paperWidth": width, "paperHeight": height}
                )["data"]
            )
        )
        text = " ".join(
            subprocess.run(
                [shutil.which("pdftotext"), str(printed), "-"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
        )
        assert len(asked) > 10 and [question for question in asked if question not in text] == []
