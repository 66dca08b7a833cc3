"""Numbers and text as people are shown them."""

from __future__ import annotations

import random
import unicodedata

import pytest

from runtime.base.text import (
    UntilText,
    human_bytes,
    human_count,
    human_seconds,
    parse_bytes,
    visible,
)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (1, "1"),
        (7.25, "7.25"),
        (950, "950"),
        (950.0, "950"),
        (999, "999"),
        (999.4, "999"),
        (999.5, "1 k"),
        (999.6, "1 k"),
        (1000, "1 k"),
        (1234, "1.23 k"),
        (12_345, "12.3 k"),
        (999_499, "999 k"),
        (999_500, "1 M"),
        (1_611_000_000, "1.61 B"),
        (2_053_515_955, "2.05 B"),
        (3_664_132_435, "3.66 B"),
        (999_500_000_000, "1 T"),
        (3.26e12, "3.26 T"),
        (999e12, "999 T"),
        (1e15, "1000 T"),
        (1.5e18, "1500000 T"),
        (0.5, "0.5"),
        (0.001, "0.001"),
    ],
)
def test_human_count(number, shown):
    assert human_count(number) == shown


@pytest.mark.parametrize(
    ("number", "shown"), [(1e-4, "0.0001"), (6e-5, "0.0001"), (1e-5, "0"), (1e-300, "0")]
)
def test_human_count_of_next_to_nothing_has_no_exponent(number, shown):
    """Below 0.0001 the format `g` switched to 1e-05, which is hard to read as tokens per second."""
    assert human_count(number) == shown


def test_counts_never_have_an_exponent_and_are_within_half_a_percent():
    r = random.Random(0)
    for _ in range(20_000):
        number = 10 ** r.uniform(-6, 20)
        text = human_count(number)
        assert "e" not in text.lower(), (number, text)
        value, _, unit = text.partition(" ")
        value = float(value) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[unit]
        assert abs(value - number) <= 0.0051 * number + 5.1e-5, (number, text)
        assert float(text.split()[0]) < 1000 or unit == "T", (number, text)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (24_576, "24.0 KiB"),
        (1024**2, "1.0 MiB"),
        (3.1 * 1024**2, "3.1 MiB"),
        (58.6 * 1024**3, "58.6 GiB"),
        (1024**4, "1.0 TiB"),
        (1e18, "909494.7 TiB"),
    ],
)
def test_human_bytes(number, shown):
    assert human_bytes(number) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (1023.4, "1023 B"),
        (1023.6, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1023.9 * 1024, "1023.9 KiB"),
        (1024**3 - 1, "1.0 GiB"),
        (1024**4 - 1, "1.0 TiB"),
    ],
)
def test_human_bytes_takes_the_next_unit_when_rounding_reaches_it(number, shown):
    """One byte below a GiB was "1024.0 MiB"."""
    assert human_bytes(number) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (42, "42 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (60, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (86_399.6, "1 d 0 h"),
        (4 * 86_400 + 3 * 3600, "4 d 3 h"),
        (1e9, "11574 d 1 h"),
    ],
)
def test_human_seconds(seconds, shown):
    assert human_seconds(seconds) == shown


def test_visible_spells_out_whatever_moves_a_terminal():
    """S1: the original implementation printed a model's ESC bytes raw.

    With them a text can change the title, the colours and the clipboard.
    """
    assert visible("plain é 漢字 😀\n\ttab") == "plain é 漢字 😀\n\ttab"
    assert visible("\x1b]52;c;aGk=\x07") == "\\x1b]52;c;aGk=\\x07"
    assert visible("a\rb\x00\x7f\x9b31m") == "a\\rb\\x00\\x7f\\x9b31m"
    assert visible("\u202eevil\u202c \u2066x\u2069") == "\\u202eevil\\u202c \\u2066x\\u2069"
    everything = "".join(map(chr, range(0x3000)))
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in visible(everything))
    assert visible(visible(everything)) == visible(everything)


