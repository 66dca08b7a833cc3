/* Attention, forward and backward, by tiles of queries and keys; no T x S scores are held.

   The mathematics of model_parts.Attention: softmax(q k / sqrt D + bias) v, where a query sees the
   keys from some position up to its own, and a sink adds a term to the softmax's sum. The softmax
   is taken tile by tile (Milakov and Gimelshein 2018; Dao et al. 2022): a row keeps its maximum and
   its sum so far. The forward pass saves the logarithm of that sum; the backward pass computes each
   probability again. Scores are in units of ln 2: their exponential is a power of 2.

   runtime/kernels/cpu_attention.py makes the calls. Letters as in model_parts.py: B batch, T
   queries, S keys, H query heads, G key/value heads, D head_dim. Each sum has one order, whichever
   thread does it and whatever other texts the batch has. */
#include "tiles.h"
#if defined(__AVX__)
#include <immintrin.h>
#endif

/* Queries and keys of a tile: multiples of ROWS and of COLUMNS. */
#ifndef QUERIES
#define QUERIES 48
#endif
#ifndef KEYS
#define KEYS 96
#endif
#define BLOCKS (QUERIES / ROWS)
#define PANELS (KEYS / COLUMNS)
#define LN_2 0.69314718055994530942
/* The position of a key that is not there: after every query. */
#define NOWHERE INT32_MAX
#ifdef GPTOSS_DOUBLE
#define LOWEST (-1.7976931348623157e308)
#else
#define LOWEST (-3.402823466e38f)
#endif

/* Steps are in values: of the batch, the head, the token. A last step is 1. */
typedef struct {
    int64_t B, T, S, H, G, D, window, threads;
    int64_t q_steps[3], k_steps[3], v_steps[3], y_steps[3], grad_steps[3];
    int64_t bias_steps[2];      /* of the head, the query */
    const real *q, *k, *v;
    /* [H] or NULL; [H, T, S] or NULL. */
    const real *sinks, *bias;
    /* Positions [T] and [S]; NULL, or [B, T]: the position where each query's document begins. */
    const int64_t *q_positions, *k_positions, *starts;
    /* The result, and [B, H, T] the base-2 logarithm of the softmax's sum. */
    real *y, *logs;
    const real *grad;
    /* [B, T, H, D], [B, S, G, D] twice; [B, H] of each row, [H, T, S] with zeros in it. NULL for
       the last two if there is none. */
    real *grad_q, *grad_k, *grad_v, *grad_sinks, *grad_bias;
    real *room;
    Parallel parallel;
} Call;

/* Where things are in a call's room; all counts in reals. */
typedef struct {
    const Call *c;
    int64_t D, T, S;            /* rounded up: to vectors, to tiles */
    int64_t tasks, threads;
    real scale;                 /* of scores, in units of ln 2 */
    whole *positions;           /* [S] of keys */
    whole *first, *last;        /* [S / COLUMNS]: of the keys of each panel */
    real *k_panels, *v_panels;  /* [B, G][S / COLUMNS][D][COLUMNS] */
    real *k_rows, *v_rows;      /* [B, G][S][D] */
    real *partial;              /* [B, H][2][S][D]: gradients of k and v by query head */
    atomic_int *done;           /* [B, G]: query heads whose part is there */
    real *rooms;
    int64_t room_size, end;
    int is_backward;
} Plan;

/* Which keys the queries of a row block see. */
typedef struct {
    whole first_min, first_max, last_min, last_max;
} Range;
enum { NONE, SOME, EVERY };

static const real *at(const real *x, const int64_t steps[3], int64_t b, int64_t h, int64_t t)
{
    return x + b * steps[0] + h * steps[1] + t * steps[2];
}

/* The larger one of each lane; where one is not a number, y. */
INLINE vec larger(vec x, vec y)
{
#if defined(GPTOSS_DOUBLE)
    return choose(x > y, x, y);
#elif VECTOR_BYTES == 64 && defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)x, (__m512)y);
#elif VECTOR_BYTES == 32
    return (vec)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return choose(x > y, x, y);
#endif
}

/* 2^x of each lane for x < 128, to 1.5 units in the last place; 0 for x < -126. The polynomial is
   fitted to 2^r with a relative error of 3e-9, |r| <= 1/2. */
