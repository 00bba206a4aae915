import ast
import importlib.util
from pathlib import Path

from tools.mutants import Mutant, Mutated, mutants_of, mutated

SOURCE = """
LIMIT = 3

class Door:
    def opens(self, age: int = 1) -> bool:
        if age < LIMIT:
            raise ValueError
        return True

def later():
    def inner():
        return 1
    return inner
"""


def test_a_mutant_has_a_name_of_its_own_and_changes_one_place(tmp_path: Path) -> None:
    mutants = [mutant for mutant, _ in mutants_of("m", ast.parse(SOURCE))]
    assert [mutant[1:] for mutant in mutants] == [
        ("", "moved", 0),
        ("Door.opens", "moved", 0),
        ("Door.opens", "forced", 0),
        ("Door.opens", "forced", 1),
        ("Door.opens", "dropped", 0),
        ("Door.opens", "turned", 0),
        ("Door.opens", "moved", 1),
        ("later.<locals>.inner", "moved", 0),
    ]
    plain = ast.unparse(ast.parse(SOURCE)).splitlines()
    for mutant in mutants:
        changed = ast.unparse(mutated(mutant, SOURCE)).splitlines()  # type: ignore[arg-type]
        assert sum(a != b for a, b in zip(plain, changed, strict=True)) == 1
    assert mutated(Mutant("m", "Door.opens", "turned", 1), SOURCE) is None


def test_a_changed_module_is_imported_in_place_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(SOURCE)
    tree = mutated(Mutant("m", "", "moved", 0), SOURCE)
    assert tree is not None
    spec = Mutated("m", file, tree).find_spec("m")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.LIMIT == 4
