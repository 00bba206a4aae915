"""Section of a config for comparisons of methods: what is fixed before the first of them is trained."""

from typing import Annotated

from pydantic import Field

from olora_ray.config.section import Section

Rows = Annotated[int, Field(ge=2)]
Rate = Annotated[float, Field(gt=0.0)]


class Compare(Section):
    """Comparison of methods by pipelines/compare.py; all of it is fixed before anything is measured."""

    tuning_rows: Rows = 192
    """Rows on which the learning rate of each method is chosen; never trained on, and none of the test rows."""
    test_rows: Rows = 192
    """Rows on which the methods are compared, each at its own learning rate and with other seeds."""
    relevant: Annotated[float, Field(gt=0.0)] = 0.01
    """Smallest difference of the held-out loss that matters, in nats per supervised token."""
    centres: dict[str, Rate] = {}  # noqa: RUF012 - pydantic copies it
    """Method -> learning rate at which its grid starts, e.g. {olora: 1.0e-4}; for those that are not named 2e-4
    (olora, pissa, pissa_fast, milora) or 1.6e-3."""
    untuned: bool = True
    """Also train each method at train.lr as it is, to show what an untuned comparison would have said."""
