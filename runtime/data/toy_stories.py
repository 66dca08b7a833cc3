"""Small English children's stories from a grammar: training text that needs no network or licence.

`story(index)` is a pure function. It draws a cast (who, where, with what), then every choice of the
grammar, from one generator seeded with `index`. The grammar is in toy_stories.txt, which explains
its own format. It is read when a story is first asked for.

The cast is drawn by 1 / rank: some names are common and most are rare, as in real text. Where all
names are equally rare, a small model learns late to copy a name that the story has used before
(Chan et al. 2022, "Data Distributional Properties Drive Emergent In-Context Learning in
Transformers"). benchmarks/names.py measures whether it does.
"""

from __future__ import annotations

import functools
import graphlib
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

GRAMMAR = Path(__file__).with_name("toy_stories.txt")

# The tables from which the cast is made, each with the columns it must have. Of every other table
# a story draws one row.
CAST_TABLES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("girl", "boy", "she", "he", "trait", "color", "where", "hair"), ()),
    **dict.fromkeys(("house", "cozy"), ()),
    "animal": ("den", "look"),
    "light": ("use",),
    "toy": ("use",),
    "place": ("prep", "sights", "spots"),
}

# A compiled text. A choice lists its alternatives.
Text: TypeAlias = "str | tuple[str | Choice, ...]"
Choice: TypeAlias = "list[Text]"
Random: TypeAlias = Callable[[], float]
T = TypeVar("T")


class Phrase(str):
    """Words with further forms, which are its attributes: {gift.a} is `gift.a`.

    Every phrase has itself with an article (`a`, capitalised `A`) and its last word (`last`). A row
    of a table is its first column. It has every column by name (`ing`, capitalised `Ing`).
    """

    a: str
    A: str
    last: str

    def __new__(cls, text: str, **forms: str) -> Phrase:
        self = super().__new__(cls, text)
        self.a = ("an " if text[0] in "aeiou" else "a ") + text
        self.A = "A" + self.a[1:]
        self.last = text.split()[-1]
        vars(self).update(forms)
        return self

    def __getattr__(self, name: str) -> str:
        """Raise AttributeError. Only names that are no form come here: Python finds the others."""
        raise AttributeError(f"{str(self)!r} has no form {name!r}")


@dataclass(frozen=True)
class Line:
    """An entry of the grammar file, continuation lines included, and where it stands."""

    where: str
    text: str

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.where}: {problem}")


@dataclass(frozen=True)
class Block:
    """A table, a rule or a plot as it stands in the grammar file."""

    heading: Line
    kind: str
    name: str
    lines: list[Line] = field(default_factory=list)


@dataclass(frozen=True)
class Plot:
    """A kind of story: the table of its toys, and its alternatives as written and as compiled."""

    name: str
    toys: list[Phrase]
    lines: list[str]
    alternatives: Choice


@dataclass(frozen=True)
class Grammar:
    """The tables, those of which a story draws just a row, the rules, the plots, descriptions."""

    tables: dict[str, list[Phrase]]
    things: dict[str, list[Phrase]]
    rules: dict[str, Choice]
    plots: list[Plot]
    descriptions: list[Phrase]


# ------------------------------------------------------------------------------ reading the grammar


@functools.cache
def grammar() -> Grammar:
    """Return the grammar of toy_stories.txt."""
    return read_grammar(GRAMMAR)


def read_grammar(path: Path) -> Grammar:
    """Read a grammar file. Raise ValueError, with file and line, if it is malformed."""
    blocks = _read_blocks(path)
    tables: dict[str, list[Phrase]] = {}
    for block in blocks["table"]:
        name, _, columns = block.name.partition(": ")
        tables[name] = _read_rows(block, name, columns.split("; ") if columns else ["name"])
    if missing := [name for name in CAST_TABLES if name not in tables]:
        raise ValueError(f"{path}: there is no table {missing[0]}, which every story needs")
    if not blocks["plot"]:
        raise ValueError(f"{path}: there is no plot")
    for name in CAST_TABLES:
        tables[name] = _by_rank(tables[name])
    # Toys that fly (into trees) are a table of their own.
    tables["toy"] += tables["light"]

    # A text refers to the rules it names, so that they can be filled in any order.
    rules: dict[str, Choice] = {block.name: [] for block in blocks["rule"]}
    for block in blocks["rule"]:
        rules[block.name] += [_compile_line(line, rules) for line in block.lines]
    _check_circles(blocks["rule"])
    plots = [_read_plot(block, tables, rules) for block in blocks["plot"]]
    kinds = ("little", "young", "small", "{}", "{} little", "{} young")
    described = [Phrase(kind.format(trait)) for trait in tables["trait"] for kind in kinds]
    things = {name: rows for name, rows in tables.items() if name not in CAST_TABLES}
    read = Grammar(tables, things, rules, plots, described)
    cast = _cast(random.Random(0).random, read, tables["toy"])
    for block in blocks["rule"] + blocks["plot"]:
        _check_fields(block, cast)
    return read