INLINE vec power_of_2(vec x)
{
#ifdef GPTOSS_DOUBLE
    for (int l = 0; l < LANES; l++)
        x[l] = exp2(x[l]);
    return x;
#else
    /* 1.5 * 2^23 leaves no bits after the point; the lowest ones are then those of the exponent. */
    vec whole_part = x + ALL(12582912.0f + 127.0f);
    vec r = x - (whole_part - ALL(12582912.0f + 127.0f)), square = r * r;
    vec low = r * ALL(6.931472150e-1f) + ALL(1.0f), middle = r * ALL(5.550310551e-2f) + ALL(2.402265278e-1f);
    vec high = square * ALL(1.559467754e-4f) + (r * ALL(1.340664390e-3f) + ALL(9.617692975e-3f));
    vec p = square * (square * high + middle) + low;
    vec y = p * (vec)((ints)whole_part << 23);
    return (vec)((ints)y & ~(x < ALL(-126.0f)));
#endif
}

/* Rows of one head are far apart in memory: the processor does not prefetch them itself. */
#define ROWS_AHEAD 16
INLINE void prefetch(const real *row, int64_t count)
{
    for (int64_t i = 0; i < count; i += 64 / REAL_BYTES)
        __builtin_prefetch(row + i);
}

/* to[i] = scale * from[i], zeros from `count` up to `padded`. */
INLINE void copy_row(const real *from, real scale, int64_t count, int64_t padded, real *to)
{
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        STORE(to + i, LOAD(from + i) * ALL(scale));
    for (; i < padded; i++)
        to[i] = i < count ? from[i] * scale : 0;
}

/* --------------------------------------------------------------------------------- visibility */
/* The positions that `count` queries from t on see, and those of each row block. */
static void ranges_of(const Call *c, int64_t b, int64_t t, int64_t count, whole *first, whole *last, Range *ranges)
{
    for (int64_t i = 0; i < count; i++) {
        /* A query that is not there sees nothing. */
        int64_t from = NOWHERE, to = -NOWHERE;
        if (t + i < c->T) {
            to = c->q_positions[t + i];
            from = c->window ? to - c->window + 1 : -NOWHERE;
            if (c->starts)
                from = most(from, c->starts[b * c->T + t + i]);
        }
        first[i] = from, last[i] = to;
    }
    for (int64_t r = 0; r < count / ROWS; r++) {
        Range all = {first[r * ROWS], first[r * ROWS], last[r * ROWS], last[r * ROWS]};
        for (int64_t i = r * ROWS; i < (r + 1) * ROWS; i++) {
            all.first_min = least(all.first_min, first[i]), all.first_max = most(all.first_max, first[i]);
            all.last_min = least(all.last_min, last[i]), all.last_max = most(all.last_max, last[i]);
        }
        ranges[r] = all;
    }
}

/* What the queries of a row block see of a panel. */
INLINE int sight(const Plan *p, const Range *range, int64_t panel)
{
    whole first = p->first[panel], last = p->last[panel];
    if (first > range->last_max || last < range->first_min)
        return NONE;
    return last <= range->last_min && first >= range->first_max ? EVERY : SOME;
}

/* For each row block the panels [from, to) of a key tile that it sees; returns how many pairs of
   both there are. */
static int seen_panels(const Plan *p, const Range *ranges, int64_t key, int from[BLOCKS], int to[BLOCKS])
{
    int pairs = 0;
    for (int r = 0; r < BLOCKS; r++) {
        from[r] = PANELS, to[r] = 0;
        for (int n = 0; n < PANELS; n++)
            if (sight(p, &ranges[r], key / COLUMNS + n) != NONE)
                from[r] = least(from[r], n), to[r] = n + 1, pairs++;
    }
    return pairs;
}

/* --------------------------------------------------------------------------------- products */
/* sums = the rows at `a`, row_step apart, times a panel. */
INLINE void product(const int vectors, const real *a, int64_t row_step, const int64_t step, const real *panel,
                    int64_t panel_step, int64_t depth, vec sums[ROWS][2])
{
    const real *rows[ROWS];
    for (int i = 0; i < ROWS; i++)
        rows[i] = a + i * row_step;
    tile(ROWS, vectors, rows, step, panel, panel_step, depth, sums);
}

