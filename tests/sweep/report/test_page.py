import json
import re
from pathlib import Path

import pytest

from olora_ray.sweep.report import page
from olora_ray.sweep.report.figures import FIGURES
from tests import browser
from tests.sweep.odd import NASTY, ODD
from tests.sweep.searches import realistic


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("report")
    page.write_report(realistic(), str(made))
    return made


def test_the_page_needs_nothing_else(folder: Path) -> None:
    shown = (folder / "report.html").read_text()
    addresses = re.findall(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?([^"'\s)>]+)""", shown)
    assert len([address for address in addresses if address.startswith("data:image/png;base64,")]) == len(FIGURES)
    assert "http://" not in shown
    assert "https://" not in shown
    assert "default-src 'none'" in shown


def test_text_of_trials_cannot_become_html() -> None:
    shown = page.html(ODD["nasty text"], {})
    assert shown.count("<script>") == 1  # the page's own script
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;$a$" in shown
    assert NASTY not in shown


@pytest.mark.parametrize("name", ODD)
def test_every_search_has_a_page_with_all_its_trials(name: str) -> None:
    shown = page.html(ODD[name], {})
    assert shown.count("<tr") == 1 + len(ODD[name].trials)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("large")
    page.write_report(realistic(500), str(made))
    return made


def test_the_page_of_a_large_search_has_all_its_trials(large: Path) -> None:
    shown = (large / "report.html").read_text()
    assert len(shown) < 4e6
    assert shown.count("<tr") == 1 + 500
    assert len(json.loads((large / "leaderboard.json").read_text())["trials"]) == 500


# Runs after the page's own script: marks the loaded elements, clicks on a column, and writes the resulting order.
PROBE = """<script>addEventListener("load", () => {
  document.querySelectorAll("img").forEach(image => image.dataset.width = image.naturalWidth);
  const order = () => [...document.querySelectorAll("tbody tr")].map(row => parseInt(row.cells[0].textContent));
  const head = [...document.querySelectorAll("th button")].find(button => button.textContent === "COLUMN");
  head.click(); document.body.dataset.up = order();
  head.click(); document.body.dataset.down = order();
});</script>"""


def probed(folder: Path, tmp_path: Path, column: str) -> str:
    copy = tmp_path / "probed.html"
    copy.write_text(
        (folder / "report.html").read_text().replace("</body>", PROBE.replace("COLUMN", column) + "</body>")
    )
    return browser.dom(copy.as_uri())


def test_a_browser_shows_all_figures_and_sorts_the_table(folder: Path, tmp_path: Path) -> None:
    dom = probed(folder, tmp_path, "lr")
    widths = [int(width) for width in re.findall(r'data-width="(\d+)"', dom)]
    assert len(widths) == len(FIGURES)
    assert min(widths) > 900
    rates = [trial.params["train.lr"] for trial in realistic().trials]
    by_rate = sorted(range(len(rates)), key=rates.__getitem__)
    assert re.search(r'data-up="([\d,]+)"', dom).group(1) == ",".join(map(str, by_rate))  # type: ignore[union-attr]
    assert re.search(r'data-down="([\d,]+)"', dom).group(1) == ",".join(map(str, by_rate[::-1]))  # type: ignore[union-attr]
