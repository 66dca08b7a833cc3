"""The toy stories: the same everywhere, all different, and as sound as a machine can check."""

from __future__ import annotations

import collections
import gzip
import hashlib
import math
import os
import random
import re
import subprocess
import sys

import pytest

from runtime.data import toy_stories
from runtime.data.toy_stories import (
    GRAMMAR,
    NUM_DISTINCT,
    Phrase,
    _compile,
    _draft,
    _fewest,
    grammar,
    read_grammar,
    story,
)
from tests.conftest import REPO

# Stories that are checked one by one.
SAMPLE = 10_000
FIELD = re.compile(r"\{([\w.]+)\}")
QUOTE = re.compile(r'"[^"]*"')
SPEECH = {
    "answered",
    "asked",
    "called",
    "cheered",
    "cried",
    "exclaimed",
    "gasped",
    "laughed",
    "mumbled",
    "promised",
    "replied",
    "said",
    "shouted",
    "sighed",
    "thought",
    "told",
    "whispered",
    "wondered",
}


@pytest.fixture(scope="module")
def drafts() -> list[tuple[str, dict[str, Phrase]]]:
    return [_draft(index) for index in range(SAMPLE)]


@pytest.fixture(scope="module")
def stories(drafts) -> list[str]:
    return [text.format_map(cast) for text, cast in drafts]


def failures(texts, pattern: str, allowed=()) -> list[tuple[int, str]]:
    """(index, match) of the first matches of a pattern that should not occur."""
    found = (
        (i, m.group())
        for i, text in enumerate(texts)
        for m in re.finditer(pattern, text)
        if m.group() not in allowed
    )
    return [hit for hit, _ in zip(found, range(5), strict=False)]


# ---- which story an index gives


def test_the_stories_are_those_of_earlier_versions():
    """A dataset of toy stories is named by its size alone: the same size is the same text."""
    digest = hashlib.sha256(b"".join(story(index).encode() + b"\0" for index in range(SAMPLE)))
    wanted = "3b3648ef4939c776422acc11c282223e48e92c9faed464aadcad413787b6e0eb"
    assert digest.hexdigest() == wanted
    assert NUM_DISTINCT == 49_609_950


