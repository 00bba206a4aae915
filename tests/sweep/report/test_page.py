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


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium")
def test_the_page_fits_and_begins_with_the_verdict(folder: Path) -> None:
    assert browser.first_screen(folder / "report.html") == [(True, True)] * 2


def test_the_page_needs_nothing_else(folder: Path) -> None:
    shown = (folder / "report.html").read_text()
    addresses = re.findall(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?([^"'\s)>]+)""", shown)
    assert len(
        [address for address in addresses if address.startswith("data:image/png;base64,")]
    ) == len(FIGURES)
    assert "http://" not in shown
    assert "https://" not in shown
    assert "default-src 'none'" in shown


def test_text_of_trials_cannot_become_html() -> None:
    shown = page.html(ODD["nasty text"], {})
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;$a$" in shown
    assert NASTY not in shown


@pytest.mark.parametrize("name", ODD)
def test_every_search_has_a_page_with_all_its_trials(name: str) -> None:
    shown = page.html(ODD[name], {})
    assert shown.count("<tr") == 1 + len(ODD[name].trials)
