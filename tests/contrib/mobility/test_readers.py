"""Records become stays, and every record counts; an error names the record's line."""

import csv
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from readers import read
from stays import Records, Repairs, Stay, When, numbered

from olora_ray.common.errors import UserError

HEADER = "id,user_id,location_id,latitude,longitude,start_day,start_min,weekday\n"
GEOLIFE = "id,user_id,location_id,duration,start_day,end_day,start_min,end_min,weekday\n"
VENUE = "40\t{venue}\tc1\tCaf\xe9\t40.7\t-74.0\t{minutes}\t{time}\n"


def check_ins(folder: Path, text: str, *repairs: str) -> Records:
    file = folder / "a.csv"
    file.write_text(text)
    return read([str(file)], "checkins", Repairs(repairs))


def foursquare(folder: Path, text: str, *repairs: str) -> Records:
    file = folder / "a.txt"
    file.write_bytes(text.encode("latin-1"))
    return read([str(file)], "foursquare", Repairs(repairs))


def test_check_ins_of_both_kinds(tmp_path: Path) -> None:
    found = check_ins(
        tmp_path, HEADER + "0,10,7,40.7,-74.0,3,450,4\n1,9,8,,,0,0,6\n\n2,10,8,1,1,3,1439,4\n"
    )
    assert list(found.people) == ["9", "10"]
    assert found.people["10"] == [
        Stay(7, 3 * 1440 + 450, When(4, 450)),
        Stay(8, 3 * 1440 + 1439, When(4, 1439)),
    ]
    assert (found.people["10"][1].file, found.people["10"][1].line) == (str(tmp_path / "a.csv"), 5)
    assert not found.places
    assert check_ins(tmp_path, GEOLIFE + "0,1,2,30.6,0,0,60,91,5\n").people["1"] == [
        Stay(2, 60, When(5, 60), 31)
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("0,1,2,,,0,1440,0", ":2: start_min is 1440, not 0 to 1439"),
        ("0,1,2,,,0,7:30,0", ":2: start_min is '7:30', not a whole number"),
        ("0,1,2,,,-1,0,0", ":2: start_day is -1, not 0 to"),
        ("0,1,2,,,0,0,7", ":2: weekday is 7, not 0 to 6"),
        ("0,1,,,,0,0,0", ":2: location_id is '', not a whole number"),
        ("0,1,-1,,,0,0,0", ":2: location_id is -1, not 0 to "),
        ("0,1,2.5,,,0,0,0", ":2: location_id is '2.5', not a whole number"),
        ("0,,2,,,0,0,0", ":2: user_id is empty"),
        ("0,1,2,,,0,0", ":2: 7 cells, but the first line names more columns"),
    ],
)
def test_a_broken_check_in_names_its_line_and_can_be_left_out(
    tmp_path: Path, row: str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_ins(tmp_path, HEADER + row + "\n")
    assert str(caught.value).startswith(f"{tmp_path}/a.csv{expected}")
    assert "--repair broken" in str(caught.value)
    assert "\n" not in str(caught.value)
    repairs = Repairs(["broken"])
    (tmp_path / "a.csv").write_text(HEADER + row + "\n0,5,5,,,0,0,0\n")
    kept = read([str(tmp_path / "a.csv")], "checkins", repairs)
    assert list(kept.people) == ["5"]
    assert repairs.lines() == ["1 record broken: left out"]


def test_a_weekday_that_contradicts_the_day_is_broken(tmp_path: Path) -> None:
    """Each person has a day 0 of their own, over all files."""
    rows = "0,1,7,,,3,450,4\n1,9,8,,,0,0,6\n2,1,8,,,10,450,4\n3,1,8,,,11,450,4\n"
    with pytest.raises(
        UserError, match=r"a\.csv:5: weekday is 4, but by earlier records day 11 has 5"
    ):
        check_ins(tmp_path, HEADER + rows)
    assert len(check_ins(tmp_path, HEADER + rows, "broken").people["1"]) == 2


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a\.csv:1: no column 'user_id' in the first line; it has nothing"
    ):
        check_ins(tmp_path, "")
    with pytest.raises(UserError, match=r"a\.csv:1: no column 'weekday'"):
        check_ins(tmp_path, "user_id,location_id,start_day,start_min\n")
    with pytest.raises(UserError, match="no usable record"):
        check_ins(tmp_path, HEADER)
    (tmp_path / "a.csv").write_bytes(HEADER.encode() + b"0,1,2,\xff,,0,0,0\n")
    with pytest.raises(UserError, match=r"a\.csv:\d+: no csv in UTF-8"):
        read([str(tmp_path)], "checkins", Repairs())
    with pytest.raises(UserError, match="no such file or folder"):
        read([str(tmp_path / "no")], "checkins", Repairs())
    with pytest.raises(UserError, match=r"no file ends in \.plt"):
        read([str(tmp_path)], "geolife", Repairs())
    with pytest.raises(
        UserError,
        match="argument --format: 'gpx' is unknown; use one of checkins, foursquare, geolife",
    ):
        read([str(tmp_path)], "gpx", Repairs())
    with pytest.raises(
        UserError,
        match="argument --repair: 'all' is unknown; use one of broken, unsorted, duplicates",
    ):
        Repairs(["all"])


