"""Which experts each token of a text went to: as lines for a terminal, and as one HTML page that needs nothing else.

Both take what the routers chose, and never the model: `experts_LTK` (int64, from 0) and `gates_LTK`, the weights of the chosen
experts, which sum to 1 per token and block. Blocks, experts and tokens are numbered from 0, as everywhere.

# L blocks  T tokens  K chosen experts per token  E experts
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import unicodedata

import torch
from torch import Tensor

from runtime.base.text import visible

# The coloured entries of the 256-colour cube that have a contrast of 3:1 on black and on white alike, each one as far as can
# be from those before it (in Oklab): the first dozen are easily told apart. Expert 64 has the colour of expert 0 again.
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
HEAT_LEVELS = 9  # of the heat map's scale, half an octave each: a quarter of the fair share or less ... 4 times it or more
GATE_LEVELS = 4  # of a token's tint, from an even split of its gates to all for one expert; style and script know them too
MOST_NUMBERS = 16  # experts, up to which a heat map's cells have room for numbers
MOST_LABELS = 24  # experts, up to which a heat map's columns have room for a label each


def _strongest_first(
    pieces: list[str], experts_LTK: Tensor, gates_LTK: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """(experts, gates), checked, on the CPU (int64, float64), and the K of a token in falling order of their gates. Raises ValueError."""
    if experts_LTK.dim() != 3 or experts_LTK.shape != gates_LTK.shape:
        raise ValueError(
            f"experts and gates must both be [blocks, tokens, chosen], not {list(experts_LTK.shape)} and {list(gates_LTK.shape)}"
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


# --------------------------------------------------------------------------------------------------------------- terminal
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
    """A token's text on one line of at most LONGEST_TEXT columns; whatever is no mark on a terminal is spelled out."""
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
    """The tokens, one a line, with their experts in each block, strongest first (12·5); then how many experts each block used.

    Blocks that do not fit in `width` columns follow in further tables. With `color` an expert has the same colour wherever it
    is, dim where its gate is less than half of an even split; without it the text has no escape sequence.
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
        """Cells, each with the columns it takes, in columns of their own; nothing behind the last."""
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
            f"block {block:<{len(str(L - 1))}}  {used:>{len(str(num_experts))}} of {num_experts} experts used, "
            f"most of all expert {number(most)}: {100 * share:.1f} %, {share * num_experts:.2f} x its fair share"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------------- page
def _hues(num_experts: int) -> list[int]:
    """A hue in degrees per expert: evenly spaced, neighbours in number far apart (by about the golden ratio)."""
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
    """A style class per expert; of many experts, three lightnesses help to tell hues apart that are close."""
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


def _clean(text: str) -> str:
    """Text for the inside of an element: no control characters but newline and tab, no lone surrogates, &, <, > and quotes escaped."""
    return html.escape(visible(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def _json_in_html(value: object) -> str:
    """JSON that no HTML parser can take for markup: ASCII, and of <, > and & not one."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _token_span(t: int, piece: str, is_prompt: bool, expert: int, gate: float, K: int) -> str:
    """One token of the text, tinted by its strongest expert. Its style classes are those that the script sets."""
    level = (
        GATE_LEVELS - 1
        if K == 1
        else min(GATE_LEVELS - 1, int(GATE_LEVELS * max(0.0, gate - 1 / K) / (1 - 1 / K)))
    )
    kind = " p" * is_prompt + (
        " nl" if piece.isspace() and "\n" in piece else " nil" if not piece else ""
    )
    label = _clean(
        f"token {t}{', prompt' * is_prompt}: " + piece.replace("\n", "\\n").replace("\t", "\\t")
    )
    return f'<span class="t{kind} e{expert} g{level}" tabindex="0" role="option" aria-label="{label}">{_clean(piece)}</span>'