INLINE void clear(vec sums[ROWS][2])
{
    for (int i = 0; i < ROWS; i++)
        sums[i][0] = sums[i][1] = ALL(0);
}

/* out[i][d] = out[i][d] * scales[i] + the product, for d < D. Without scales they are 1. */
INLINE void add_product(const int vectors, const real *a, int64_t row_step, const int64_t step, const real *panel,
                        int64_t depth, const real *scales, real *out, int64_t D)
{
    vec sums[ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < vectors; j++) {
            sums[i][j] = LOAD(out + i * D + j * LANES);
            if (scales)
                sums[i][j] *= ALL(scales[i]);
        }
    product(vectors, a, row_step, step, panel, D, depth, sums);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < vectors; j++)
            STORE(out + i * D + j * LANES, sums[i][j]);
}

INLINE void add_products(const real *a, int64_t row_step, const int64_t step, const real *panel, int64_t depth,
                         const real *scales, real *out, int64_t D)
{
    int64_t d = 0;
    for (; d + COLUMNS <= D; d += COLUMNS)
        add_product(2, a, row_step, step, panel + d, depth, scales, out + d, D);
    if (d < D)
        add_product(1, a, row_step, step, panel + d, depth, scales, out + d, D);
}

/* The scores of a row block and a panel: product, bias, and -inf for what is not seen. */
INLINE void scores_of(const Plan *p, const real *q, int64_t D, int64_t h, int64_t t, int64_t key, const real *panel,
                      const whole *first, const whole *last, int seen, vec sums[ROWS][2])
{
    const Call *c = p->c;
    clear(sums);
    product(2, q, D, 1, panel, COLUMNS, D, sums);
    if (c->bias)
        for (int i = 0; i < ROWS; i++) {
            const real *bias = c->bias + h * c->bias_steps[0] + least(t + i, c->T - 1) * c->bias_steps[1] + key;
            real room[COLUMNS] = {0};
            if (key + COLUMNS > c->S) {
                memcpy(room, bias, (c->S - key) * sizeof(real));
                bias = room;
            }
            for (int j = 0; j < 2; j++)
                sums[i][j] += LOAD(bias + j * LANES) * ALL(1 / LN_2);
        }
    if (seen == SOME) {
        const whole *positions = p->positions + key;
        for (int j = 0; j < 2; j++) {
            ints at_keys = *(const ints *)(positions + j * LANES);
            for (int i = 0; i < ROWS; i++) {
                ints visible = (at_keys >= first[i]) & (at_keys <= last[i]);
                sums[i][j] = choose(visible, sums[i][j], ALL(-INFINITY));
            }
        }
    }
}

/* --------------------------------------------------------------------------------- the plan */
static int64_t take(int64_t *end, int64_t count)
{
    int64_t start = *end;
    *end += rounded_up(count, 64 / REAL_BYTES);
    return start;
}

static Plan plan_of(const Call *c, int is_backward)
{
    Plan p = {.c = c, .is_backward = is_backward};
    p.D = rounded_up(c->D, LANES), p.T = rounded_up(c->T, QUERIES), p.S = rounded_up(c->S, KEYS);
    p.scale = 1 / (LN_2 * sqrt((double)c->D));
    p.tasks = is_backward ? (c->grad_bias ? 1 : c->B) * c->H : c->B * c->H * p.T / QUERIES;
    /* Another thread wants some multiply-adds to be worth waking. */
    p.threads = least(least(c->threads, p.tasks), 1 + c->B * c->H * c->T * c->S * c->D / WORTH_A_THREAD);
    int64_t end = 0, all = c->B * c->G * p.S * p.D;
    real *room = c->room;
    p.positions = (whole *)room + take(&end, p.S);
    p.first = (whole *)room + take(&end, p.S / COLUMNS);
    p.last = (whole *)room + take(&end, p.S / COLUMNS);
    p.k_panels = room + take(&end, all);
    if (is_backward) {
        p.v_panels = room + take(&end, all);
        p.k_rows = room + take(&end, all);
        p.done = (atomic_int *)(room + take(&end, c->B * c->G));
        p.partial = room + (c->H > c->G ? take(&end, c->B * c->H * 2 * p.S * p.D) : 0);
        /* q, grad, grad_q; logs and deltas; what each query sees; two tiles; gradients of k, v */
        p.room_size = 3 * p.T * p.D + 4 * p.T + 4 * p.T / ROWS + 2 * QUERIES * KEYS + 2 * KEYS * p.D;
    } else {
        p.v_rows = room + take(&end, all);
        /* q, y, a tile, largest ones and sums of rows, what each query sees */
        p.room_size = 2 * QUERIES * p.D + QUERIES * KEYS + 2 * QUERIES * LANES;
    }
    p.room_size = rounded_up(p.room_size + 64 / REAL_BYTES, 64 / REAL_BYTES);
    p.rooms = room + end;
    p.end = end + p.room_size * p.threads;
    return p;
}

