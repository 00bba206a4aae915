"""Unusual searches: failed, empty, or over rare types of values."""

from dataclasses import replace
from typing import Any

from olora_ray.sweep.record import SearchRecord, Status, TrialRecord

NAN = float("nan")
NASTY = "<script>alert('x')</script> & \"$a$ $b_$\""


def search(rows: list[tuple[dict[str, Any], float | None]], **changes: Any) -> SearchRecord:
    """Return a search of trials with these (params, value); a trial without a value has failed."""
    trials = tuple(_trial(number, params, value) for number, (params, value) in enumerate(rows))
    fields = tuple(dict.fromkeys(name for params, _ in rows for name in params))
    whole = SearchRecord(
        "odd", "eval/loss", "min", "random", "none", 60.0, trials, fields, default=None
    )
    return replace(whole, **changes)


def _trial(number: int, params: dict[str, Any], value: float | None) -> TrialRecord:
    status: Status = "failed" if value is None else "finished"
    curve = () if value is None else ((5, value + 0.1), (10, value))
    reason = "out of memory" if value is None else ""
    return TrialRecord(
        number, params, status, value, step=10, curve=curve, seconds=12.0, reason=reason
    )


RATES = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3]

ODD: dict[str, SearchRecord] = {
    "no trials": search([]),
    "all failed": search(
        [({"train.lr": rate, "adapter.rank": 8}, None) for rate in RATES], default=0
    ),
    "NaN and infinity": search(
        [
            ({"train.lr": rate}, value)
            for rate, value in zip(RATES, [NAN, 1.0, float("inf"), 1.1, 1.2, NAN], strict=True)
        ],
        default=0,
    ),
    "mixed types": search(
        [
            ({"adapter.targets": value, "train.x": other}, 1.0 + i / 7)
            for i, (value, other) in enumerate(
                [
                    ("all-linear", 1),
                    (("q_proj", "v_proj"), None),
                    ("q_proj", True),
                    ("q_proj", 0.5),
                    ("all", "x"),
                    ("b", 2),
                ]
            )
        ]
    ),
    "missing parameters": search(
        [
            ({"train.lr": rate} if i % 2 else {"adapter.rank": 8}, 1.0)
            for i, rate in enumerate(RATES)
        ]
    ),
    "one diverged": search(
        [({"train.lr": rate}, 1e9 if i == 5 else 1 + i / 50) for i, rate in enumerate(RATES)]
    ),
    "nasty text": search(
        [({"data.x": NASTY + str(i % 2), "run." + NASTY: i}, 1.0 + i) for i in range(6)],
        name=NASTY,
        metric=NASTY,
        notes=(NASTY,),
        searcher=NASTY,
    ),
    "many fields": search(
        [
            ({f"section.a_rather_long_field_{k}": (i * k) % 7 for k in range(1, 10)}, 1.0 + i / 7)
            for i in range(8)
        ]
    ),
}
