"""Pages in a headless Chromium."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

from tests.ran import ran

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
RESULT = re.compile(r'<pre id="measured">(.*?)</pre>', re.DOTALL)


def measured(page: Path, script: str, width: int, dark: bool = False) -> Any:
    """The value, through JSON, of a JavaScript expression in a page that is `width` pixels wide and 900 high."""
    assert CHROMIUM
    text = page.read_text()
    # A frame has exactly this width; a window of Chromium is at least 500 pixels wide.
    inner = page.with_name(f"{page.stem}-inner.html")
    inner.write_text(
        text.replace(
            "</body>",
            "<script>addEventListener('load', () => parent.postMessage("
            f"JSON.stringify({script}), '*'))</script></body>",
        )
    )
    outer = page.with_name(f"{page.stem}-outer.html")
    outer.write_text(
        "<!doctype html><script>addEventListener('message', event => {"
        "const found = document.createElement('pre'); found.id = 'measured';"
        "found.textContent = event.data; document.body.append(found); })</script>"
        f'<body><iframe src="{inner.name}" width="{width}" height="900"></iframe></body>'
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    if dark:
        options.append("--blink-settings=preferredColorScheme=0")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = ran([CHROMIUM, *options, profile, "--dump-dom", outer.as_uri()])
    found = RESULT.search(done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))
