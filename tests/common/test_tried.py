import pytest

from olora_ray.common.tried import is_older, tell
from tests.said import said


@pytest.mark.parametrize(
    ("program", "version", "line"),
    [
        ("Ray", "2.57.1", "Ray 2.57.1: 2.58 to 2.60 were tried"),
        ("Ray", "2.58.0", ""),
        ("Ray", "2.60.3+cpu", ""),
        ("Ray", "2.61.0rc1", "Ray 2.61.0rc1: 2.58 to 2.60 were tried"),
        ("SGLang", "0.5.11", "SGLang 0.5.11: 0.5.10 was tried"),
    ],
)
def test_a_version_that_was_not_tried_is_named(program: str, version: str, line: str) -> None:
    with said() as lines:
        tell(program, version)
        tell(program, version)
    assert "".join(lines).count(program) == bool(line)
    assert line in "".join(lines)


def test_a_build_from_source_counts_as_new() -> None:
    assert is_older("0.28.1+cpu", "0.29")
    assert not is_older("0.1.dev1+g1234567", "0.29")
