"""Show which experts each token of a text went to: as lines for a terminal, and as an HTML page.

The page needs nothing else. Both take what the routers chose, and never the model: `experts_LTK`
(int64, from 0) and `gates_LTK`, the routing weights of the chosen experts, which sum to 1 per token
and block. Blocks, experts and tokens are numbered from 0, as everywhere.

# L blocks  T tokens  K chosen experts per token  E experts
"""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path

import torch
from torch import Tensor

from runtime.base.page import clean, fill, json_in_html, read_template
from runtime.base.text import visible

PAGE = Path(__file__).with_name("expert_map.html")

# The coloured entries of the 256-colour cube that have a contrast of 3:1 on black and on white
# alike, each one as far as can be from those before it (in Oklab): the first dozen are easily told
# apart. Expert 64 has the colour of expert 0 again.
TERMINAL_COLOURS = (
    33,
    196,
    28,
    201,
    95,
    92,
    162,
    136,
    30,
    61,
    139,
    135,
    58,
    166,
    127,
    168,
    105,
    63,
    170,
    26,
    67,
    101,
    133,
    129,
    199,
    98,
    164,
    197,
    160,
    130,
    131,
    202,
    94,
    60,
    126,
    96,
    29,
    64,
    161,
    68,
    25,
    97,
    163,
    132,
    169,
    93,
    128,
    137,
    165,
    134,
    171,
    200,
    99,
    62,
    27,
    198,
    167,
    31,
    32,
    100,
    65,
    103,
    104,
    69,
)
LONGEST_TEXT = 24  # terminal columns of a token's text; what is longer ends in an ellipsis
# Of the heat map's scale, half an octave each: from a quarter of the fair share or less to 4 times
# it or more.
HEAT_LEVELS = 9
# Of a token's tint, from an even split of its weights to all for one expert. The page's style and
# script know them too.
GATE_LEVELS = 4
MOST_NUMBERS = 16  # experts, up to which a heat map's cells have room for numbers
MOST_LABELS = 24  # experts, up to which a heat map's columns have room for a label each