int64_t gptoss_size(void) { return sizeof(Call); }

int64_t gptoss_room(const Call *c, int is_backward) { return plan_of(c, is_backward).end; }

static void find_keys(Plan *p)
{
    for (int64_t s = 0; s < p->S; s++)
        p->positions[s] = s < p->c->S ? p->c->k_positions[s] : NOWHERE;
    for (int64_t n = 0; n < p->S / COLUMNS; n++) {
        const whole *keys = p->positions + n * COLUMNS;
        p->first[n] = p->last[n] = keys[0];
        for (int64_t j = 1; j < COLUMNS; j++)
            p->first[n] = least(p->first[n], keys[j]), p->last[n] = most(p->last[n], keys[j]);
    }
}

/* Copy keys and values of a text, a head and a tile: as panels, as rows. */
static void pack_task(void *job, int64_t task, real *unused)
{
    const Plan *p = job;
    const Call *c = p->c;
    int64_t tiles = p->S / KEYS, bg = task / tiles, s = task % tiles * KEYS;
    int64_t b = bg / c->G, g = bg % c->G, first = (bg * p->S + s) * p->D;
    for (int is_v = 0; is_v < 2; is_v++) {
        const real *from = is_v ? c->v : c->k;
        const int64_t *steps = is_v ? c->v_steps : c->k_steps;
        for (int64_t i = s; i < least(s + KEYS, c->S); i++)
            prefetch(at(from, steps, b, g, i), c->D);
        real *panels = is_v ? p->v_panels : p->k_panels, *rows = is_v ? p->v_rows : p->k_rows;
        for (int64_t i = 0; i < KEYS && panels; i += COLUMNS) {
            real *panel = panels + first + i * p->D;
            int64_t left = most(0, least(COLUMNS, c->S - s - i));
            pack_transposed(at(from, steps, b, g, s + i), steps[2], c->D, left, panel);
            memset(panel + c->D * COLUMNS, 0, (p->D - c->D) * COLUMNS * sizeof(real));
        }
        for (int64_t i = 0; i < KEYS && rows; i++)
            copy_row(at(from, steps, b, g, s + i), 1, s + i < c->S ? c->D : 0, p->D, rows + first + i * p->D);
    }
}

/* --------------------------------------------------------------------------------- forward */
/* The largest lane of each row. */
static void largest_of(const vec *rows, real *out)
{
    for (int i = 0; i < QUERIES; i += LANES) {
        vec v[LANES];
        for (int l = 0; l < LANES; l++)
            v[l] = rows[i + l];
        transpose(v);
        for (int l = 1; l < LANES; l++)
            v[0] = larger(v[l], v[0]);
        STORE(out + i, v[0]);
    }
}

/* A block of queries, in one thread's room: queries times the scale and results [QUERIES, D], a
   tile's scores; the softmax's sums in lanes; which keys are seen. */
typedef struct {
    int64_t b, h, bh, bg, t;
    real *q, *y, *tile;
    vec *sums, *highest;
    real most_yet[QUERIES], factors[QUERIES];
    whole first[QUERIES], last[QUERIES];
    Range ranges[BLOCKS];
    int from[BLOCKS], to[BLOCKS];
} Block;

