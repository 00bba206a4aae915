"""A stdout that takes itself for a terminal; COLUMNS is its width."""

import io


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
