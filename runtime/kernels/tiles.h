/* Vectors, and the products of small tiles that the C kernels of this folder are made of.

   One source for all builds: vectors are those of GCC and clang, of as many lanes as the processor
   has (16 floats with AVX-512, 8 with AVX2, 4 elsewhere). With GPTOSS_DOUBLE every real is a
   double: so tests compare derivatives with finite differences.

   A product out[i][n] = sum over k of a(i, k) b(k, n) is done a panel at a time: COLUMNS columns of
   b, copied to [k][COLUMNS], which stay in the first cache while all rows pass. A tile of ROWS rows
   and COLUMNS columns is summed in registers. Each element has one order of additions, along k,
   whatever rows are around it and whichever thread does it. */
#ifndef GPTOSS_TILES_H
#define GPTOSS_TILES_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef GPTOSS_DOUBLE
typedef double real;
typedef int64_t whole;
#define REAL_BYTES 8
#else
typedef float real;
typedef int32_t whole;
#define REAL_BYTES 4
#endif
/* Tests set it to others than the processor's. */
#if defined(VECTOR_BYTES)
#elif defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES (VECTOR_BYTES / REAL_BYTES)
/* A tile's sums fill most registers: 12 x 2 of 32, or 6 x 2 of 16. */
#if VECTOR_BYTES == 64 || defined(__aarch64__)
#define ROWS 12
#else
#define ROWS 6
#endif
#define COLUMNS (2 * LANES)
/* Of k, taken together: a panel is then 16 KB, or 32 with AVX-512. */
#define DEPTH (REAL_BYTES == 4 ? 256 : 128)

typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(REAL_BYTES), may_alias));
typedef whole ints __attribute__((vector_size(VECTOR_BYTES), aligned(REAL_BYTES), may_alias));
#define LOAD(p) (*(vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))
#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

/* Row l of the second operand is LANES + l. */
#if LANES == 16
#define LANE_LIST(F, d)                                                                                         \
    F(0, d), F(1, d), F(2, d), F(3, d), F(4, d), F(5, d), F(6, d), F(7, d), F(8, d), F(9, d), F(10, d),         \
        F(11, d), F(12, d), F(13, d), F(14, d), F(15, d)
#elif LANES == 8
#define LANE_LIST(F, d) F(0, d), F(1, d), F(2, d), F(3, d), F(4, d), F(5, d), F(6, d), F(7, d)
#elif LANES == 4
#define LANE_LIST(F, d) F(0, d), F(1, d), F(2, d), F(3, d)
#else
#define LANE_LIST(F, d) F(0, d), F(1, d)
#endif
/* x in all lanes. A sum with zeros is no broadcast: it would turn -0 to 0. */
#define SAME(l, x) x
INLINE vec all_of(real x) { return (vec){LANE_LIST(SAME, x)}; }
#define ALL(x) all_of((real)(x))
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* --------------------------------------------------------------------------------- functions */
/* A vector of the next values of a row of which `left` are left, then zeros. */
INLINE vec some(const real *from, int64_t left)
{
    if (left >= LANES)
        return LOAD(from);
    vec v = ALL(0);
    memcpy(&v, from, left * sizeof(real));
    return v;
}

/* Write a vector's first `left` values. */
INLINE void put(real *to, vec v, int64_t left)
{
    if (left >= LANES)
        STORE(to, v);
    else
        memcpy(to, &v, left * sizeof(real));
}

/* Do something for the vectors of `count` numbers from i on; only the last may have `left` < LANES. It is
   written out twice, so no break or continue. */
#define FOR_VECTORS(count, ...)                                                                                 \
    {                                                                                                           \
        int64_t i = 0;                                                                                          \
        for (; i + LANES <= (count); i += LANES) {                                                              \
            enum { left = LANES };                                                                              \
            __VA_ARGS__                                                                                         \
        }                                                                                                       \
        if (i < (count)) {                                                                                      \
            int64_t left = (count) - i;                                                                         \
            __VA_ARGS__                                                                                         \
        }                                                                                                       \
    }

INLINE real sum_of(vec v)
{
    real sum = 0;
    for (int l = 0; l < LANES; l++)
        sum += v[l];
    return sum;
}