static void begin_block(const Plan *p, Block *a, int64_t task, real *room)
{
    const Call *c = p->c;
    /* The longest tasks come first. */
    int64_t tiles = p->T / QUERIES, bh = task / tiles, b = bh / c->H, h = bh % c->H;
    a->b = b, a->h = h, a->bh = bh, a->bg = b * c->G + h / (c->H / c->G);
    a->t = (tiles - 1 - task % tiles) * QUERIES;
    a->q = room, a->y = a->q + QUERIES * p->D, a->tile = a->y + QUERIES * p->D;
    a->sums = (vec *)(a->tile + QUERIES * KEYS), a->highest = a->sums + QUERIES;
    ranges_of(c, b, a->t, QUERIES, a->first, a->last, a->ranges);
    for (int64_t i = 0; i < QUERIES; i++) {
        prefetch(at(c->q, c->q_steps, b, h, least(a->t + i + ROWS_AHEAD, c->T - 1)), c->D);
        copy_row(at(c->q, c->q_steps, b, h, a->t + i), p->scale, a->t + i < c->T ? c->D : 0, p->D, a->q + i * p->D);
        a->most_yet[i] = c->sinks ? (real)(c->sinks[h] / LN_2) : LOWEST;
        a->sums[i] = ALL(0);
        a->sums[i][0] = c->sinks ? 1 : 0;
    }
    memset(a->y, 0, QUERIES * p->D * sizeof(real));
}

/* The scores of a tile, and the largest of each row so far. */
static void score(const Plan *p, Block *a, int64_t key)
{
    int64_t D = p->D;
    const real *panels = p->k_panels + (a->bg * p->S + key) * D;
    for (int i = 0; i < QUERIES; i++)
        a->highest[i] = ALL(-INFINITY);
    for (int n = 0; n < PANELS; n++)
        for (int r = 0; r < BLOCKS; r++) {
            if (n < a->from[r] || n >= a->to[r])
                continue;
            vec s[ROWS][2];
            int row = r * ROWS, seen = sight(p, &a->ranges[r], key / COLUMNS + n) == EVERY ? EVERY : SOME;
            scores_of(p, a->q + row * D, D, a->h, a->t + row, key + n * COLUMNS, panels + n * COLUMNS * D,
                      a->first + row, a->last + row, seen, s);
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; i++) {
                real *out = a->tile + (row + i) * KEYS + n * COLUMNS;
                a->highest[row + i] = larger(larger(s[i][0], s[i][1]), a->highest[row + i]);
                STORE(out, s[i][0]);
                STORE(out + LANES, s[i][1]);
            }
        }
    largest_of(a->highest, a->factors);
    for (int i = 0; i < QUERIES; i += LANES) {
        vec before = LOAD(a->most_yet + i), now = larger(LOAD(a->factors + i), before);
        STORE(a->most_yet + i, now);
        STORE(a->factors + i, power_of_2(before - now));
    }
}

/* Scores become probabilities, up to the factor that a row's sum will be. */
static void exponentiate(Block *a)
{
    for (int r = 0; r < BLOCKS; r++) {
        if (a->from[r] >= a->to[r])
            continue;
        const real *high = a->most_yet + r * ROWS, *factors = a->factors + r * ROWS;
        vec sums[ROWS];
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++)
            sums[i] = a->sums[r * ROWS + i] * ALL(factors[i]);
        for (int j = a->from[r] * COLUMNS; j < a->to[r] * COLUMNS; j += LANES)
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; i++) {
                real *at = a->tile + (r * ROWS + i) * KEYS + j;
                vec e = power_of_2(LOAD(at) - ALL(high[i]));
                sums[i] += e;
                STORE(at, e);
            }
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++)
            a->sums[r * ROWS + i] = sums[i];
    }
}

static void add_values(const Plan *p, Block *a, int64_t key)
{
    int64_t D = p->D;
    const real *values = p->v_rows + (a->bg * p->S + key) * D;
    for (int r = 0; r < BLOCKS; r++)
        if (a->from[r] < a->to[r])
            add_products(a->tile + r * ROWS * KEYS + a->from[r] * COLUMNS, KEYS, 1, values + a->from[r] * COLUMNS * D,
                         (a->to[r] - a->from[r]) * COLUMNS, a->factors + r * ROWS, a->y + r * ROWS * D, D);
}

