"""The objectives: one file per objective, in the terms of objective.py. Their index is config/tables.py."""