def test_unsorted_records_and_duplicates(tmp_path: Path) -> None:
    text = HEADER + "0,1,2,,,1,0,1\n1,1,3,,,0,0,0\n2,2,2,,,0,0,0\n3,1,2,,,1,0,1\n4,1,9,,,1,0,1\n"
    with pytest.raises(
        UserError,
        match=r"a\.csv:3: person 1: the time is earlier than in the record at .*a\.csv:2;",
    ):
        check_ins(tmp_path, text)
    with pytest.raises(
        UserError, match=r"a\.csv:5: person 1: the same time and place as the record at .*a\.csv:2;"
    ):
        check_ins(tmp_path, text, "unsorted")
    repairs = Repairs(["unsorted", "duplicates"])
    found = read([str(tmp_path / "a.csv")], "checkins", repairs)
    assert [stay.place for stay in found.people["1"]] == [3, 2, 9]
    assert repairs.lines() == ["1 record unsorted: sorted by time", "1 record duplicates: left out"]


def test_a_places_number_does_not_tell_when_it_was_seen_first(tmp_path: Path) -> None:
    """Otherwise a model could name new places by counting."""
    lines = [
        VENUE.format(
            venue=f"v{n:03d}",
            minutes=0,
            time=f"Tue Apr 03 {n // 60:02d}:{n % 60:02d}:00 +0000 2012",
        )
        for n in range(200)
    ]
    numbers = [stay.place for stay in foursquare(tmp_path, "".join(lines)).people["40"]]
    assert sorted(numbers) == list(range(1, 201))
    assert sum(after == before + 1 for before, after in pairwise(numbers)) < 10


def test_foursquare_has_local_times_and_numbers_for_venues(tmp_path: Path) -> None:
    first = VENUE.format(venue="b", minutes=-240, time="Tue Apr 03 18:00:09 +0000 2012")
    second = VENUE.format(venue="a", minutes=-240, time="Wed Apr 04 02:30:00 +0000 2012")
    third = VENUE.format(venue="b", minutes=600, time="Wed Apr 04 18:30:00 +0000 2012")
    found = foursquare(tmp_path, first + second + third)
    assert found.places == numbered(["a", "b"])
    stays = found.people["40"]
    assert [stay.place for stay in stays] == [found.places[name] for name in "bab"]
    assert [stay.when for stay in stays] == [
        When(1, 14 * 60),
        When(1, 22 * 60 + 30),
        When(3, 4 * 60 + 30),
    ]
    assert stays[1].at - stays[0].at == 510


def plt(folder: Path, user: str, name: str, points: list[tuple[float, float, datetime]]) -> None:
    lines = [f"{lat},{lon},0,492,39744.1,{t:%Y-%m-%d},{t:%H:%M:%S}" for lat, lon, t in points]
    file = folder / user / "Trajectory" / f"{name}.plt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "Geolife trajectory\nWGS 84\nAltitude is in Feet\nReserved 3\n0,2,255\n0\n"
        + "\n".join(lines)
    )


START = datetime(2008, 10, 23, 2, 53, 4, tzinfo=UTC)


def after(minutes: float) -> datetime:
    return START + timedelta(minutes=minutes)


def test_points_of_geolife_become_stays(tmp_path: Path) -> None:
    home, work = (39.9, 116.3), (39.95, 116.35)
    way = [(39.9 + i / 200, 116.3 + i / 200, after(30 + i)) for i in range(1, 10)]
    first = [(*home, after(minute)) for minute in (0, 10, 25, 30)]
    second = [(*work, after(100)), (39.9505, 116.3505, after(110)), (*work, after(119))]
    plt(tmp_path, "003", "a", first + way)
    plt(tmp_path, "003", "b", [*second, (*home, after(400)), (*home, after(430))])
    found = read([str(tmp_path)], "geolife", Repairs())
    stays = found.people["003"]
    assert [stay.duration for stay in stays] == [30, 30]  # 19 minutes at work are too short
    assert stays[0].place == stays[1].place == 1
    assert stays[0].when == When(3, 10 * 60 + 53)  # in Beijing
    assert (stays[0].line, stays[1].line) == (7, 10)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 99), st.integers(0, 20), st.integers(0, 1439)),
        min_size=1,
        max_size=30,
    )
)
def test_no_record_is_lost_and_every_order_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("records")
    found = []
    for number, order in enumerate((rows, sorted(rows, reverse=True))):
        file = folder / f"{number}.csv"
        with file.open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["user_id", "location_id", "start_day", "start_min", "weekday"])
            writer.writerows(
                (user, place, day, minute, day % 7) for user, place, day, minute in order
            )
        repairs = Repairs(["unsorted", "duplicates"])
        records = read([str(file)], "checkins", repairs)
        assert len(records) + repairs.counts["duplicates"] == len(rows)
        found.append(
            {user: {(s.at, s.place) for s in stays} for user, stays in records.people.items()}
        )
        for stays in records.people.values():
            assert [stay.at for stay in stays] == sorted(stay.at for stay in stays)
    assert found[0] == found[1]
    assert sum(map(len, found[0].values())) == len(set(rows))