static void keep_block(const Plan *p, const Block *a)
{
    const Call *c = p->c;
    for (int64_t i = 0; i < QUERIES && a->t + i < c->T; i++) {
        real sum = 0;
        for (int l = 0; l < LANES; l++)
            sum += a->sums[i][l];
        c->logs[a->bh * c->T + a->t + i] = a->most_yet[i] + (real)log2(sum);
        copy_row(a->y + i * p->D, 1 / sum, c->D, c->D, (real *)at(c->y, c->y_steps, a->b, a->h, a->t + i));
    }
}

static void forward_task(void *job, int64_t task, real *room)
{
    const Plan *p = job;
    Block a;
    begin_block(p, &a, task, room);
    for (int64_t key = 0; key < p->S; key += KEYS)
        if (seen_panels(p, a.ranges, key, a.from, a.to)) {
            score(p, &a, key);
            exponentiate(&a);
            add_values(p, &a, key);
        }
    keep_block(p, &a);
}

void gptoss_attention_forward(const Call *c)
{
    Plan p = plan_of(c, 0);
    find_keys(&p);
    in_parallel(c->parallel, p.threads, pack_task, &p, c->B * c->G * p.S / KEYS, p.rooms, 0);
    in_parallel(c->parallel, p.threads, forward_task, &p, p.tasks, p.rooms, p.room_size);
}

/* --------------------------------------------------------------------------------- backward */
/* A text's head, in one thread's room: queries times the scale, the result's gradient and that of
   the queries [T, D]; logs and deltas [T]; probabilities and gradients of scores of a tile;
   gradients of the tile's keys and values [KEYS, D]; which keys each query and row block sees. */
typedef struct {
    int64_t b, h, bh, bg;
    real *q, *grad, *grad_q, *logs, *deltas, *p_tile, *s_tile, *grad_k, *grad_v;
    whole *first, *last;
    Range *ranges;
} Head;

static Head head_in(const Plan *p, int64_t b, int64_t h, real *room)
{
    const Call *c = p->c;
    Head a = {.b = b, .h = h, .bh = b * c->H + h, .bg = b * c->G + h / (c->H / c->G)};
    a.q = room, a.grad = a.q + p->T * p->D, a.grad_q = a.grad + p->T * p->D;
    a.logs = a.grad_q + p->T * p->D, a.deltas = a.logs + p->T;
    a.p_tile = a.deltas + p->T, a.s_tile = a.p_tile + QUERIES * KEYS;
    a.grad_k = a.s_tile + QUERIES * KEYS, a.grad_v = a.grad_k + KEYS * p->D;
    a.first = (whole *)(a.grad_v + KEYS * p->D), a.last = a.first + p->T;
    a.ranges = (Range *)(a.last + p->T);
    return a;
}

/* Copy the queries; find what their results and the sink say of all their scores. */
static void load_queries(const Plan *p, const Head *a)
{
    const Call *c = p->c;
    int64_t D = p->D;
    double sink = 0;
    ranges_of(c, a->b, 0, p->T, a->first, a->last, a->ranges);
    for (int64_t t = 0; t < p->T; t++) {
        int64_t count = t < c->T ? c->D : 0, later = least(t + ROWS_AHEAD, c->T - 1);
        real *grad = a->grad + t * D, delta = 0;
        prefetch(at(c->q, c->q_steps, a->b, a->h, later), count);
        prefetch(at(c->grad, c->grad_steps, a->b, a->h, later), count);
        prefetch(at(c->y, c->y_steps, a->b, a->h, later), count);
        copy_row(at(c->q, c->q_steps, a->b, a->h, t), p->scale, count, D, a->q + t * D);
        copy_row(at(c->grad, c->grad_steps, a->b, a->h, t), 1, count, D, grad);
        a->logs[t] = a->deltas[t] = 0;
        if (t >= c->T)
            continue;
        const real *y = at(c->y, c->y_steps, a->b, a->h, t);
        vec sum = ALL(0);
        int64_t d = 0;
        for (; d + LANES <= c->D; d += LANES)
            sum += LOAD(grad + d) * LOAD(y + d);
        for (int l = 0; l < LANES; l++)
            delta += sum[l];
        for (; d < c->D; d++)
            delta += grad[d] * y[d];
        a->deltas[t] = delta;
        a->logs[t] = c->logs[a->bh * c->T + t];
        if (c->sinks)
            sink -= exp2(c->sinks[a->h] / LN_2 - a->logs[t]) * delta;
    }
    if (c->grad_sinks)
        c->grad_sinks[a->bh] = sink;
    memset(a->grad_q, 0, p->T * D * sizeof(real));
}

