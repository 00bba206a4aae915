"""The optimizers: one file per optimizer, in the terms of optimizer.py. Their index is config/tables.py."""