def test_a_story_depends_on_its_index_only():
    code = (
        "import hashlib; from runtime.data.toy_stories import story; "
        "print(hashlib.sha256('|'.join(story(i) for i in range(1000)).encode()).hexdigest())"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPO,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    backwards = [story(index) for index in reversed(range(1000))][::-1]
    assert digests == [hashlib.sha256("|".join(backwards).encode()).hexdigest()] * 2


def test_large_indices_are_stories_too_and_negative_ones_are_refused():
    assert len({story(10**k) for k in range(30)}) == 30
    with pytest.raises(ValueError, match="0 or more, not -1"):
        story(-1)


@pytest.mark.nightly
@pytest.mark.slow
def test_100_000_stories_are_distinct_and_of_good_length():
    seen, words = set(), collections.Counter()
    for index in range(100_000):
        text = story(index)
        seen.add(hash(text))
        words[text.count(" ") + text.count("\n") + 1] += 1
    assert len(seen) >= 99_900
    assert min(words) >= 80
    assert max(words) <= 220
    assert 130 <= sum(n * count for n, count in words.items()) / 100_000 <= 170


def test_the_loss_has_somewhere_to_go(stories):
    """Real TinyStories: 8.3 bits per word, gzip to 0.31 of their size (2,000 stories)."""
    text = "\n\n".join(stories[:2000])
    words = collections.Counter(re.findall(r"[A-Za-z']+|[^\sA-Za-z']", text))
    entropy = -sum(n / words.total() * math.log2(n / words.total()) for n in words.values())
    assert entropy > 8.0
    assert len(gzip.compress(text.encode())) / len(text) > 0.24


# ---- how many there are


def expansions(text) -> set[str]:
    """All texts of a small compiled grammar, by brute force."""
    if type(text) is str:
        return {text}
    if type(text) is list:
        return set().union(*map(expansions, text))
    whole = {""}
    for piece in text:
        whole = {start + end for start in whole for end in expansions(piece)}
    return whole


@pytest.mark.parametrize(
    "text",
    [
        "(a|b|c)",
        "(a|ab|b)(c|bc)",
        "(a|)(a|)(a|)",
        "(same|same)",
        "x (big|small|) (cat|dog (here|there|))",
        "({A}|Ben|{A}ny)",
        "(<r>|apple|(b|c))<r>",
    ],
)
def test_the_number_of_texts_is_a_lower_bound(text):
    cast = {"A": Phrase("Ben")}
    compiled = _compile(text, {"r": ["a", "x", "y"]})
    count = len({expansion.format_map(cast) for expansion in expansions(compiled)})
    assert 1 <= _fewest(compiled, cast) <= count
    if text == "(a|b|c)":
        assert _fewest(compiled, cast) == count


def test_there_are_more_than_100_000_stories():
    assert NUM_DISTINCT > 100_000


# ---- the data


def entries(kind: str) -> dict[str, list[str]]:
    """{name: entries} of the grammar's rules or plots, as they are written."""
    blocks = toy_stories._read_blocks(GRAMMAR)[kind]
    return {block.name: [line.text for line in block.lines] for block in blocks}


def test_every_rule_table_and_column_is_used():
    rules, plots = entries("rule"), entries("plot")
    assert len(plots) >= 10
    lines = [line for block in (*rules.values(), *plots.values()) for line in block]
    assert {name for line in lines for name in re.findall(r"<([^>]+)>", line)} == set(rules)
    assert all(len(set(block)) >= 2 or "|" in block[0] for block in rules.values())
    fields = {field.split(".")[0] for line in lines for field in FIELD.findall(line)}
    made = {"A", "B", "O", "at", "place", "sight", "spot", "spot2", "spot3"}
    assert set(grammar().things) | made == fields


def test_every_alternative_gives_text():
    """Write each alternative of each rule with a cast, by several choices."""
    cast = _draft(0)[1]
    choices = [*grammar().rules.values(), *(plot.alternatives for plot in grammar().plots)]
    for alternatives in choices:
        for expansion in alternatives:
            for number in (0.0, 0.25, 0.5, 0.75, 0.999):
                out: list[str] = []
                toy_stories._write(([expansion],), lambda number=number: number, out)
                assert "".join(out).format_map(cast)


# Each breaks a sound grammar in one place: (what stands there, what comes there, the error).
MALFORMED = {
    "no kind": ("rule glad", "rules glad", r"line LINE: a block begins with"),
    "no name": ("rule glad", "rule", r"line LINE: a block begins with"),
    "two of a name": ("rule sad", "rule glad", r"line LINE: there is such a rule already: .*line"),
    "an empty block": ("rule glad", "rule mad\nrule glad", r"line LINE: there is nothing in this"),
    "three spaces": ("  (happy|", "   (happy|", r"line LINE: put two spaces before an entry"),
    "a tab": ("  (happy|", "\t(happy|", r"line LINE: put two spaces before an entry"),
    "nothing continues": ("  (happy|", "      (happy|", r"line LINE: put two spaces"),
    "open": ("  (happy|happy", "  (happy|(happy", r'line LINE: there is a "\(" that nothing'),
    "closed": ("  (happy|happy", "  (happy|happy)", r"line LINE: there is a '\|' outside"),
    "closed twice": ("pleased|cheerful)", "pleased|cheerful))", r"line LINE: there is a '\)'"),
    "no such rule": ("<brave> <toy> / <go.toy>", "<brav>", r"line LINE: there is no rule <brav>"),
    "an open name": ("<brave> <toy> / <go.toy>", "<brave", r"line LINE: there is no rule <brave"),
    "a lone >": ("  (happy|", "  (>happy|", r'line LINE: there is a ">" without'),
    "no such field": ("  (happy|", "  ({C}|", r"line LINE: there is no field {C}"),
    "no such form": ("  (happy|", "  ({A.old}|", r"line LINE: there is no field {A.old}"),
    "an open field": ("  (happy|", "  ({A|", r"line LINE: a field is {NAME}"),
    "a paragraph": ("  (happy|", "  a / (happy|", r"line LINE: only a plot has paragraphs"),
    "a circle": ("  (happy|", "  (<sad> <glad>|", r"line \d+: this rule leads to itself: glad <- "),
    "too few values": ("  mom; Mom", "  mom", r"line LINE: a row here is 'noun; call', not 'mom'"),
    "too many": ("  mom; Mom", "  mom; Mom; Ma", r"line LINE: a row here is 'noun; call'"),
    "no value": (
        "  vase | teapot",
        "  vase | | teapot",
        r"line LINE: a row here is 'name', not ''",
    ),
    "no column": ("animal: name; den; look", "animal: name; den", r"line LINE: .* column look"),
    "no table": ("table cozy", "table warm", r"there is no table cozy, which every story needs"),
    "no such toys": ("tree [light]", "tree [heavy]", r"line LINE: .* toy and light, not in heavy"),
    "two spots": ("slide,\n      beside the fountain, next", "slide next", r"line \d+: a place"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_grammar_is_refused_by_file_and_line(case, tmp_path):
    before, after, error = MALFORMED[case]
    text, path = GRAMMAR.read_text(encoding="utf-8"), tmp_path / "stories.txt"
    start = text.index(f"\n{before}" if before[0] == " " else before, text.index("# ---- The cast"))
    start += before[0] == " "
    path.write_text(text[:start] + after + text[start + len(before) :], encoding="utf-8")
    number = text.count("\n", 0, start) + 1
    with pytest.raises(ValueError, match=error.replace("LINE", str(number))) as raised:
        read_grammar(path)
    assert str(raised.value).startswith(str(path)), "the file is named"


@pytest.mark.parametrize(
    "text, error",
    [
        ("  (happy|sad)\n", "line 1: there is no table, rule or plot above"),
        ("# nothing\n", "there is no table girl"),
    ],
)
def test_a_grammar_without_blocks_is_refused(text, error, tmp_path):
    (tmp_path / "stories.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=error):
        read_grammar(tmp_path / "stories.txt")


def test_line_ends_and_comments_change_nothing(tmp_path):
    """An editor may write CR LF, and a comment may stand within an entry."""
    lines = GRAMMAR.read_text(encoding="utf-8").split("\n")
    commented = "\r\n".join(line + "\r\n  # why" for line in lines)
    (tmp_path / "stories.txt").write_bytes(commented.encode())
    assert read_grammar(tmp_path / "stories.txt") == grammar()


def test_the_grammar_is_read_when_it_is_needed():
    """prepare_data imports the module before it knows that its flags are sound."""
    code = (
        "from runtime.data import toy_stories; read = toy_stories.grammar.cache_info; "
        "assert not read().misses; toy_stories.story(0); toy_stories.story(1); "
        "assert read().misses == 1"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_the_first_words_of_the_readme_prompts_occur(stories):
    """A reader types "Once upon a time" or "ben was playing with the ball": so do stories begin."""
    assert "Ben" in grammar().tables["boy"] and "ball" in grammar().tables["toy"]
    starts = collections.Counter(" ".join(text.split()[:4]) for text in stories)
    assert starts["Once upon a time,"] > SAMPLE // 20
    assert (
        sum(n for start, n in starts.items() if re.fullmatch(r"\w+ was playing with", start))
        > SAMPLE // 100
    )
    assert (
        sum(
            n
            for start, n in starts.items()
            if re.fullmatch(r"\w+ was a (brave|kind|helpful)", start)
        )
        > SAMPLE // 100
    )


@pytest.mark.parametrize("table", ["girl", "boy", "animal"])
def test_the_cast_is_drawn_by_rank(table, drafts):
    """The k-th name of its table is drawn in proportion to 1 / k.

    When all names were equally rare, the demo's model gave a name that the story had named before
    a probability of 0.007: every mention was another name.
    """
    ranked = list(dict.fromkeys(map(str, grammar().tables[table])))
    heroes = [cast["A"] for _, cast in drafts]
    if table == "animal":
        drawn = collections.Counter(str(hero.kind) for hero in heroes)
    else:
        drawn = collections.Counter(str(hero) for hero in heroes if hero.kind == table)
    total = sum(drawn[name] for name in ranked)
    harmonic = sum(1 / k for k in range(1, len(ranked) + 1))
    assert total > 1000
    for k, name in enumerate(ranked, 1):
        share = 1 / k / harmonic
        # Rounding may change a share by an eighth; five standard deviations of the count.
        most = total * share / 8 + 5 * math.sqrt(total * share)
        assert abs(drawn[name] - total * share) <= most, (k, name)


# ---- the English


def test_no_field_choice_or_stray_space_is_left(stories):
    assert not failures(stories, r"[{}<>()|_/;]|  | [.,!?]|[.,!?]{2}|\n\n|^\s|\s$")


def test_articles(stories):
    assert not failures(stories, r"\b[Aa] [aeiouAEIOU]\w*", allowed=())
    assert not failures(stories, r"\b[Aa]n [^aeiouAEIOU]\w*", allowed=("an hour",))


def test_no_word_is_doubled(stories):
    assert not failures(stories, r"(?i)\b(\w+) \1\b")


def test_sentences_begin_with_capitals_and_end(stories):
    for index, text in enumerate(stories):
        for paragraph in text.split("\n"):
            assert re.match(r'"?[A-Z]', paragraph), (index, paragraph)
            assert re.search(r'[.!?]"?$', paragraph), (index, paragraph)
    assert not failures(stories, r'[.!?] "?[a-z]\w*')
    assert not failures(stories, r'\."? "?[a-z]\w*')
    # An opening quote; after a closing one there is a space.
    assert not failures(stories, r'"[a-z]\w*')
    assert not failures(stories, r"[a-z,] (The|Then|They|He|She|His|Her|It|But|So) ")


def test_quotes_pair_up_and_speech_is_told(stories):
    for index, text in enumerate(stories):
        for paragraph in text.split("\n"):
            assert paragraph.count('"') % 2 == 0, (index, paragraph)
            for quote in QUOTE.finditer(paragraph):
                before, said, after = (
                    paragraph[: quote.start()],
                    quote.group()[1:-1],
                    paragraph[quote.end() :],
                )
                assert said == said.strip() and said[-1] in ",.!?", (index, said)
                assert re.search(r"(^|[.!?,\"] )$", before), (index, paragraph)
                tag = re.findall(r"\w+", after.split('"')[0])[:4]
                if said[-1] == ",":
                    assert SPEECH & {*tag, *re.findall(r"\w+", before)[-1:]}, (index, paragraph)
                elif re.match(r" [a-z]", after):
                    # After "...!" only someone's speaking continues in lower case.
                    assert SPEECH & set(tag[:3]), (index, paragraph)


def test_questions_have_question_marks_and_nothing_else_has(stories):
    """One mark after a choice of several sentences once gave "Where is my ball!"."""
    asking = (
        r"(Was|Whose|Why|Where|Did|Does|Do you|Is|Are|Can|Could|May (?!the)|Will|Would|Have you)\b"
    )
    for index, text in enumerate(stories):
        for sentence in re.findall(r'[^.!?"\n]+[.!?]', text):
            # "Ben, did you ...".
            sentence = re.sub(r"^ ?(And |\w+, (?=[a-z]))?", "", sentence)
            if sentence.endswith("?"):
                assert re.match(rf"(?i){asking}|(Who|What|How)\b", sentence), (index, sentence)
            else:
                assert not re.match(asking, sentence), (index, sentence)


# ---- who and what


def narrated(draft: str) -> str:
    """Return a draft without the names in speech: the narrator's pronouns do not refer to them."""
    return QUOTE.sub(lambda quote: re.sub(r"\{[AB]\}", "-", quote.group()), draft)


def test_pronouns_belong_to_the_character_named_last(drafts):
    """Else "Ben ran to Tom. He smiled." leaves a reader, and a model, to guess who smiled."""
    for index, (draft, _) in enumerate(drafts):
        last = None
        for who, attribute in re.findall(r"\{([AB])\.?(\w*)\}", narrated(draft)):
            if attribute in ("he", "He", "him", "his", "His"):
                assert who == last, (index, draft)
            elif attribute in ("", "s", "full", "intro", "Intro"):
                last = who


def test_no_pronoun_of_the_other_gender(drafts, stories):
    """Parents, helpers and animals are never "he" or "she": a story of two girls has no "he"."""
    words = {"she": ("she", "her"), "he": ("he", "him", "his")}
    for index, ((draft, cast), text) in enumerate(zip(drafts, stories, strict=True)):
        present = {cast[who].he for who in "AB" if f"{{{who}" in draft}
        for gender in {"she", "he"} - present:
            assert not re.search(rf"(?i)\b({'|'.join(words[gender])})\b", text), (index, text)


def test_characters_differ_and_are_introduced(drafts, stories):
    for index, ((draft, cast), text) in enumerate(zip(drafts, stories, strict=True)):
        assert cast["A"] != cast["B"]
        # "{A} ran after {A}".
        itself = re.search(r"\{([AB])\}((?! and | that | but | so )[^{}.,!?\"])*\{\1\}", draft)
        assert not itself, (index, itself[0])
        names = [name for name in re.findall(r"[A-Z]\w+", text) if name in (cast["A"], cast["B"])]
        # The hero comes first.
        assert names[0] == cast["A"], (index, text)
        first = re.search(r"\{B\.?(\w*)\}", draft)
        assert first is None or first[1] in ("full", "intro", "Intro"), (index, text)


@pytest.mark.parametrize(
    "thing", ["H", "reach", "ferry", "trouble", "bake", "build", "gift", "plant", "noise"]
)
def test_things_have_an_indefinite_article_when_they_first_appear(drafts, thing):
    seen = 0
    for index, (draft, cast) in enumerate(drafts):
        first = re.search(rf"\{{{thing}\.?(\w*)\}}", draft)
        seen += first is not None
        assert first is None or first[1] in ("a", "A", "stuff"), (index, draft.format_map(cast))
    assert seen > 100


def test_the_toy_is_introduced_and_is_there_at_the_end(drafts, stories):
    """What was lost, wanted, found or won is named again in the last paragraph."""
    seen = 0
    for index, ((draft, cast), text) in enumerate(zip(drafts, stories, strict=True)):
        first = re.search(r"(\S+ \S+ )\{O\.?(\w*)\}", draft)
        if first:
            seen += 1
            assert (
                first[2] == "a"
                or first[1].endswith("{A.his} ")
                or "It was {O.a}" in draft.split("\n")[0]
            ), (index, text)
            assert cast["O"].noun in text.split("\n")[-1], (index, text)
            colors = {
                f"{color} {cast['O'].noun}"
                for color in grammar().tables["color"]
                if f" {color} {cast['O'].noun}" in text
            }
            assert all(str(cast["O"]).endswith(color) for color in colors), (index, text)
    assert seen > SAMPLE // 4


@pytest.mark.parametrize(
    ("plot", "thing"),
    [
        ("build", "build"),
        ("gift", "gift"),
        ("seed", "plant"),
        ("help", "trouble"),
        ("bake", "bake"),
        ("cross the river", "ferry"),
        ("learn", "skill"),
    ],
)
def test_the_thing_a_plot_is_about_comes_back_at_the_end(plot, thing):
    cast = _draft(0)[1]
    (found,) = [one for one in grammar().plots if one.name == plot]
    for seed in range(300):
        rng = random.Random(seed).random
        out: list[str] = []
        toy_stories._write((found.alternatives,), rng, out)
        draft = "".join(out)
        assert cast[thing].last in draft.split("\n")[-1].format_map(cast).replace(
            "across the water", ""
        ), draft