/* The larger of x and the bound; what is not a number stays so. */
INLINE vec at_least(vec x, real bound)
{
    vec b = ALL(bound);
    ints below = x < b;
    return (vec)(((ints)x & ~below) | ((ints)b & below));
}

/* The smaller of x and the bound; what is not a number stays so. */
INLINE vec at_most(vec x, real bound) { return -at_least(-x, -bound); }

/* x where the mask is set, else y. */
INLINE vec choose(ints mask, vec x, vec y) { return (vec)(((ints)x & mask) | ((ints)y & ~mask)); }

/* e^x of each lane for x <= 88 (and e^-87 below -87), to 2 units in the last place: 2^n times a
   polynomial of the rest, |rest| <= ln 2 / 2. */
INLINE vec exp_of(vec x)
{
#ifdef GPTOSS_DOUBLE
    for (int l = 0; l < LANES; l++)
        x[l] = exp(x[l]);
    return x;
#else
    x = at_least(x, -87.0f);
    /* Rounded: 1.5 * 2^23 leaves no bits after the point. */
    vec turns = x * ALL(1.44269504f) + ALL(12582912.0f) - 12582912.0f;
    vec r = turns * ALL(2.12194440e-4f) + (turns * ALL(-0.693359375f) + x), p = ALL(1.98756915e-4f);
    p = p * r + ALL(1.39819995e-3f);
    p = p * r + ALL(8.33345191e-3f);
    p = p * r + ALL(4.16657959e-2f);
    p = p * r + ALL(1.66666655e-1f);
    p = p * r + ALL(0.5f);
    return (p * r * r + r + 1.0f) * (vec)((__builtin_convertvector(turns, ints) + 127) << 23);
#endif
}

/* 1 / (1 + e^-x). */
INLINE vec sigmoid_of(vec x) { return 1 / (1 + exp_of(-at_least(x, -80))); }

/* e^(-x^2 / 2), and the share of a normal distribution that lies below x. The share's tail is
   e^(-z^2) g(z) / 2 with z = |x| / sqrt 2; g is a polynomial in 1 / (1 + z / 2), fitted to
   e^(z^2) erfc(z) for z up to 6.6 with a relative error of 3e-8. */
INLINE vec normal_share(vec x, vec *density)
{
    ints sign = (ints)x & (ints)ALL(-0.0);
    vec size = (vec)((ints)x ^ sign), share;
    *density = exp_of(at_least(size * size * ALL(-0.5), -87));
#ifdef GPTOSS_DOUBLE
    for (int l = 0; l < LANES; l++)
        share[l] = 0.5 * erfc(-x[l] * 0.70710678118654752440);
#else
    vec t = 1 / (size * ALL(0.35355339f) + 1), p = ALL(-2.793396582e-02f);
    p = p * t + ALL(2.278435094e-01f);
    p = p * t + ALL(-6.489623826e-01f);
    p = p * t + ALL(7.225853414e-01f);
    p = p * t + ALL(-1.881516094e-01f);
    p = p * t + ALL(3.745480405e-01f);
    p = p * t + ALL(2.549156477e-01f);
    p = p * t + ALL(2.853189398e-01f);
    p = p * t + ALL(-1.634239088e-04f);
    vec tail = p * *density * ALL(0.5f);
    share = choose(x > 0, 1 - tail, tail);
#endif
    return share;
}

/* --------------------------------------------------------------------------------- one tile */
/* sums[i][j] += sum over k < depth of a[i][k * step] * panel[k * panel_step + j], for `rows` rows
   and `vectors` vectors of columns. These two and `step` are constants where this is inlined. */
INLINE void tile(const int rows, const int vectors, const real *const *a, const int64_t step, const real *panel,
                 const int64_t panel_step, int64_t depth, vec sums[ROWS][2])
{
    for (int64_t k = 0; k < depth; k++) {
        vec b[2];
        for (int j = 0; j < vectors; j++)
            b[j] = LOAD(panel + k * panel_step + j * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            vec x = ALL(a[i][k * step]);
            for (int j = 0; j < vectors; j++)
                sums[i][j] += x * b[j];
        }
    }
}

