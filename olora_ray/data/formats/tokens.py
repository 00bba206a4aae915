"""Format tokens: rows that another tool has tokenised; they are used as they are."""

import itertools

from olora_ray.data.formats.format import Example, Field, Format, Ids, Rejected, Row

IDS = Field("input_ids", needed=True)
OTHERS = (
    Field("labels"),
    Field("attention_mask"),
    Field("completion_mask", asked=True),
    Field("assistant_masks", asked=True),
    Field("position_ids", asked=True),
)


def read(row: Row) -> Example:
    ids = row.value("input_ids")
    lists = {"input_ids": ids, **{field.name: row.optional(field.name) for field in OTHERS}}
    for name, numbers in lists.items():
        whole = isinstance(numbers, list) and all(
            type(each) in (int, bool) and abs(each) < 2**31 for each in numbers
        )
        if numbers is not None and not whole:
            raise Rejected(
                "wrong_type", f"field {row.column(name)!r} is not a list of whole numbers"
            )
    labels = lists["labels"]
    mask = lists["attention_mask"]
    for marks in (lists["completion_mask"], lists["assistant_masks"]):  # TRL's: 1 is supervised
        if not marks:
            continue
        if len(marks) != len(ids):
            raise Rejected(
                "wrong_length", f"a mask with {len(marks)} numbers for {len(ids)} input_ids"
            )
        labels = [
            label if mark else -100 for label, mark in zip(labels or ids, marks, strict=False)
        ]
    positions = list(itertools.compress(lists["position_ids"] or (), mask or itertools.repeat(1)))
    if any(later <= earlier for earlier, later in itertools.pairwise(positions)):
        raise Rejected(
            "wrong_type",
            f"field {row.column('position_ids')!r} starts again: the row holds several rows",
        )
    return Ids(ids, labels, mask)


FORMAT = Format("tokens", read, makes="ids", fields=(IDS, *OTHERS))
