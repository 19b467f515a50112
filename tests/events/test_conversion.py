"""Conversion of unique visitors."""

import math

import pytest

from sicot_jax.cli import main as cli
from sicot_jax.errors import InputError
from sicot_jax.events.conversion import VariantConversion, measure_conversion, relative_gain
from sicot_jax.events.store import Event, EventStore


def event(number, visitor, variant, kind, time):
    shown, sku = (("x",), "") if kind == "impression" else ((), "x")
    return Event(f"e{number}", f"r{number}", time, visitor, variant, kind, "", sku, shown)


def day():
    """Variant a: 4 visitors, 1 buys (twice); b: 3, of whom 2 buy; one sees both; one buys before he
    is shown anything.
    """
    listed = [
        ("1", "a", "impression", 1), ("1", "a", "impression", 2),
        ("1", "a", "purchase", 3), ("1", "a", "purchase", 4),
        ("2", "a", "impression", 1), ("3", "a", "impression", 1), ("3", "a", "click", 2),
        ("4", "a", "purchase", 1), ("4", "a", "impression", 2),
        ("5", "b", "impression", 1), ("5", "b", "purchase", 1),
        ("6", "b", "impression", 1), ("6", "b", "purchase", 9),
        ("7", "b", "impression", 1),
        ("8", "a", "impression", 1), ("8", "b", "impression", 2), ("8", "b", "purchase", 3),
        ("9", "b", "purchase", 3),
    ]  # fmt: skip
    return [event(number, *fields) for number, fields in enumerate(listed)]


def test_a_day_by_hand():
    for events in (day(), day()[::-1]):
        result = measure_conversion(events)
        assert result.variants == [VariantConversion("a", 4, 1), VariantConversion("b", 3, 2)]
        assert result.mixed == 1
    assert measure_conversion(day(), kind="click").variants == [
        VariantConversion("a", 4, 1),
        VariantConversion("b", 3, 0),
    ]


def test_intervals_by_hand():
    """Wilson's of 10 of 100: 5.52 to 17.44 %; Katz's of 60 of 1000 against 50 of 1000: 0.8333 to
    1.7279.
    """
    assert VariantConversion("a", 100, 10).interval() == pytest.approx((0.05523, 0.17437), abs=1e-5)
    assert VariantConversion("a", 5, 0).interval()[0] == 0
    assert VariantConversion("a", 5, 5).interval()[1] == 1
    gain, low, high = relative_gain(
        VariantConversion("b", 1000, 60), VariantConversion("a", 1000, 50)
    )
    error = math.sqrt(0.94 / 60 + 0.95 / 50)
    assert gain == pytest.approx(0.2)
    assert (low, high) == pytest.approx(
        (1.2 * math.exp(-1.95996 * error) - 1, 1.2 * math.exp(1.95996 * error) - 1), rel=1e-4
    )
    assert relative_gain(VariantConversion("b", 10, 0), VariantConversion("a", 10, 5)) is None


def test_the_command(tmp_path, capsys):
    store = EventStore(tmp_path / "events.sqlite")
    store.add(day())
    store.close()
    command = ["report", "conversion", "--events", str(tmp_path / "events.sqlite")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines()]
    rates = {row[1]: row[2:5] for row in rows if len(row) > 5}
    assert rates["a"][:2] == ["4", "1"]
    assert rates["a"][2].startswith("25.00 [")
    assert rates["b"][:2] == ["3", "2"]
    assert rates["b"][2].startswith("66.67 [")
    assert "~+166.7 [" in printed
    assert "seeing several variants: 1 visitor." in printed
    # Two machines, one event on both, an impression here and its purchase there: the same people.
    for name, part in {"one": day()[::2] + day()[1:2], "two": day()[1::2]}.items():
        store = EventStore(tmp_path / name)
        store.add(part)
        store.close()
    assert cli.main([*command[:3], str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert capsys.readouterr().out == printed
    assert cli.main([*command, "--kind", "click", "--control", "b"]) == 0
    assert "not measurable: no conversion" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--events", "nothing"], "no such file"),
        (["--events", "events.sqlite", "--kind", "look"], "--kind look, wanted click or purchase"),
        (
            ["--events", "events.sqlite", "--control", "z"],
            "--control z: no such variant, wanted one of a, b",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    store = EventStore(tmp_path / "events.sqlite")
    store.add(day())
    store.close()
    assert cli.main(["report", "conversion", *flags]) == cli.INPUT_ERROR
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    with pytest.raises(InputError, match="no impression among the events"):
        measure_conversion([])
