"""A module that cannot be imported."""

LEVEL = 1 / 0
