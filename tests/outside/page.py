"""MLflow's page of a registered model, as a real browser paints it."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from tests import browser
from tests.outside.proxy import signed_in


def show(server: str, account: tuple[str, str], name: str, aliases: Mapping[str, str], picture: Path) -> None:
    """Paint the page into `picture` after looking at what is on it.

    Raises AssertionError if the name, a version or an alias is missing, or the picture is blank.
    """
    with signed_in(server, *account) as address:
        url = f"{address}/#/models/{name}"
        text = browser.dom(url, patience=30)
        missing = [word for word in (name, *aliases, *(f"Version {n}" for n in aliases.values())) if word not in text]
        assert not missing, f"MLflow's page of {name} does not show {', '.join(missing)}"
        assert account[1] not in text
        picture.parent.mkdir(parents=True, exist_ok=True)
        browser.screenshot(url, picture, patience=30)
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(1 << 20) or []
        assert len(colours) > 100, f"{picture} has {len(colours)} colours: nothing was painted"
