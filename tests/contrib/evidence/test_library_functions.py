from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from tests.contrib.evidence.conftest import make_wheel

Script = Callable[[str], ModuleType]

MODULE = '''
class Shop:
    def price(self, count):
        """Return the price of so many things,
        with what a box costs.

        No reader sees this.
        """
        # A comment stays.
        boxes = count // self.things_in_a_box + 1
        return count * self.price_of_one + boxes * self.price_of_a_box

def short():
    """Return nothing at all, in a body that is too short."""
    return None
'''
BODY = """# A comment stays.
boxes = count // self.things_in_a_box + 1
return count * self.price_of_one + boxes * self.price_of_a_box"""


def test_a_function_gives_a_row_of_each_kind(script: Script) -> None:
    (price,) = script("library_functions").functions(MODULE)
    question, answer = price.body_row()
    assert question.startswith(
        'def price(self, count):\n    """Return the price of so many things, with'
    )
    assert answer == BODY
    question, answer = price.docstring_row()
    assert question.startswith("def price(self, count):\n    # A comment stays.\n    boxes = count")
    assert answer == "Return the price of so many things, with what a box costs."


def test_a_task_has_each_function_once_and_none_of_another_task(
    script: Script, tmp_path: Path
) -> None:
    files = {f"shop/part{number}.py": MODULE.replace("self", f"s{number}") for number in range(200)}
    files |= {"shop/copy.py": files["shop/part7.py"], "shop/tests/part.py": MODULE}
    wheel = make_wheel(tmp_path / "shop.whl", files)
    rows = [
        part
        for bodies in (True, False)
        for part in script("library_functions").rows_of([wheel], bodies=bodies)
    ]
    assert all(rows)
    assert sum(map(len, rows)) == len({row for part in rows for row in part}) == 200