/* Probabilities and gradients of the scores of a tile of which something is seen; 0 where not. */
static void differentiate(const Plan *p, const Head *a, int64_t t, int64_t key, const int *from, const int *to)
{
    int64_t D = p->D;
    const real *k_panels = p->k_panels + (a->bg * p->S + key) * D, *v_panels = p->v_panels + (a->bg * p->S + key) * D;
    for (int n = 0; n < PANELS; n++)
        for (int r = 0; r < BLOCKS; r++) {
            int64_t row = t + r * ROWS;
            real *ps = a->p_tile + r * ROWS * KEYS + n * COLUMNS, *ss = a->s_tile + r * ROWS * KEYS + n * COLUMNS;
            if (n < from[r] || n >= to[r]) {
                for (int i = 0; i < ROWS; i++)
                    for (int j = 0; j < COLUMNS; j += LANES) {
                        STORE(ps + i * KEYS + j, ALL(0));
                        STORE(ss + i * KEYS + j, ALL(0));
                    }
                continue;
            }
            vec s[ROWS][2];
            int seen = sight(p, &a->ranges[row / ROWS], key / COLUMNS + n) == EVERY ? EVERY : SOME;
            scores_of(p, a->q + row * D, D, a->h, row, key + n * COLUMNS, k_panels + n * COLUMNS * D, a->first + row,
                      a->last + row, seen, s);
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < 2; j++)
                    STORE(ps + i * KEYS + j * LANES, s[i][j]);
            clear(s);
            product(2, a->grad + row * D, D, 1, v_panels + n * COLUMNS * D, COLUMNS, D, s);
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < 2; j++) {
                    real *e = ps + i * KEYS + j * LANES;
                    vec share = power_of_2(LOAD(e) - ALL(a->logs[row + i]));
                    STORE(e, share);
                    STORE(ss + i * KEYS + j * LANES, share * (s[i][j] - ALL(a->deltas[row + i])));
                }
        }
}

/* Add what a tile gives to the gradients of its keys and values. */
static void add_to_keys(const Plan *p, const Head *a, int64_t t, const int *from, const int *to)
{
    int64_t D = p->D;
    for (int64_t i = 0; i < KEYS; i += ROWS) {
        int top = BLOCKS, bottom = 0;
        for (int r = 0; r < BLOCKS; r++)
            if (from[r] * COLUMNS < i + ROWS && to[r] * COLUMNS > i)
                top = least(top, r), bottom = r + 1;
        if (top >= bottom)
            continue;
        int64_t row = t + top * ROWS, depth = (bottom - top) * ROWS, first = top * ROWS * KEYS + i;
        add_products(a->p_tile + first, 1, KEYS, a->grad + row * D, depth, NULL, a->grad_v + i * D, D);
        add_products(a->s_tile + first, 1, KEYS, a->q + row * D, depth, NULL, a->grad_k + i * D, D);
    }
}

/* Add what a tile gives to the gradients of its queries; then to that of the bias. */
static void add_to_queries(const Plan *p, const Head *a, int64_t t, int64_t key, const int *from, const int *to)
{
    int64_t D = p->D;
    const real *k_rows = p->k_rows + (a->bg * p->S + key) * D;
    for (int r = 0; r < BLOCKS; r++)
        if (from[r] < to[r])
            add_products(a->s_tile + r * ROWS * KEYS + from[r] * COLUMNS, KEYS, 1, k_rows + from[r] * COLUMNS * D,
                         (to[r] - from[r]) * COLUMNS, NULL, a->grad_q + (t + r * ROWS) * D, D);
}

static void add_to_bias(const Plan *p, const Head *a, int64_t t, int64_t key, const int *from, const int *to)
{
    const Call *c = p->c;
    for (int64_t i = 0; i < QUERIES && t + i < c->T; i++) {
        real *out = c->grad_bias + (a->h * c->T + t + i) * c->S + key;
        int r = i / ROWS;
        for (int64_t j = from[r] * COLUMNS; j < least(to[r] * COLUMNS, c->S - key); j++)
            out[j] += a->s_tile[i * KEYS + j];
    }
}