def _read_blocks(path: Path) -> dict[str, list[Block]]:
    """Return the blocks of each kind, in the order of the file."""
    blocks: dict[str, list[Block]] = {"table": [], "rule": [], "plot": []}
    block = None
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        line = Line(f"{path}, line {number}", text.strip())
        if not line.text or line.text.startswith("#"):
            continue
        indent = text[: text.index(line.text)]
        if not indent:
            block = _read_heading(line, blocks)
        elif block is None:
            raise line.error("there is no table, rule or plot above this line")
        elif indent == "  ":
            block.lines.append(line)
        elif indent == " " * 6 and block.lines:
            block.lines[-1] = replace(block.lines[-1], text=f"{block.lines[-1].text} {line.text}")
        else:
            raise line.error("put two spaces before an entry, and six before what continues it")
    for block in sum(blocks.values(), []):
        if not block.lines:
            raise block.heading.error(f"there is nothing in this {block.kind}")
    return blocks


def _read_heading(line: Line, blocks: dict[str, list[Block]]) -> Block:
    """Return the new block that a heading begins, and add it to the others."""
    kind, _, name = line.text.partition(" ")
    if kind not in blocks or not name:
        raise line.error('a block begins with "table NAME", "rule NAME" or "plot NAME"')
    for other in blocks[kind]:
        if other.name.partition(":")[0] == name.partition(":")[0]:
            raise line.error(f"there is such a {kind} already: {other.heading.where}")
    blocks[kind].append(Block(line, kind, name))
    return blocks[kind][-1]


def _read_rows(block: Block, name: str, columns: list[str]) -> list[Phrase]:
    """Return the rows of a table."""
    for column in CAST_TABLES.get(name, ()):
        if column not in columns:
            raise block.heading.error(f"table {name} needs a column {column}")
    rows = []
    for line in block.lines:
        for row in line.text.split("|"):
            values = [value.strip() for value in row.split(";")]
            if len(values) != len(columns) or not all(values):
                raise line.error(f"a row here is {'; '.join(columns)!r}, not {row.strip()!r}")
            forms = dict(zip(columns, values, strict=True))
            capitals = {key.capitalize(): _capitalised(value) for key, value in forms.items()}
            rows.append(Phrase(values[0], **forms, **capitals))
            if name == "place" and rows[-1].spots.count(",") < 2:
                raise line.error("a place needs at least three spots, separated by commas")
    return rows


def _by_rank(rows: list[Phrase]) -> list[Phrase]:
    """Return the rows repeated, so that one of them at random is row k in proportion to 1 / k.

    The last row occurs four times; rounding then changes no share by more than an eighth.
    """
    return [row for k, row in enumerate(rows, 1) for _ in range(round(4 * len(rows) / k))]


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _read_plot(block: Block, tables: dict[str, list[Phrase]], rules: dict[str, Choice]) -> Plot:
    """Return a plot. Its name may end in the table of its toys: "stuck in a tree [light]"."""
    name, _, toys = block.name.removesuffix("]").partition(" [")
    if (toys or "toy") not in ("toy", "light"):
        raise block.heading.error(f"toys are in the tables toy and light, not in {toys}")
    compiled = [_compile_line(line, rules) for line in block.lines]
    return Plot(name, tables[toys or "toy"], [line.text for line in block.lines], compiled)


_TOKEN = re.compile(r"[()|]|<[^>]*>?|[^()|<]+")


