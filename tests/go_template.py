"""Templates of Ollama, which are written in Go's language."""

import re


def as_go_does(template: str, chat: list[tuple[str, str]]) -> str:
    """Execute a template of Ollama that has the one loop over the messages, and comparisons in it."""
    found = re.fullmatch(
        r"\{\{- range \$i, \$m := \.Messages \}\}(.*)\{\{ end \}\}((?:(?!\{\{).)*)",
        template,
        re.DOTALL,
    )
    assert found
    text = ""
    for number, (role, content) in enumerate(chat):
        shown = [True]
        for part in re.split(r"(\{\{.*?\}\})", found[1]):
            if asked := re.fullmatch(r'\{\{ if eq \$m\.Role "(\w+)" \}\}', part):
                shown.append(shown[-1] and asked[1] == role)
            elif part == "{{ if eq $i 0 }}":
                shown.append(shown[-1] and number == 0)
            elif part == "{{ end }}":
                shown.pop()
            elif shown[-1]:
                text += content if part == "{{ $m.Content }}" else part
        assert shown == [True]
    return text + found[2]