/* Keep the gradients of a tile's keys and values. */
static void keep_keys(const Plan *p, const Head *a, int64_t key)
{
    const Call *c = p->c;
    if (c->H > c->G) {
        real *out = p->partial + (a->bh * 2 * p->S + key) * p->D;
        memcpy(out, a->grad_k, KEYS * p->D * sizeof(real));
        memcpy(out + p->S * p->D, a->grad_v, KEYS * p->D * sizeof(real));
        return;
    }
    for (int64_t s = 0; s < KEYS && key + s < c->S; s++) {
        int64_t to = ((a->b * c->S + key + s) * c->G + a->h) * c->D;
        copy_row(a->grad_k + s * p->D, LN_2, c->D, c->D, c->grad_k + to);
        copy_row(a->grad_v + s * p->D, 1, c->D, c->D, c->grad_v + to);
    }
}

static void keep_queries(const Plan *p, const Head *a)
{
    const Call *c = p->c;
    real scale = p->scale * (real)LN_2;
    for (int64_t t = 0; t < c->T; t++)
        copy_row(a->grad_q + t * p->D, scale, c->D, c->D, c->grad_q + ((a->b * c->T + t) * c->H + a->h) * c->D);
}


/* Sum the gradients of the keys and values that query heads share, in the order of the heads. The
   head that comes last does it. */
static void sum_heads(const Plan *p, int64_t b, int64_t g)
{
    const Call *c = p->c;
    int64_t J = c->H / c->G, step = 2 * p->S * p->D;
    if (J == 1 || atomic_fetch_add(&p->done[b * c->G + g], 1) + 1 < J)
        return;
    for (int is_v = 0; is_v < 2; is_v++)
        for (int64_t s = 0; s < c->S; s++) {
            real *from = p->partial + (b * c->H + g * J) * step + (is_v * p->S + s) * p->D;
            real *to = (is_v ? c->grad_v : c->grad_k) + ((b * c->S + s) * c->G + g) * c->D;
            for (int64_t j = 1; j < J; j++)
                for (int64_t d = 0; d < p->D; d += LANES)
                    STORE(from + d, LOAD(from + d) + LOAD(from + j * step + d));
            copy_row(from, is_v ? 1 : (real)LN_2, c->D, c->D, to);
        }
}

static void backward_head(const Plan *p, int64_t b, int64_t h, real *room)
{
    Head a = head_in(p, b, h, room);
    load_queries(p, &a);
    for (int64_t key = 0; key < p->S; key += KEYS) {
        memset(a.grad_k, 0, 2 * KEYS * p->D * sizeof(real));
        for (int64_t t = 0; t < p->T; t += QUERIES) {
            int from[BLOCKS], to[BLOCKS];
            if (!seen_panels(p, a.ranges + t / ROWS, key, from, to))
                continue;
            differentiate(p, &a, t, key, from, to);
            add_to_keys(p, &a, t, from, to);
            add_to_queries(p, &a, t, key, from, to);
            if (p->c->grad_bias)
                add_to_bias(p, &a, t, key, from, to);
        }
        keep_keys(p, &a, key);
    }
    keep_queries(p, &a);
    sum_heads(p, b, h / (p->c->H / p->c->G));
}

static void backward_task(void *job, int64_t task, real *room)
{
    const Plan *p = job;
    /* The gradient of a bias is a sum over texts: one thread does them in their order. */
    if (p->c->grad_bias)
        for (int64_t b = 0; b < p->c->B; b++)
            backward_head(p, b, task, room);
    else
        backward_head(p, task / p->c->H, task % p->c->H, room);
}

void gptoss_attention_backward(const Call *c)
{
    Plan p = plan_of(c, 1);
    memset(p.done, 0, c->B * c->G * sizeof(*p.done));
    find_keys(&p);
    in_parallel(c->parallel, p.threads, pack_task, &p, c->B * c->G * p.S / KEYS, p.rooms, 0);
    in_parallel(c->parallel, p.threads, backward_task, &p, p.tasks, p.rooms, p.room_size);
}