/* --------------------------------------------------------------------------------- packing */
/* panel[k][j] = rows[k][at + j] for `depth` rows of `columns` values; zeros up to COLUMNS. */
__attribute__((noinline))
static void pack(const real *const *rows, int64_t at, int64_t depth, int64_t columns, real *panel)
{
    if (columns >= COLUMNS)
        for (int64_t k = 0; k < depth; k++)
            for (int j = 0; j < 2; j++) {
                /* The next panel's lines lie far apart, where the processor expects none. */
                __builtin_prefetch(rows[k] + at + COLUMNS + j * LANES, 0, 2);
                STORE(panel + k * COLUMNS + j * LANES, LOAD(rows[k] + at + j * LANES));
            }
    else
        for (int64_t k = 0; k < depth; k++) {
            memset(panel + k * COLUMNS, 0, COLUMNS * sizeof(real));
            memcpy(panel + k * COLUMNS, rows[k] + at, columns * sizeof(real));
        }
}

/* Turn LANES vectors into those of their lanes. */
INLINE void transpose(vec v[LANES])
{
#define LOW(l, d) ((l) & (d) ? LANES + (l) - (d) : (l))
#define HIGH(l, d) ((l) & (d) ? LANES + (l) : (l) + (d))
#define STAGE(d)                                                                                                \
    for (int i = 0; i < LANES; i++)                                                                             \
        if (!(i & (d))) {                                                                                       \
            vec low = SHUFFLE(v[i], v[i + (d)], LANE_LIST(LOW, d));                                             \
            v[i + (d)] = SHUFFLE(v[i], v[i + (d)], LANE_LIST(HIGH, d));                                         \
            v[i] = low;                                                                                         \
        }
#if LANES == 16
    STAGE(8)
#endif
#if LANES >= 8
    STAGE(4)
#endif
#if LANES >= 4
    STAGE(2)
#endif
    STAGE(1)
}

/* panel[k][j] = w[j * step + k] for k < depth and j < columns; zeros up to COLUMNS. */
__attribute__((noinline))
static void pack_transposed(const real *w, int64_t step, int64_t depth, int64_t columns, real *panel)
{
    for (int half = 0; half < 2; half++) {
        int64_t first = half * LANES, k = 0;
        if (columns - first >= LANES)
            for (; k + LANES <= depth; k += LANES) {
                vec v[LANES];
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++)
                    v[j] = LOAD(w + (first + j) * step + k);
                transpose(v);
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++)
                    STORE(panel + (k + j) * COLUMNS + first, v[j]);
            }
        for (; k < depth; k++)
            for (int64_t j = first; j < first + LANES; j++)
                panel[k * COLUMNS + j] = j < columns ? w[j * step + k] : 0;
    }
}

/* packed[k][i] = rows[k][at + i] for i < ROWS, zeros from `width` on: `a` of a product that sums
   over rows. Writes up to LANES values past its end. */
__attribute__((noinline))
static void pack_rows(const real *const *rows, int64_t at, int64_t depth, int64_t width, real *packed)
{
    if (width >= rounded_up(ROWS, LANES))
        for (int64_t k = 0; k < depth; k++)
            /* What the last vector has too much, the next row writes over. */
            for (int i = 0; i < ROWS; i += LANES)
                STORE(packed + k * ROWS + i, LOAD(rows[k] + at + i));
    else
        for (int64_t k = 0; k < depth; k++)
            for (int i = 0; i < ROWS; i++)
                packed[k * ROWS + i] = i < width ? rows[k][at + i] : 0;
}

/* --------------------------------------------------------------------------------- panels */
/* How a tile begins: at 0, at the bias of its columns, or at what is there. */
enum { ZERO, BIAS, SUM };

/* Put `count` rows of `columns` sums, COLUMNS apart, where they belong. */
__attribute__((noinline))
static void put_sums(int begin, const real *sums, const real *bias, int64_t count, int64_t columns,
                                               real *out, int64_t out_step)
{
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < columns; j++) {
            real *to = out + i * out_step + j, value = sums[i * COLUMNS + j];
            *to = begin == SUM ? *to + value : begin == BIAS ? bias[j] + value : value;
        }
}

