"""Exceptions in one line."""

from olora_ray.common.errors import first_line, short_reason


def test_the_first_line_says_what_it_was() -> None:
    assert first_line(ValueError("\n no such tensor\nmore of it")) == "no such tensor"
    assert first_line(EOFError()) == "EOFError"


def test_of_the_operating_system_its_words_only() -> None:
    assert short_reason(FileNotFoundError(2, "No such file or directory", "/a")) == "No such file or directory"
    assert short_reason(OSError("cut off\nhere")) == "cut off"
    assert short_reason(KeyError("a")) == "'a'"