def _compile_line(line: Line, rules: dict[str, Choice]) -> Text:
    try:
        return _compile(line.text, rules)
    except ValueError as error:
        raise line.error(str(error)) from None


def _compile(text: str, rules: dict[str, Choice]) -> Text:
    """Return the text as a tree. Raise ValueError if a bracket is alone or a rule is unknown."""
    # For each open bracket, outermost first: its alternatives so far, each a list of pieces.
    open_choices: list[list[list[str | Choice]]] = [[[]]]
    for token in _TOKEN.findall(text):
        if token == "(":
            open_choices.append([[]])
        elif token in "|)" and len(open_choices) == 1:
            raise ValueError(f"there is a {token!r} outside of brackets")
        elif token == "|":
            open_choices[-1].append([])
        elif token == ")":
            alternatives = open_choices.pop()
            open_choices[-1][-1].append([_join(pieces) for pieces in alternatives])
        elif token[0] == "<":
            if token[1:-1] not in rules:
                raise ValueError(f"there is no rule {token}")
            open_choices[-1][-1].append(rules[token[1:-1]])
        elif ">" in token:
            raise ValueError('there is a ">" without a "<"')
        else:
            open_choices[-1][-1].append(token.replace(" / ", "\n"))
    if len(open_choices) > 1:
        raise ValueError('there is a "(" that nothing closes')
    return _join(open_choices[0][0])


def _join(pieces: list[str | Choice]) -> Text:
    """Return the pieces as one text: a plain string if nothing in them is to be chosen."""
    strings = [piece for piece in pieces if isinstance(piece, str)]
    return "".join(strings) if len(strings) == len(pieces) else tuple(pieces)


def _check_circles(rules: list[Block]) -> None:
    """Raise ValueError if a rule leads to itself: its text would have no end."""
    uses = {
        rule.name: [name for line in rule.lines for name in re.findall("<([^>]+)>", line.text)]
        for rule in rules
    }
    try:
        graphlib.TopologicalSorter(uses).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
        heading = next(rule.heading for rule in rules if rule.name == circle[0])
        raise heading.error(f"this rule leads to itself: {' <- '.join(circle)}") from None


def _check_fields(block: Block, cast: dict[str, str]) -> None:
    """Raise ValueError if a text has a field that casts do not have."""
    for line in block.lines:
        if block.kind == "rule" and " / " in line.text:
            raise line.error('only a plot has paragraphs, with " / " between them')
        if set("{}") & set(re.sub(r"\{\w+(\.\w+)?\}", "", line.text)):
            raise line.error("a field is {NAME} or {NAME.FORM}")
        for name in re.findall(r"\{[^}]*\}", line.text):
            try:
                name.format_map(cast)
            except (KeyError, AttributeError):
                raise line.error(f"there is no field {name}") from None


# ---------------------------------------------------------------------------------- writing a story

_SHE = {"he": "she", "He": "She", "him": "her", "his": "her", "His": "Her"}
_HE = {"he": "he", "He": "He", "him": "him", "his": "his", "His": "His"}


def _pick(random: Random, options: Sequence[T]) -> T:
    return options[int(random() * len(options))]


def _character(random: Random, grammar: Grammar, is_child: bool) -> Phrase:
    """Return a name with all that is said of its owner: pronouns, looks, home, introduction."""
    tables = grammar.tables
    is_girl = _pick(random, (True, False))
    described = _pick(random, grammar.descriptions)
    cozy = _pick(random, tables["cozy"])
    where = _pick(random, tables["where"])
    if is_child:
        kind: str = "girl" if is_girl else "boy"
        name = full = _pick(random, tables[kind])
        look: str = _pick(random, tables["hair"])
        den: str = _pick(random, tables["house"])
        hand = "hand"
    else:
        name = _pick(random, tables["she" if is_girl else "he"])
        animal = _pick(random, tables["animal"])
        kind, look, den, hand = animal, animal.look, animal.den, "paw"
        full = Phrase(f"{name} the {animal}")
    return Phrase(
        name,
        **(_SHE if is_girl else _HE),
        kind=kind,
        look=look,
        hand=hand,
        hands=hand + "s",
        full=full,
        s=name + "'s",
        a=f"{described.a} {kind}",
        A=f"{described.A} {kind}",
        home=f"{cozy.a} {den} {where}",
        intro=f"{described.a} {kind} named {name}",
        Intro=f"{described.A} {kind} named {name}",
    )


