"""A page in one file: the style of the pages of runs, searches and comparisons (pages/*.html)."""

import base64
from typing import Any

import jinja2


def rendered(template: str, **values: Any) -> str:
    """Return the page of a template in pages/; `title` and `verdict` (plain text) are those of base.html.

    A template gets bytes as text by the filter base64.
    """
    loader = jinja2.PackageLoader("olora_ray.common", "pages")
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return pages.get_template(template).render(values)
