"""The site, as a reader sees it: each page at the width of a phone and of a screen, light and dark."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import browser

ROOT = Path(__file__).parents[2]
WIDTHS = [1400, 390]

# The contrast is that of WCAG 2: (lighter + 0.05) / (darker + 0.05), of relative luminances.
PROBLEMS = r"""(() => {
const problems = new Set()
const brush = document.createElement("canvas").getContext("2d", {willReadFrequently: true})
const known = new Map()
const rgba = text => {
    if (!known.has(text)) {
        brush.clearRect(0, 0, 1, 1)
        brush.fillStyle = text
        brush.fillRect(0, 0, 1, 1)
        known.set(text, [...brush.getImageData(0, 0, 1, 1).data])
    }
    return known.get(text)
}
const over = (top, below) => [0, 1, 2].map(i => below[i] + (top[i] - below[i]) * top[3] / 255)
const background = element => {
    const below = element.parentElement ? background(element.parentElement) : [255, 255, 255]
    return over(rgba(getComputedStyle(element).backgroundColor), below)
}
const luminance = colour => {
    const [r, g, b] = colour.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
}
const contrast = element => {
    const below = background(element)
    const text = over(rgba(getComputedStyle(element).color), below)
    const [dark, light] = [luminance(below), luminance(text)].sort((a, b) => a - b)
    return (light + 0.05) / (dark + 0.05)
}
const cut = element => element.scrollWidth > element.clientWidth + 1
const scrolls = element => {
    const style = getComputedStyle(element)
    const visible = !/^(transparent|rgba\(0, 0, 0, 0\))/.test(style.scrollbarColor)
    return ["auto", "scroll"].includes(style.overflowX) && visible
}
const short = element => element.textContent.trim().slice(0, 30)

const page = document.documentElement
if (page.scrollWidth > innerWidth) problems.add("the page is too wide")
for (const code of document.querySelectorAll("pre > code")) {
    const diagram = /^\s*(flowchart|graph|sequenceDiagram)\b/.test(code.textContent)
    if (diagram) problems.add(`diagram as text: ${short(code)}`)
    if (cut(code) && !scrolls(code)) problems.add(`code is cut: ${short(code)}`)
}
for (const table of document.querySelectorAll("table")) {
    let wrapper = table
    const reaches = element => element.getBoundingClientRect().right <= page.clientWidth + 1
    const reachable = element => scrolls(element) && reaches(element)
    while (wrapper && !reachable(wrapper)) wrapper = wrapper.parentElement
    if (!reaches(table) && !wrapper) problems.add(`table is cut: ${short(table)}`)
}
for (const picture of document.querySelectorAll("img")) {
    if (!picture.complete || !picture.naturalWidth) problems.add(`no picture: ${picture.src}`)
}
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
while (texts.nextNode()) {
    const element = texts.currentNode.parentElement
    const seen = element.checkVisibility({opacityProperty: true, visibilityProperty: true})
    const ratio = seen && texts.currentNode.textContent.trim() ? contrast(element) : 21
    if (ratio < 4.5) problems.add(`contrast ${ratio.toFixed(1)}: ${element.localName} ${short(element)}`)
}
return [...problems]
})()"""

needs_chromium = pytest.mark.skipif(not browser.CHROMIUM, reason="needs Chromium")


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    with browser.opened() as opened:
        yield opened


@needs_chromium
def test_each_page_can_be_read(chromium: browser.Browser, tmp_path: Path) -> None:
    folders = [f"PAGES={tmp_path / 'pages'}", f"SITE={tmp_path / 'site'}"]
    subprocess.run(["make", "site", *folders], cwd=ROOT, check=True, env={**os.environ})
    pages = sorted((tmp_path / "site").rglob("index.html"))
    assert len(pages) > 30
    found = {}
    for page in pages:
        for width in WIDTHS:
            for dark in [False, True]:
                problems = chromium.measured(page, PROBLEMS, width, dark)
                if problems:
                    found[f"{page.parent.relative_to(tmp_path)} {width} {dark=}"] = problems
    assert found == {}


@needs_chromium
@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<pre><code>flowchart LR</code></pre>", "diagram as text"),
        ("<pre><code>" + "long " * 200 + "</code></pre>", "the page is too wide"),
        (
            "<pre style='overflow: hidden'><code style='display: block; overflow: hidden'>"
            + "long " * 200,
            "code is cut",
        ),
        ("<table style='width: 2000px'><tr><td>wide</table>", "table is cut"),
        ("<img src='none.png'>", "no picture"),
        ("<p style='color: #ff6e42'>pale</p>", "contrast 2.8"),
        ("<p>black on white</p>", None),
    ],
)
def test_what_cannot_be_read_is_found(
    body: str, problem: str | None, chromium: browser.Browser, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><body>{body}")
    found = chromium.measured(page, PROBLEMS, 390)
    assert (found == []) if problem is None else any(each.startswith(problem) for each in found)
