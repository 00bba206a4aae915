"""The pages of `make site` in a real browser, narrow and wide, light and dark; `make site` runs this."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import browser

SITE = os.environ.get("OLORA_SITE")
PAGES = sorted(Path(SITE).resolve().rglob("index.html")) if SITE else []
pytestmark = pytest.mark.skipif(
    not (SITE and browser.CHROMIUM), reason="only in make site, with Chromium"
)
PROBLEMS = """(() => {
  const found = [];
  const main = document.querySelector("article");
  const width = document.documentElement.clientWidth;
  const scrolls = part => ["auto", "scroll"].includes(getComputedStyle(part).overflowX);
  const in_scroller = part => { for (; part; part = part.parentElement) if (scrolls(part)) return true; return false; };
  const told = part => part.tagName + ": " + part.textContent.trim().slice(0, 40);
  if (document.documentElement.scrollWidth > width) found.push("the page is wider than the window");
  for (const part of main.querySelectorAll("table, pre, code, img, p, li"))
    if (part.getBoundingClientRect().right > width + 1 && !in_scroller(part)) found.push("cut off: " + told(part));
  for (const part of main.querySelectorAll("img"))
    if (!part.naturalWidth) found.push("not loaded: " + part.src);
  for (const part of main.querySelectorAll("code, pre"))
    if (/^(graph|flowchart|sequenceDiagram) /.test(part.textContent.trim())) found.push("a diagram as text");
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((v, i) => a * v + (1 - a) * under[i]);
  const behind = part => {
    if (!part) return [255, 255, 255];
    const own = numbers(getComputedStyle(part).backgroundColor);
    return own[3] === 0 ? behind(part.parentElement) : over(own, behind(part.parentElement));
  };
  for (const name of ["p", "li", "td", "p a", "p code", "pre code", "h1", "h2"]) {
    const part = main.querySelector(name);
    if (!part) continue;
    const ground = behind(part);
    const [a, b] = [light(over(numbers(getComputedStyle(part).color), ground)), light(ground)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) found.push(`contrast of ${name} is ${contrast.toFixed(1)}`);
  }
  return [...new Set(found)].slice(0, 5);
})()"""


@pytest.fixture(scope="module")
def window() -> Iterator[browser.Browser]:
    with browser.opened() as opened:
        yield opened


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_a_page_can_be_read_on_a_phone_and_on_a_wide_screen(
    page: Path, window: browser.Browser
) -> None:
    found = {}
    for width in (390, 1400):
        for dark in (False, True):
            problems = window.measured(page, PROBLEMS, width, dark)
            if problems:
                found[width, dark] = problems
    assert not found