def _cast(random: Random, grammar: Grammar, toys: list[Phrase]) -> dict[str, str]:
    """Return the fields of one story: characters, toy, place, and a row of each table."""
    tables = grammar.tables
    cast: dict[str, str] = {name: _pick(random, rows) for name, rows in grammar.things.items()}
    is_child = _pick(random, (True, True, True, False, False))
    cast["A"] = cast["B"] = _character(random, grammar, is_child)
    while cast["B"] == cast["A"]:
        is_like_hero = _pick(random, (True, True, True, False))
        cast["B"] = _character(random, grammar, is_child == is_like_hero)
    toy = _pick(random, toys)
    place = _pick(random, tables["place"])
    spots = place.spots.split(", ")
    first = int(random() * len(spots))
    cast["O"] = Phrase(f"{_pick(random, tables['color'])} {toy}", noun=toy, use=toy.use)
    cast["place"], cast["at"] = place, f"{place.prep} {place}"
    cast["sight"] = _pick(random, place.sights.split(", "))
    cast["spot"], cast["spot2"], cast["spot3"] = spots[first], spots[first - 1], spots[first - 2]
    return cast


def _write(pieces: tuple[str | Choice, ...], random: Random, out: list[str]) -> None:
    """Append the pieces to `out`, each choice made by `random`."""
    for piece in pieces:
        if isinstance(piece, str):
            out.append(piece)
            continue
        text = piece[int(random() * len(piece))]
        if isinstance(text, str):
            out.append(text)
        else:
            _write(text, random, out)


def _draft(index: int) -> tuple[str, dict[str, str]]:
    """Return story `index` with its fields still open, and its cast."""
    if index < 0:
        raise ValueError(f"a story's index must be 0 or more, not {index}")
    # Of the generator's methods, the one whose sequence Python promises to keep.
    draw, read = random.Random(index).random, grammar()
    plot = _pick(draw, read.plots)
    cast = _cast(draw, read, plot.toys)
    out: list[str] = []
    _write((plot.alternatives,), draw, out)
    return "".join(out), cast


def story(index: int) -> str:
    """Return story number `index` (0 or more). It depends on nothing but `index`.

    A story has about 100 to 220 words in three to five lines, one per paragraph.
    """
    text, cast = _draft(index)
    return text.format_map(cast)


# --------------------------------------------------------------------------- how many stories exist


def _beginning(text: Text) -> str:
    """Return what every text written from this begins with."""
    first = text if isinstance(text, str) else text[0]
    return first if isinstance(first, str) else ""


def _fewest(text: Text | Choice, cast: Mapping[str, str]) -> int:
    """Return a number of distinct texts that this has at least, with the cast fixed.

    In a sequence, sets of m and n strings concatenate to m + n - 1 or more: order strings by
    length, then by alphabet, and a greater first or second part makes a greater whole. In a choice,
    alternatives have no text in common if neither's beginning begins the other's. The numbers of
    such alternatives add up.
    """
    if isinstance(text, str):
        return 1
    if isinstance(text, tuple):
        return 1 + sum(_fewest(piece, cast) - 1 for piece in text)
    options = [(_fewest(option, cast), _beginning(option).format_map(cast)) for option in text]
    total, kept = 0, list[str]()
    for number, beginning in sorted(options, reverse=True):
        if not any(beginning.startswith(other) or other.startswith(beginning) for other in kept):
            kept.append(beginning)
            total += number
    return total


@functools.cache
def num_distinct() -> int:
    """Return a number of distinct stories that the grammar has at least.

    They are those of its richest plot with one single cast. A paragraph is a line, so the
    paragraphs of a story can be told apart and their numbers multiply.
    """
    _, cast = _draft(0)
    rules = grammar().rules
    return max(
        math.prod(_fewest(_compile(paragraph, rules), cast) for paragraph in line.split(" / "))
        for plot in grammar().plots
        for line in plot.lines
    )


def __getattr__(name: str) -> int:
    """Return NUM_DISTINCT, which takes a moment to compute, when it is first asked for."""
    if name == "NUM_DISTINCT":
        return num_distinct()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