def _heat_table(counts_LE: list[list[int]], assignments: int) -> str:
    """Rows are blocks, columns experts, a cell an expert's share of the block's assignments over the fair share 1/E."""
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
            says = f"block {block}, expert {expert}: {count} of {assignments} assignments, {100 * count / assignments:.1f} %, {load:.2f} times the fair share"
            cells.append(
                f'<td class="q{level}" role="gridcell" tabindex="{-1 if block or expert else 0}" aria-label="{says}" title="{says}">'
                f"{f'{load:.2f}' if E <= MOST_NUMBERS else ''}</td>"
            )
        rows.append(f'<tr><th scope="row">{block}</th>{"".join(cells)}</tr>')
    return (
        f'<table id="use" role="grid" aria-label="Expert use: rows are blocks, columns experts" class="{"numbers" if E <= MOST_NUMBERS else "dense"}">'
        f'<thead><tr><th scope="col" class="corner">block</th>{head}</tr></thead>\n<tbody>{chr(10).join(rows)}</tbody></table>'
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
    """One HTML page, whole in itself: the text with a tint per expert, a token's experts and gates per block, and a heat map of expert use.

    The first `num_prompt_tokens` tokens are marked as the prompt; `about` is plain text for under the title. The page's content
    security policy allows its own script and style, by their hashes, and nothing else: no request, no other script, whatever the
    text says. Without scripts, and on paper, the text, its tint for block 0 and the heat map remain.
    Write it as UTF-8. Raises ValueError as `text_map` does.
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
    style = STYLE + _expert_styles(num_experts) + _width_styles(num_experts, K)
    hashes = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in (("style", style), ("script", SCRIPT))
    }
    drawn = T - num_prompt_tokens
    facts = [
        f"{drawn} token{'s' * (drawn != 1)} after a prompt of {num_prompt_tokens}",
        f"{L} block{'s' * (L != 1)}",
        f"{num_experts} experts, {K} per token",
    ]
    legend = "".join(f'<i class="q{level}"></i>' for level in range(HEAT_LEVELS))
    return PAGE.format(
        policy=f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; base-uri 'none'; form-action 'none'",
        style=style,
        title=_clean(title),
        about=f'<p class="about">{_clean(about)}</p>\n' if about else "",
        facts=" &middot; ".join(facts),
        spans=spans,
        last_block=L - 1,
        block_room="0" * len(str(L - 1)),
        fixed=" disabled" if L == 1 else "",
        heat=_heat_table(_counts(experts_LTK, num_experts), T * K),
        legend=legend,
        fair=f"{100 / num_experts:.3g}",
        data=_json_in_html(data),
        script=SCRIPT,
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#use">Skip the text, to expert use</a>
<header>
<h1>{title}</h1>
{about}<p class="facts">{facts}</p>
</header>
<main>
<section class="card story" aria-labelledby="text-title">
<div class="bar">
<h2 id="text-title">Text</h2>
<label class="pick">Tint by strongest expert in block <input id="block" type="range" min="0" max="{last_block}" value="0" step="1"{fixed}><span class="still" data-room="{block_room}"><output id="block-shown" for="block">0</output></span></label>
</div>
<div id="text" class="text" dir="auto" translate="no" role="listbox" aria-orientation="horizontal" aria-label="The tokens of the text; arrow keys go from one to the next">{spans}</div>
<p class="note"><span class="p">Dotted italics</span> are the prompt. The deeper a tint, the larger the strongest expert's gate.</p>
<noscript><p class="note">Scripts are off: tints are those of block 0, and the experts of single tokens cannot be shown.</p></noscript>
</section>
<aside id="detail" class="card detail" aria-label="Experts of one token"></aside>
<section class="card use" aria-labelledby="use-title">
<div class="bar"><h2 id="use-title">Expert use</h2><p class="scale" aria-hidden="true">
<span>&le; &frac14;</span><span class="steps">{legend}</span><span>&ge; 4</span> <span>&times; fair share ({fair} %)</span></p></div>
<div class="scroll">{heat}</div>
<div class="note read still"><p id="read" aria-live="polite">Share of a block's assignments over the fair share.
Point at a cell to see its tokens; click to keep them, Esc to let go.</p></div>
</section>
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root{color-scheme:light dark;--page:#f6f4ef;--card:#fffefb;--ink:#1f1e1b;--soft:#65615a;--line:#e2ded5;--accent:#2b5d8c;
--tint-l:.885;--tint-c:.075;--solid-l:.66;--solid-c:.13;--tier-l:.03;--fair:#f1eee7;--under:#4f8fce;--over:#e0863a}
@media (prefers-color-scheme:dark){:root{--page:#14161a;--card:#1b1e23;--ink:#eceae5;--soft:#a5a29b;--line:#32363d;--accent:#8dbbe6;
--tint-l:.42;--tint-c:.085;--solid-l:.74;--solid-c:.115;--fair:#262a30;--under:#2a66a4;--over:#9c521a}}
*{box-sizing:border-box}
html{scroll-padding:1rem 0}
body{margin:0;padding:2.2rem clamp(.9rem,3vw,2.5rem) 3rem;background:var(--page);color:var(--ink);
font:15px/1.5 -apple-system,"Segoe UI",Inter,Roboto,"Helvetica Neue",system-ui,sans-serif}
header,main{max-width:76rem;margin:0 auto}
h1{margin:0;font-size:1.55rem;font-weight:650;letter-spacing:-.015em;line-height:1.25;overflow-wrap:anywhere}
h2{margin:0;font-size:.95rem;font-weight:650}
p{margin:0}
.about{margin-top:.35rem;max-width:46rem;overflow-wrap:anywhere;white-space:pre-line}
.facts,.note,.scale,.pick{color:var(--soft);font-size:.87rem}
.facts{margin-top:.3rem}
main{display:grid;grid-template:auto 1fr/minmax(0,1fr) 21rem;gap:1.1rem;margin-top:1.4rem;align-items:start}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1.1rem 1.3rem}
.story,.use{grid-column:1}
.detail{grid-column:2;grid-row:1/span 2;position:sticky;top:1rem;max-height:calc(100vh - 2rem);overflow:auto}
.bar{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;justify-content:space-between;align-items:center;margin-bottom:.8rem}
.pick{display:flex;gap:.55rem;align-items:center}
.pick input{width:7.5rem;margin:0;accent-color:var(--accent)}
.pick .still{flex:none;min-width:1.4em;color:var(--ink);font-weight:650}
.text{font:1.13rem/2 "Iowan Old Style","Palatino Linotype",Palatino,Charter,Georgia,"Liberation Serif",serif;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4}
.note{margin-top:.9rem}
.t{border-radius:3px;padding:.14em 0;margin-right:1px;cursor:default;-webkit-box-decoration-break:clone;box-decoration-break:clone;
background:oklch(calc(var(--tint-l) + var(--tier)*var(--tier-l)) var(--tint-c) var(--h)/var(--a));transition:background-color .15s,color .15s}
.p{font-style:italic;text-decoration:underline dotted var(--soft) 1.5px;text-underline-offset:.28em}
.nl::before{content:"\\21B5";color:var(--soft);padding:0 .15em}
.nil::before{content:"\\2205";color:var(--soft)}
.g0{--a:.4}.g1{--a:.6}.g2{--a:.8}.g3{--a:1}
.off{background:none;color:var(--soft)}
.t[aria-selected]{box-shadow:0 0 0 1.5px var(--ink)}
:focus{outline:none}
:focus-visible{outline:2.5px solid var(--accent);outline-offset:2px}
.t:focus-visible{outline-offset:1.5px;box-shadow:none}
.which{color:var(--soft);font-size:.87rem}
.piece{font:1.35rem/1.3 "Iowan Old Style","Palatino Linotype",Palatino,Charter,Georgia,"Liberation Serif",serif;height:1lh;white-space:pre;overflow:hidden;text-overflow:ellipsis}
.piece b{font-weight:400;color:var(--soft)}
.detail table{width:100%;table-layout:fixed;border-collapse:collapse;margin-top:.75rem;font-size:.9rem;font-variant-numeric:tabular-nums}
.detail th{font-weight:400;color:var(--soft);text-align:start;vertical-align:top;padding:.5rem .5rem .45rem}
.detail thead th{padding-block:0 .3rem;font-size:.82rem}
.detail td{padding:.5rem .5rem .55rem 0;border-top:1px solid var(--line)}
.detail thead th:first-child{width:max(3.3rem,calc(6ch + 1rem))}
.detail tbody th{width:3.3rem;border-top:1px solid var(--line)}
.detail tr.now th{color:var(--ink);font-weight:650;box-shadow:inset 3px 0 var(--accent)}
.chosen{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--gate)),1fr));gap:.1rem .4rem}
.chosen span{display:flex;align-items:baseline;gap:.4rem;white-space:nowrap}
.chosen b{text-align:end;font-weight:650}
.chosen i{align-self:center;width:.6em;height:.6em;border-radius:50%}
.gates{display:flex;gap:2px;height:6px;margin-top:.3rem}
.gates i{border-radius:3px;min-width:2px}
.chosen i,.gates i,.use thead th::after{background:oklch(calc(var(--solid-l) + var(--tier)*var(--tier-l)) var(--solid-c) var(--h))}
.scroll{overflow-x:auto;padding:3px;position:relative}
.use table{width:100%;border-collapse:separate;border-spacing:2px;table-layout:fixed;font-size:.82rem;font-variant-numeric:tabular-nums}
.use th{font-weight:400;vertical-align:bottom;color:var(--soft);padding:0;overflow:visible;white-space:nowrap}
.use thead th::after{content:"";display:block;height:3px;border-radius:2px;margin:.15rem 0 .1rem}
.use .corner{width:max(2.6rem,6ch);text-align:start}.use thead th.corner::after{background:none}
.use tbody th{text-align:start;vertical-align:middle}
.use td{height:1.9rem;padding:0;text-align:center;border-radius:4px;cursor:pointer}
.dense td{height:1.4rem;border-radius:2px}.dense thead th{font-size:.72rem}
.use td:hover{box-shadow:0 0 0 1.5px var(--ink)}
.use td[aria-selected]{box-shadow:0 0 0 2.5px var(--ink)}
.scale{display:flex;flex-wrap:wrap;align-items:center;gap:0 .35em}
.steps{display:flex;gap:2px;margin:0 .15rem}
.scale i{width:1.05rem;height:.7rem;border-radius:2px}
/* Room for the longest text that may come: two of them, unseen, lie where the text lies. */
.still{display:grid;grid-template-columns:minmax(0,1fr);font-variant-numeric:tabular-nums}
.still>*,.still::before,.still::after{grid-area:1/1}
.still::before,.still::after{visibility:hidden}
.still::before{content:attr(data-room)}
.still::after{content:attr(data-more-room)}
.q0{background:var(--under)}.q1{background:color-mix(in oklab,var(--under) 75%,var(--fair))}.q2{background:color-mix(in oklab,var(--under) 50%,var(--fair))}
.q3{background:color-mix(in oklab,var(--under) 25%,var(--fair))}.q4{background:var(--fair)}.q5{background:color-mix(in oklab,var(--over) 25%,var(--fair))}
.q6{background:color-mix(in oklab,var(--over) 50%,var(--fair))}.q7{background:color-mix(in oklab,var(--over) 75%,var(--fair))}.q8{background:var(--over)}
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.6rem;background:var(--card);color:var(--accent);padding:.2rem .6rem;z-index:2}
.detail:empty{display:none}
@media (max-width:56rem){main{grid-template:none/minmax(0,1fr)}html{scroll-padding-bottom:calc(40vh + 1rem)}body{padding-top:1.3rem}
.card{padding:.9rem 1rem}.detail{grid-column:1;grid-row:auto;order:3;top:auto;bottom:0;max-height:40vh;margin:0 -.4rem;border-radius:12px 12px 0 0;box-shadow:0 -6px 20px #0002}
.pick{gap:.4rem}.pick input{width:5.5rem}.top{display:flex;justify-content:space-between;gap:.8rem}.which{order:1;flex:none;max-width:60%;text-align:end}
.piece{flex:1;min-width:0;font-size:1.13rem}.detail table{margin-top:.3rem}.detail thead{display:none}
.detail th,.detail td{padding-block:.25rem .35rem}.gates{margin-top:.15rem}}
@media (max-width:32rem){.use .numbers{font-size:.72rem}}
@media (prefers-reduced-motion:reduce){.t{transition:none}}
@media print{body{background:none;padding:0}main{display:block}.card{border:0;padding:.5rem 0;break-inside:auto}.detail,.pick,.read,.skip{display:none}
.t,.use td,.scale i,.use thead th::after{print-color-adjust:exact;-webkit-print-color-adjust:exact}.t[aria-selected]{box-shadow:none}}
"""

SCRIPT = """
"use strict";
(() => {
  const $ = id => document.getElementById(id);
  const {experts, gates, pieces, num_experts, num_prompt_tokens} = JSON.parse($("data").textContent);  // [block][token][k], strongest first
  const L = experts.length, T = pieces.length, K = experts[0][0].length;
  const text = $("text"), slider = $("block"), read = $("read"), hint = read.textContent;
  const tokens = [...text.querySelectorAll(".t")], kinds = tokens.map(token => token.className.replace(/ [eg]\\d+/g, ""));
  const rows = [...$("use").tBodies[0].rows].map(row => [...row.querySelectorAll("td")]), cells = rows.flat();
  const KEPT = " (kept: Esc lets go)", named = (t, part) => `Token ${t} \\u00B7 ${part}`;
  let block = 0, current = -1, pointed = null, kept = null;  // pointed, kept: cells of the heat map

  const level = gate => K === 1 ? 3 : Math.min(3, Math.floor(4 * Math.max(0, gate - 1 / K) / (1 - 1 / K)));
  const percent = gate => (100 * gate).toFixed(1) + " %";
  const put = (parent, name, kind, content) => {
    const element = parent.appendChild(document.createElement(name));
    if (kind) element.className = kind;
    if (content !== undefined) element.textContent = content;
    return element;
  };
  const says = cell => cell.title.replace(" %", "\\u00A0%");  // never a lone % at the start of a line
  const place = cell => [cell.parentNode.rowIndex - 1, cell.cellIndex - 1];

  // The tint of each token: its strongest expert in the chosen block or, while a cell is pointed at, the cell's expert.
  function paint() {
    const cell = pointed || kept, [l, expert] = cell ? place(cell) : [block, -1];
    tokens.forEach((token, t) => {
      const k = cell ? experts[l][t].indexOf(expert) : 0;
      const kind = kinds[t] + (k < 0 ? " off" : " e" + experts[l][t][k] + " g" + level(gates[l][t][k]));
      if (token.className !== kind) token.className = kind;
    });
    const said = cell ? says(cell) + (cell === kept ? KEPT : "") : hint;
    if (read.textContent !== said) read.textContent = said;
    cells.forEach(one => one.hasAttribute("aria-selected") && one !== kept && one.removeAttribute("aria-selected"));
    if (kept) kept.setAttribute("aria-selected", "true");
  }

  // Room for the longest of some texts, word by word; a digit takes as much as any other.
  const zeros = text => text.replace(/\\d/g, "0"), longer = (a, b) => a.length < b.length ? b : a;
  const longest = texts => zeros(texts.map(text => text.split(" "))
    .reduce((words, others) => words.map((word, i) => longer(word, others[i]))).join(" "));
  const keepRoom = (element, ...texts) => [element.dataset.room, element.dataset.moreRoom] = texts;
  const panel = $("detail"), top = put(panel, "div", "top");
  const which = put(put(top, "div", "which still"), "p"), piece = put(top, "p", "piece");
  const table = put(panel, "table"), said = put(panel, "p", "sr");
  keepRoom(which.parentNode, ...["prompt", "answer"].map(part => zeros(named(T - 1, part))));
  keepRoom(read.parentNode, hint, longest(cells.map(says)) + KEPT);
  said.setAttribute("aria-live", "polite");
  const head = put(put(table, "thead"), "tr");
  put(head, "th", "", "Block").scope = put(head, "th", "", "Experts and their gates").scope = "col";
  const body = put(table, "tbody"), lines = experts.map((_, l) => {
    const row = put(body, "tr");
    put(row, "th", "", l).scope = "row";
    const cell = put(row, "td"), chosen = put(cell, "div", "chosen"), bars = put(cell, "div", "gates");
    return {row, parts: Array.from({length: K}, () => {
      const part = put(chosen, "span");
      const made = {dot: put(part, "i"), number: put(part, "b"), gate: put(part, "span"), bar: put(bars, "i")};
      made.number.style.minWidth = String(num_experts - 1).length + "ch";
      return made;
    })};
  });
  const spell = string => string.replace(/\\n/g, "\\u21B5").replace(/\\t/g, "\\u21E5") || "\\u2205";

  function show(t, aloud) {
    if (current >= 0) tokens[current].removeAttribute("aria-selected");
    current = t;
    tokens[t].setAttribute("aria-selected", "true");
    which.textContent = named(t, t < num_prompt_tokens ? "prompt" : "answer");
    piece.textContent = "";
    put(piece, "b", "", "\\u201C");
    piece.append(spell(tokens[t].textContent));
    put(piece, "b", "", "\\u201D");
    lines.forEach(({parts}, l) => parts.forEach(({dot, number, gate, bar}, k) => {
      number.textContent = experts[l][t][k];
      gate.textContent = percent(gates[l][t][k]);
      dot.className = bar.className = "e" + experts[l][t][k];
      bar.style.flexGrow = gates[l][t][k];
    }));
    if (aloud) said.textContent = `Block ${block}: ` + experts[block][t].map((expert, k) => `expert ${expert}, ${percent(gates[block][t][k])}`).join("; ");
  }

  function choose(l) {
    block = l;
    kept = null;
    $("block-shown").textContent = slider.value = l;
    lines.forEach(({row}, at) => row.classList.toggle("now", at === l));
    paint();
  }

  const keys = {ArrowLeft: t => t - 1, ArrowRight: t => t + 1, Home: () => 0, End: () => T - 1};
  text.addEventListener("focusin", event => show(tokens.indexOf(event.target), true));
  text.addEventListener("mouseover", event => event.target.classList.contains("t") && show(tokens.indexOf(event.target), false));
  text.addEventListener("mouseleave", () => text.contains(document.activeElement) && show(tokens.indexOf(document.activeElement), false));
  text.addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey || !keys[event.key]) return;
    event.preventDefault();
    tokens[Math.max(0, Math.min(T - 1, keys[event.key](tokens.indexOf(event.target))))].focus();
  });
  slider.addEventListener("input", () => choose(+slider.value));

  const use = $("use"), steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
  const point = cell => { pointed = cell; paint(); };
  const keep = cell => { kept = cell === kept ? null : cell; pointed = null; paint(); };
  use.addEventListener("mouseover", event => event.target.matches("td") && point(event.target));
  use.addEventListener("mouseleave", () => point(null));
  use.addEventListener("focusin", event => event.target.matches("td") && point(event.target));
  use.addEventListener("focusout", () => point(null));
  use.addEventListener("click", event => event.target.matches("td") && keep(event.target));
  use.addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey || !event.target.matches("td")) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); keep(event.target); return; }
    if (!steps[event.key]) return;
    event.preventDefault();
    const [l, e] = place(event.target), [down, right] = steps[event.key];
    const next = (rows[l + down] || [])[e + right];
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  document.addEventListener("keydown", event => { if (event.key === "Escape") { kept = pointed = null; paint(); } });

  show(Math.min(num_prompt_tokens, T - 1), false);
  choose(0);
})();
"""