def _strongest_first(
    pieces: list[str], experts_LTK: Tensor, gates_LTK: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Return (experts, weights), checked, on the CPU (int64, float64). Raise ValueError.

    The K experts of a token are in falling order of their weights.
    """
    if experts_LTK.dim() != 3 or experts_LTK.shape != gates_LTK.shape:
        raise ValueError(
            "experts and gates must both be [blocks, tokens, chosen], not "
            f"{list(experts_LTK.shape)} and {list(gates_LTK.shape)}"
        )
    L, T, K = experts_LTK.shape
    if len(pieces) != T:
        raise ValueError(
            f"there are {len(pieces)} texts and experts for {T} tokens: give one text per token"
        )
    if not (L and T and K):
        raise ValueError(
            f"there is nothing to show in {L} blocks, {T} tokens and {K} chosen experts"
        )
    if num_experts < K:
        raise ValueError(f"{K} chosen experts per token are more than num_experts, {num_experts}")
    if (
        experts_LTK.is_floating_point()
        or experts_LTK.is_complex()
        or experts_LTK.dtype == torch.bool
    ):
        raise ValueError(f"experts must be whole numbers, not {experts_LTK.dtype}")
    experts_LTK, gates_LTK = experts_LTK.detach().cpu().long(), gates_LTK.detach().cpu().double()
    lowest, highest = experts_LTK.min().item(), experts_LTK.max().item()
    if lowest < 0 or highest >= num_experts:
        raise ValueError(
            f"experts must be from 0 to {num_experts - 1}, not from {lowest} to {highest}"
        )
    if not ((gates_LTK >= 0) & (gates_LTK <= 1 + 1e-3)).all():  # NaN is neither
        raise ValueError(
            "gates must be from 0 to 1: give the weights of the chosen experts, not logits"
        )
    gates_LTK, order_LTK = gates_LTK.sort(dim=-1, descending=True, stable=True)
    return experts_LTK.gather(-1, order_LTK), gates_LTK


def _counts(experts_LTK: Tensor, num_experts: int) -> list[list[int]]:
    """Tokens per block and expert, [L][E]."""
    return [
        torch.bincount(experts_TK.flatten(), minlength=num_experts).tolist()
        for experts_TK in experts_LTK
    ]


# ----------------------------------------------------------------------------------------- terminal
def _columns(text: str) -> int:
    """Terminal columns that a text takes: 2 for wide characters, 0 for combining ones."""
    return sum(
        0
        if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )


def _one_line(piece: str) -> str:
    """Return a token's text on one line of at most LONGEST_TEXT columns.

    Whatever is no mark on a terminal is escaped.
    """
    text = visible(piece).replace("\n", "\\n").replace("\t", "\\t")
    text = "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cf", "Cs", "Zl", "Zp")
        else c
        for c in text
    )
    if _columns(text) <= LONGEST_TEXT:
        return text
    while _columns(text) > LONGEST_TEXT - 1:
        text = text[:-1]
    return text + "…"


def text_map(
    pieces: list[str],
    experts_LTK: Tensor,
    gates_LTK: Tensor,
    num_experts: int,
    color: bool,
    width: int = 100,
) -> str:
    """Return the tokens, one a line, with their experts in each block, strongest first (12·5).

    Then how many experts each block used. Blocks that do not fit in `width` columns follow in
    further tables. With `color` an expert has the same colour wherever it is, dim where its weight
    is less than half of an even split; without it the text has no escape sequence.
    Raises ValueError if the shapes do not agree or an expert or a gate is out of range.
    """
    experts_LTK, gates_LTK = _strongest_first(pieces, experts_LTK, gates_LTK, num_experts)
    L, T, K = experts_LTK.shape
    counts_LE, experts, gates = (
        _counts(experts_LTK, num_experts),
        experts_LTK.tolist(),
        gates_LTK.tolist(),
    )

    def number(expert: int, gate: float = 1.0) -> str:
        style = "2;" if gate < 0.5 / K else ""
        return (
            f"\x1b[{style}38;5;{TERMINAL_COLOURS[expert % len(TERMINAL_COLOURS)]}m{expert}\x1b[0m"
            if color
            else str(expert)
        )

    def line(first: str, cells: list[tuple[str, int]]) -> str:
        """Return cells in columns of their own; each comes with the columns it takes."""
        padded = (
            [first + " " * (text_columns - _columns(first))]
            + [text + " " * (cell_columns - taken) for text, taken in cells[:-1]]
            + [cells[-1][0]]
        )
        return "  ".join(padded)

    texts = [_one_line(piece) for piece in pieces]
    text_columns = max(map(_columns, [*texts, "token"]))
    names = [f"block {block}" for block in range(L)]
    widest = max(len("·".join(map(str, chosen))) for block in experts for chosen in block)
    if text_columns + L * (2 + max(widest, len(names[-1]))) > width:
        names = [f"b{block}" for block in range(L)]
    cell_columns = max(widest, len(names[-1]))
    tables = math.ceil(L / max(1, (width - text_columns) // (2 + cell_columns)))
    lines = []
    for blocks in torch.arange(L).tensor_split(tables):
        lines.append(line("token", [(names[block], len(names[block])) for block in blocks]))
        for t in range(T):
            lines.append(
                line(
                    texts[t],
                    [
                        (
                            "·".join(map(number, experts[block][t], gates[block][t])),
                            len("·".join(map(str, experts[block][t]))),
                        )
                        for block in blocks
                    ],
                )
            )
        lines.append("")
    for block, counts_E in enumerate(counts_LE):
        most = max(range(num_experts), key=counts_E.__getitem__)
        used, share = sum(count > 0 for count in counts_E), counts_E[most] / (T * K)
        lines.append(
            f"block {block:<{len(str(L - 1))}}  {used:>{len(str(num_experts))}} of {num_experts} "
            f"experts used, most of all expert {number(most)}: {100 * share:.1f} %, "
            f"{share * num_experts:.2f} x its fair share"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- page
def _hues(num_experts: int) -> list[int]:
    """Return a hue in degrees per expert: evenly spaced, neighbours in number far apart.

    Apart by about the golden ratio.
    """
    stride = next(
        (
            stride
            for stride in range(max(1, round(0.382 * num_experts)), num_experts)
            if math.gcd(stride, num_experts) == 1
        ),
        1,
    )
    return [
        round((25 + 360 * (expert * stride % num_experts) / num_experts) % 360)
        for expert in range(num_experts)
    ]


def _expert_styles(num_experts: int) -> str:
    """Return a style class per expert; three lightnesses help to tell close hues apart."""
    tiers = [0] if num_experts <= 12 else [0, 1, -1]
    return "\n".join(
        f".e{expert}{{--h:{hue};--tier:{tiers[expert % len(tiers)]}}}"
        for expert, hue in enumerate(_hues(num_experts))
    )


def _width_styles(num_experts: int, K: int) -> str:
    """Style rules for the room that numbers of this many experts take, in any font."""
    # The largest number a cell can hold: every token chose its expert.
    characters = len(f"{num_experts / K:.2f}")
    cells = f"{characters * num_experts}ch + {0.3 * num_experts:.1f}rem"
    # A dot, two gaps, an expert's number, bold, and a gate of up to 100.0 %.
    gate = f".6em + .8rem + {1.15 * len(str(num_experts - 1)) + 6.6:.2f}ch"
    return f"""
.dense{{min-width:{0.68 * num_experts + 3:.0f}rem}}
.numbers{{min-width:calc({cells} + max(2.6rem,6ch))}}
.chosen{{--gate:calc({gate})}}
"""


def _token_span(t: int, piece: str, is_prompt: bool, expert: int, gate: float, K: int) -> str:
    """Return one token of the text, tinted by its strongest expert.

    Its style classes are those that the script sets.
    """
    level = (
        GATE_LEVELS - 1
        if K == 1
        else min(GATE_LEVELS - 1, int(GATE_LEVELS * max(0.0, gate - 1 / K) / (1 - 1 / K)))
    )
    kind = " p" * is_prompt + (
        " nl" if piece.isspace() and "\n" in piece else " nil" if not piece else ""
    )
    label = clean(
        f"token {t}{', prompt' * is_prompt}: " + piece.replace("\n", "\\n").replace("\t", "\\t")
    )
    return (
        f'<span class="t{kind} e{expert} g{level}" tabindex="0" role="option" '
        f'aria-label="{label}">{clean(piece)}</span>'
    )


def _heat_table(counts_LE: list[list[int]], assignments: int) -> str:
    """Return the heat map: rows are blocks, columns experts.

    A cell is an expert's share of the block's assignments over the fair share 1/E.
    """
    E = len(counts_LE[0])
    step = 1 if E <= MOST_LABELS else 4 if E <= 96 else 16
    head = "".join(
        f'<th scope="col" class="e{e}"><span{"" if e % step == 0 else " class=sr"}>{e}</span></th>'
        for e in range(E)
    )
    rows = []
    for block, counts_E in enumerate(counts_LE):
        cells = []
        for expert, count in enumerate(counts_E):
            load = count * E / assignments
            level = (
                0
                if not count
                else min(HEAT_LEVELS - 1, max(0, round(2 * math.log2(load)) + HEAT_LEVELS // 2))
            )
            says = (
                f"block {block}, expert {expert}: {count} of {assignments} assignments, "
                f"{100 * count / assignments:.1f} %, {load:.2f} times the fair share"
            )
            tab_index = -1 if block or expert else 0
            shown = f"{load:.2f}" if E <= MOST_NUMBERS else ""
            cells.append(
                f'<td class="q{level}" role="gridcell" tabindex="{tab_index}" '
                f'aria-label="{says}" title="{says}">{shown}</td>'
            )
        rows.append(f'<tr><th scope="row">{block}</th>{"".join(cells)}</tr>')
    style, body = "numbers" if E <= MOST_NUMBERS else "dense", "\n".join(rows)
    return (
        '<table id="use" role="grid" aria-label="Expert use: rows are blocks, columns experts" '
        f'class="{style}">'
        f'<thead><tr><th scope="col" class="corner">block</th>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table>"
    )


def html_page(
    title: str,
    pieces: list[str],
    experts_LTK: Tensor,
    gates_LTK: Tensor,
    num_experts: int,
    num_prompt_tokens: int,
    about: str = "",
) -> str:
    """Return one HTML page that needs nothing else.

    It shows the text with a tint per expert, a token's experts and their weights per block, and a
    heat map of expert use. The first `num_prompt_tokens` tokens are marked as the prompt; `about`
    is plain text for under the title. The page's content security policy allows its own script and
    style, by their hashes, and nothing else: no request, no other script, whatever the text says.
    Without scripts, and on paper, the text, its tint for block 0 and the heat map remain. Write it
    as UTF-8. Raise ValueError as `text_map` does.
    """
    experts_LTK, gates_LTK = _strongest_first(pieces, experts_LTK, gates_LTK, num_experts)
    L, T, K = experts_LTK.shape
    if not 0 <= num_prompt_tokens <= T:
        raise ValueError(
            f"num_prompt_tokens must be from 0 to the {T} tokens there are, not {num_prompt_tokens}"
        )
    gates = [
        [[round(gate, 5) for gate in chosen] for chosen in block] for block in gates_LTK.tolist()
    ]
    data = {
        "num_experts": num_experts,
        "num_prompt_tokens": num_prompt_tokens,
        "pieces": pieces,
        "experts": experts_LTK.tolist(),
        "gates": gates,
    }
    spans = "".join(
        _token_span(
            t, piece, t < num_prompt_tokens, data["experts"][0][t][0], gates_LTK[0, t, 0].item(), K
        )
        for t, piece in enumerate(pieces)
    )
    template, policy = read_template(
        PAGE, expert_styles=_expert_styles(num_experts) + _width_styles(num_experts, K)
    )
    drawn = T - num_prompt_tokens
    facts = [
        f"{drawn} token{'s' * (drawn != 1)} after a prompt of {num_prompt_tokens}",
        f"{L} block{'s' * (L != 1)}",
        f"{num_experts} experts, {K} per token",
    ]
    legend = "".join(f'<i class="q{level}"></i>' for level in range(HEAT_LEVELS))
    return fill(
        template,
        policy=policy,
        title=clean(title),
        about=f'<p class="about">{clean(about)}</p>\n' if about else "",
        facts=" &middot; ".join(facts),
        spans=spans,
        last_block=L - 1,
        block_room="0" * len(str(L - 1)),
        fixed=" disabled" if L == 1 else "",
        heat=_heat_table(_counts(experts_LTK, num_experts), T * K),
        legend=legend,
        fair=f"{100 / num_experts:.3g}",
        data=json_in_html(data),
    )