@pytest.mark.parametrize(
    "stops, pieces, shown, held, stopped",
    [
        ((), ["ab", "c"], ["ab", "c"], "", False),
        (("X",), ["ab", "cXd"], ["ab", "c"], "", True),
        (("abc",), ["xa", "b", "d"], ["x", "", "abd"], "", False),
        (("abc",), ["xa", "b", "cd"], ["x", "", ""], "", True),
        (("abc", "b"), ["xab"], ["xa"], "", True),
        (("\n\n",), ["a\n", "b\n", "\nc"], ["a", "\nb", ""], "", True),
        (("aab",), ["aa", "a", "b"], ["", "a", ""], "", True),
        (("abc",), ["ab"], [""], "ab", False),
        (("",), ["ab"], ["ab"], "", False),
    ],
)
def test_text_is_cut_at_the_first_stop_however_it_comes(stops, pieces, shown, held, stopped):
    """What may become a stop is held back, and given when it does not."""
    until = UntilText(stops)
    results = [until.push(piece) for piece in pieces]
    assert (
        [text for text, _ in results] == shown
        and until.held == held
        and [s for _, s in results] == [False] * (len(pieces) - 1) + [stopped]
    )


def test_the_longest_beginning_of_a_stop_is_held_back():
    """Against the definition: every length of every stop, compared with the text's end."""
    r = random.Random(0)
    for _ in range(2_000):
        stops = tuple(
            "".join(r.choices("ab", k=r.randrange(1, 7))) for _ in range(r.randrange(1, 4))
        )
        until, text = UntilText(stops), ""
        for _ in range(6):
            piece = "".join(r.choices("abc", k=r.randrange(4)))
            text = until.held + piece
            shown, stopped = until.push(piece)
            if stopped:
                break
            ends = [n for s in stops for n in range(len(s)) if text.endswith(s[:n])]
            assert until.held == text[len(text) - max(ends) :]
            assert shown + until.held == text


def test_long_stops_cost_no_work_for_each_of_their_characters():
    """64 stops of 500 characters cost 24 ms a token on the engine's thread, for every client."""

    class Counted(str):
        reads = 0

        def __getitem__(self, which):
            Counted.reads += 1
            return str.__getitem__(self, which)

        def startswith(self, *what):
            Counted.reads += 1
            return str.startswith(self, *what)

    until = UntilText((Counted("x" * 499 + "y"),))
    for _ in range(100):
        assert until.push("abx")[0].endswith("ab")
    # Of 3 or 4 characters a time: fewer than 10 looks, and not one for each of the stop's 500.
    assert Counted.reads < 1_000


@pytest.mark.parametrize(
    "text, size",
    [
        ("5GB", 5 * 10**9),
        ("500MB", 500 * 10**6),
        ("1GiB", 2**30),
        ("500 MiB", 500 * 2**20),
        ("1.5KiB", 1536),
        ("0.1TB", 10**11),
        ("2TiB", 2**41),
        (" 1KB", 1000),
        # As a float this is 1 less.
        ("4.35KB", 4350),
        ("999999999999999.9KB", 999_999_999_999_999_900),
    ],
)
def test_sizes_are_decimal_or_binary(text, size):
    assert parse_bytes(text, "--size") == size


@pytest.mark.parametrize(
    "text",
    [
        "5",
        "GB",
        "-1GB",
        "5gb",
        "5Gb",
        "0GB",
        "0.0001KB",
        "1e3MB",
        "5 0GB",
        "5GBB",
        "nanGB",
        "\N{ARABIC-INDIC DIGIT FIVE}GB",
        "",
        "9" * 400 + "GB",
    ],
)
def test_other_sizes_are_refused_in_a_line(text):
    """A lower-case b is a bit to some programs. Hundreds of nines gave an OverflowError."""
    with pytest.raises(ValueError) as caught:
        parse_bytes(text, "--size")
    assert str(caught.value).startswith("--size must be a number with KB, MB, GB or TB")
    assert "\n" not in str(caught.value) and "such as 500MB or 1GiB" in str(caught.value)