/* `count` of `rows` rows times a panel, into `columns` values of each out + i * out_step. */
INLINE void tile_to(const int rows, const int vectors, const real *const *a, const int64_t step, const real *panel,
                    int64_t depth, int begin, const real *bias, real *out, int64_t out_step, int64_t count,
                    int64_t columns)
{
    vec sums[ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++)
            sums[i][j] = ALL(0);
    tile(rows, vectors, a, step, panel, COLUMNS, depth, sums);
    if (count == rows && columns == vectors * LANES && begin == ZERO) {
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++)
                STORE(out + i * out_step + j * LANES, sums[i][j]);
        return;
    }
    if (count == rows && columns == vectors * LANES && begin == SUM) {
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++) {
                real *to = out + i * out_step + j * LANES;
                STORE(to, LOAD(to) + sums[i][j]);
            }
        return;
    }
    real room[ROWS * COLUMNS];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++)
            STORE(room + i * COLUMNS + j * LANES, sums[i][j]);
    put_sums(begin, room, bias, count, columns, out, out_step);
}

/* `count` rows a[i] + at times a panel, into `columns` values of each out + i * out_step. bias: of
   these columns, where `begin` says so. */
#define TILES(NAME, STEP)                                                                                       \
    INLINE void NAME##_of(const int vectors, int begin, int64_t count, const real *const *a, int64_t at,        \
                          const real *panel, int64_t depth, const real *bias, real *out, int64_t out_step,      \
                          int64_t columns)                                                                      \
    {                                                                                                           \
        for (int64_t i = 0; i < count; i += ROWS) {                                                             \
            int64_t left = least(count - i, ROWS);                                                              \
            const real *from[ROWS];                                                                             \
            real *to = out + i * out_step;                                                                      \
            for (int r = 0; r < ROWS; r++)                                                                      \
                /* Rows that are missing repeat the last one, and are not kept. */                              \
                from[r] = STEP == 1 ? a[i + least(r, left - 1)] + at : a[0] + i * depth + r;                    \
            if (left > ROWS * 2 / 3)                                                                            \
                tile_to(ROWS, vectors, from, STEP, panel, depth, begin, bias, to, out_step, left, columns);     \
            else if (left > ROWS / 3)                                                                           \
                tile_to(ROWS * 2 / 3, vectors, from, STEP, panel, depth, begin, bias, to, out_step, left,       \
                        columns);                                                                               \
            else                                                                                                \
                tile_to(ROWS / 3, vectors, from, STEP, panel, depth, begin, bias, to, out_step, left, columns); \
        }                                                                                                       \
    }                                                                                                           \
    __attribute__((noinline)) static void NAME(int begin, int64_t count, const real *const *a, int64_t at,      \
                                               const real *panel, int64_t depth, const real *bias, real *out,   \
                                               int64_t out_step, int64_t columns)                               \
    {                                                                                                           \
        if (columns > LANES)                                                                                    \
            NAME##_of(2, begin, count, a, at, panel, depth, bias, out, out_step, columns);                      \
        else                                                                                                    \
            NAME##_of(1, begin, count, a, at, panel, depth, bias, out, out_step, columns);                      \
    }
/* a[i]: each row, along k. */
TILES(rows_times, 1)
/* a[0]: what `pack_rows` made of all rows, ROWS of them after `depth` times ROWS values. */
TILES(packed_times, ROWS)

/* --------------------------------------------------------------------------------- products */
/* Of a weight's gradient: columns whose panels are kept, and tiles of rows that pass each panel. */
#define WIDTH (REAL_BYTES == 4 ? 256 : 128)
#define TILES_AT_ONCE 8
/* Values of room that `sum_over_rows` needs. */
#define SUM_ROOM ((WIDTH + TILES_AT_ONCE * ROWS) * DEPTH + LANES)

typedef struct {
    const real *weight;
    int64_t step, K, N;
    int is_transposed;          /* weight[n * step + k], else weight[k * step + n] */
} Factor;

/* out[i][n] = bias[n] + sum over k of rows[i][k] * factor(k, n). panel: room. */
__attribute__((unused))
static void product_with(const Factor *f, int64_t count, const real *const *rows, const real *bias, real *out,
                         int64_t out_step, real *panel)
{
    for (int64_t n = 0; n < f->N; n += COLUMNS) {
        int64_t columns = least(f->N - n, COLUMNS);
        real edge[COLUMNS] = {0};
        const real *begin = bias ? bias + n : NULL;
        if (bias && columns < COLUMNS)
            begin = memcpy(edge, bias + n, columns * sizeof(real));
        for (int64_t k = 0; k < f->K; k += DEPTH) {
            int64_t depth = least(f->K - k, DEPTH);
            if (f->is_transposed)
                pack_transposed(f->weight + n * f->step + k, f->step, depth, columns, panel);
            else {
                const real *lines[DEPTH];
                for (int64_t d = 0; d < depth; d++)
                    lines[d] = f->weight + (k + d) * f->step;
                pack(lines, n, depth, columns, panel);
            }
            rows_times(k ? SUM : bias ? BIAS : ZERO, count, rows, k, panel, depth, begin, out + n, out_step,
                       columns);
        }
    }
}

