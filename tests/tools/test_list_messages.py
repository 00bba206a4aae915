"""The list of messages has each text of three words once, and no docstring but the help of settings."""

import pytest

from tools.list_messages import main, messages

SOURCE = '''"""A module of words."""
class A:
    """A class of words."""
    field: int = 1
    """The help of it."""
    def f(self, why: str = "two words") -> str:
        """Return a few words."""
        return f"{self.field}: it failed {why or f'for no known reason'}; try again\\n"
'''


def test_each_message_is_there_once_with_its_fields() -> None:
    text = "{self.field}: it failed {why or f'for no known reason'}; try again"
    assert list(messages(SOURCE)) == [(8, text)]
    assert [found for _, found in messages(SOURCE, with_help=True)] == ["A class of words.", "The help of it.", text]


def test_the_modules_of_a_folder_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["olora_ray/config"])
    assert "expected section.field=value" in capsys.readouterr().out