/* out[m][n] = sum over rows r of a[r][m] * b[r][n], for m from `first` to `end`; with `add` that is
   added to what is there. room: SUM_ROOM. */
__attribute__((unused))
static void sum_over_rows(int add, int64_t count, const real *const *a, int64_t first, int64_t end,
                          const real *const *b, int64_t N, real *out, real *room)
{
    real *packed = room + WIDTH * DEPTH;
    for (int64_t k = 0; k < count; k += DEPTH) {
        int64_t depth = least(count - k, DEPTH);
        for (int64_t w = 0; w < N; w += WIDTH) {
            int64_t width = least(N - w, WIDTH);
            for (int64_t n = 0; n < width; n += COLUMNS)
                pack(b + k, w + n, depth, least(width - n, COLUMNS), room + n * depth);
            for (int64_t m = first; m < end; m += TILES_AT_ONCE * ROWS) {
                int64_t high = least(end - m, TILES_AT_ONCE * ROWS);
                for (int64_t i = 0; i < high; i += ROWS)
                    pack_rows(a + k, m + i, depth, end - m - i, packed + i * depth);
                const real *from = packed;
                for (int64_t n = 0; n < width; n += COLUMNS)
                    packed_times(k || add ? SUM : ZERO, high, &from, 0, room + n * depth, depth, NULL,
                                 out + m * N + w + n, N, least(width - n, COLUMNS));
            }
        }
    }
}

/* --------------------------------------------------------------------------------- threads */
/* Do task 0 .. tasks - 1 of a job, each by one thread with a room of its own. */
typedef void (*Task)(void *job, int64_t task, real *room);
/* GOMP_parallel of PyTorch's own OpenMP, whose threads are awake already, or NULL. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

typedef struct {
    Task task;
    void *job;
    int64_t tasks, room_size;
    real *rooms;
    int threads;
    atomic_llong next;
    atomic_int arrived;
} Team;

static void work(void *argument)
{
    Team *team = argument;
    int me = atomic_fetch_add(&team->arrived, 1);
    if (me >= team->threads)
        return;
    for (int64_t t; (t = atomic_fetch_add(&team->next, 1)) < team->tasks;)
        team->task(team->job, t, team->rooms + me * team->room_size);
}

static void *work_in_thread(void *team)
{
    work(team);
    return NULL;
}

/* Threads for so many multiply-adds: another one wants some to be worth waking. On a virtual machine
   that costs as much as some millions of them. */
#ifndef WORTH_A_THREAD
#define WORTH_A_THREAD (1 << 21)
#endif
INLINE int threads_for(int64_t threads, int64_t products) { return (int)least(threads, 1 + products / WORTH_A_THREAD); }

/* rooms: room_size values for each thread. Which thread does a task must not matter. */
static void in_parallel(Parallel parallel, int threads, Task task, void *job, int64_t tasks, real *rooms,
                        int64_t room_size)
{
    enum { MOST_THREADS = 256 };
    Team team = {.task = task, .job = job, .tasks = tasks, .room_size = room_size, .rooms = rooms,
                 .threads = (int)least(least(threads, MOST_THREADS), most(tasks, 1))};
    atomic_init(&team.next, 0);
    atomic_init(&team.arrived, 0);
    if (team.threads == 1) {
        work(&team);
        return;
    }
    if (parallel) {
        parallel(work, &team, team.threads, 0);
        return;
    }
    pthread_t others[MOST_THREADS];
    int made = 1;
    while (made < team.threads && !pthread_create(&others[made], NULL, work_in_thread, &team))
        made++;
    work(&team);
    for (int t = 1; t < made; t++)
        pthread_join(others[t], NULL);
}
#endif
