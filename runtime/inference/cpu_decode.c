/* A forward pass of a few tokens on a CPU, at the speed at which their weights can be read.

   The same mathematics as model_parts.py and model.py in float32, over the plain model's own
   parameters and the plain KV cache (runtime/inference/cpu_decode.py passes the pointers). A token
   is a row: an id, a position, and the cache it belongs to. One row, the next rows of many texts,
   or some following rows of one text are the same to this code. Threads share each matrix by its
   output rows and meet at a barrier between steps.

   A row's numbers are the same bits whatever other rows the pass has, however its text was cut into
   passes, and on any number of threads. So every sum has one order, whichever function computes it:
   one accumulator of LANES lanes from the beginning on, then `sum_of`, then what does not fill a
   vector. Nothing is left to the compiler: each multiply-add is written as one (FMA), and
   cpu_decode.py forbids others (-ffp-contract=off).

   Letters as in model_parts.py: C d_model, L blocks, H query heads, G key/value heads, D head_dim,
   E experts, K top_k, F d_ff, V vocabulary; n rows. Weights are [outputs, inputs], row by row. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE  /* sched_getcpu, cpu_set_t */
#endif
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t four_ints __attribute__((vector_size(16)));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(TYPE, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(TYPE, a, b, ...) __builtin_shuffle(a, b, (TYPE){__VA_ARGS__})
#endif
/* a * b + c, rounded once where the processor can: of a vector, four floats, one. */
#if defined(__AVX512F__) && defined(__FMA__)
#define FMA(a, b, c) ((vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#elif defined(__AVX2__) && defined(__FMA__)
#define FMA(a, b, c) ((vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#elif defined(__aarch64__)
#define FMA(a, b, c) fma_of_halves(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif
#if defined(__AVX2__) && defined(__FMA__)
#define FMA4(a, b, c) ((four)_mm_fmadd_ps((__m128)(a), (__m128)(b), (__m128)(c)))
#elif defined(__aarch64__)
#define FMA4(a, b, c) ((four)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define FMA4(a, b, c) ((a) * (b) + (c))
#endif
#if defined(__AVX2__) && defined(__FMA__) || defined(__aarch64__)
#define FMA1(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA1(a, b, c) ((a) * (b) + (c))
#endif
#define ALL(x) ((vec){0} + (x))
#define LOAD_FLOATS(p) (*(const vec *)(p))
#if defined(__AVX512F__)    /* gcc 12 does the last line byte by byte */
#define LOAD_BYTES(p) ((vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p)))))
#elif defined(__AVX2__)
#define LOAD_BYTES(p) ((vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p)))))
#else
#define LOAD_BYTES(p) __builtin_convertvector(__builtin_convertvector(*(const bytes *)(p), ints), vec)
#endif
#define MOST_THREADS 256
#define TILE 4              /* weight rows taken together */
/* Bytes by which weights are prefetched before their use: the processor itself does not prefetch
   across the end of a short row. */
#define AHEAD 1024
#define GROUP 64            /* rows taken together: they stay in the cache with the weight rows */

enum { GELU, SWIGLU, SWIGLU_CLAMPED };
#define LIMIT 7.0f          /* of SWIGLU_CLAMPED, as in config_model.py */
#define STEEPNESS 1.702f

typedef struct {            /* float, or with scale: int8 times the scale of its row */
    const void *weight;
    const float *scale, *bias;   /* bias [rows] or NULL */
    int32_t rows, cols;
} Matrix;

/* Pointers that may be NULL: q_norm, k_norm, router_bias, selection_bias, attention_bias, sinks. */
typedef struct {
    const float *norm1, *norm2, *q_norm, *k_norm, *router, *router_bias, *selection_bias, *attention_bias, *sinks;
    Matrix q, k, v, out, w_in, w_out;   /* w_in, w_out: of all experts, stacked */
    int32_t window, capacity, is_ring, unused;
} Block;

typedef struct {
    /* activation: GELU ...; table: side of the learned attention biases. */
    int32_t C, L, H, G, D, V, E, K, F, activation, table, threads;
    float eps;
    int32_t unused;
    const float *norm;
    Matrix embed, head;
    const Block *blocks;
    const float *cos, *sin;  /* [positions, D], or NULL: no rotation */
} Model;

typedef struct {
    const Model *m;
    int32_t n, num_logits;
    const int64_t *ids;         /* [n] */
    const int32_t *positions;   /* [n] */
    const int32_t *caches;      /* [n] which cache a row belongs to */
    float *const *keys, *const *values;  /* [caches, L]: each [G, capacity, D] */
    const int32_t *logit_rows;  /* [num_logits] rows whose logits are wanted */
    float *logits;              /* [num_logits, V], or with targets room for [GROUP, V] */
    /* NULL, or [num_logits]: the most likely ids, and their log-probabilities. */
    int32_t *best;
    double *best_log_probs;
    /* NULL, or with these and instead of logits: the ids that are scored, their log-probabilities. */
    const int32_t *targets;
    double *log_probs;
    /* NULL, or [L, n, K]: the experts of each row, strongest first, and their routing weights. */
    int32_t *experts;
    float *weights;
    /* working memory */
    /* [n, C], [n, max(C, H * D)], [n, H * D], [n, G * D] twice, [n * K, F] twice */
    float *x, *y, *q, *k, *v, *h, *up;
    int32_t *chosen, *order, *starts;    /* [n * K], [n * K] assignments by expert, [E + 1] */
    float *gate, *private;               /* [n * K]; per thread: scores and unpacked weights */
    int64_t private_floats;
    int32_t team;               /* threads at work */
    atomic_int arrived, phase;  /* of the barrier; phase -1 while threads are being started */
    int32_t unused;
} Pass;

static void barrier(Pass *p)
{
    int phase = atomic_load(&p->phase);
    if (atomic_fetch_add(&p->arrived, 1) + 1 == p->team) {
        atomic_store(&p->arrived, 0);
        atomic_fetch_add(&p->phase, 1);
        return;
    }
    for (int turns = 0; atomic_load(&p->phase) == phase;)
        if (++turns > 2000)
            sched_yield();
}

static int least(int a, int b) { return a < b ? a : b; }

/* The part of `count` that thread t of `threads` does, in whole units. */
static void share(int count, int unit, int t, int threads, int *begin, int *end)
{
    int units = (count + unit - 1) / unit;
    *begin = least(count, (int)((int64_t)units * t / threads) * unit);
    *end = least(count, (int)((int64_t)units * (t + 1) / threads) * unit);
}

#if defined(__aarch64__)
static vec fma_of_halves(vec a, vec b, vec c)
{
    float32x4_t x[2], y[2], z[2];
    memcpy(x, &a, sizeof(a));
    memcpy(y, &b, sizeof(b));
    memcpy(z, &c, sizeof(c));
    for (int i = 0; i < 2; i++)
        z[i] = vfmaq_f32(z[i], x[i], y[i]);
    memcpy(&c, z, sizeof(c));
    return c;
}
#endif

/* Add the four quarters of a vector (halves on 8 lanes). The order of additions is spelled out,
   because a compiler may not choose it. */
static four fold(vec a)
{
    four q[LANES / 4];
    memcpy(q, &a, sizeof(a));
#if LANES == 16
    return (q[0] + q[2]) + (q[1] + q[3]);
#else
    return q[0] + q[1];
#endif
}

static float sum_of(vec a)
{
    four s = fold(a);
    return (s[0] + s[2]) + (s[1] + s[3]);
}

/* `sum_of` of four vectors. */
static four sums_of(vec a, vec b, vec c, vec d)
{
    four x = fold(a), y = fold(b), z = fold(c), w = fold(d);
    four xy = SHUFFLE(four_ints, x, y, 0, 1, 4, 5) + SHUFFLE(four_ints, x, y, 2, 3, 6, 7);
    four zw = SHUFFLE(four_ints, z, w, 0, 1, 4, 5) + SHUFFLE(four_ints, z, w, 2, 3, 6, 7);
    return SHUFFLE(four_ints, xy, zw, 0, 2, 4, 6) + SHUFFLE(four_ints, xy, zw, 1, 3, 5, 7);
}

/* `sum_of` of as many vectors as lanes, s[j][i]; the sum of s[j][i] is lane TILE * j + i. The same
   additions as there, for all vectors at once: halves, quarters, eighths, ... of two of them. */
#if LANES == 16
#define INPUTS 4            /* of a tile */
#define EACH_FOUR(a, b, c, d) a, b, c, d, 4 + a, 4 + b, 4 + c, 4 + d, 8 + a, 8 + b, 8 + c, 8 + d, 12 + a, 12 + b, 12 + c, 12 + d
#define HALVES(a, b)                                                                                            \
    (SHUFFLE(ints, a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                              \
     SHUFFLE(ints, a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define QUARTERS(a, b)                                                                                          \
    (SHUFFLE(ints, a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +                            \
     SHUFFLE(ints, a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
#define FOLDED(s, i) QUARTERS(HALVES(s[0][i], s[1][i]), HALVES(s[2][i], s[3][i]))
#else
#define INPUTS 2
#define EACH_FOUR(a, b, c, d) a, b, c, d, 4 + a, 4 + b, 4 + c, 4 + d
#define FOLDED(s, i) (SHUFFLE(ints, s[0][i], s[1][i], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(ints, s[0][i], s[1][i], 4, 5, 6, 7, 12, 13, 14, 15))
#endif

static vec sums_of_all(vec s[INPUTS][TILE])
{
    vec a = FOLDED(s, 0), b = FOLDED(s, 1), c = FOLDED(s, 2), d = FOLDED(s, 3);
    vec ab = SHUFFLE(ints, a, b, EACH_FOUR(0, 1, LANES, LANES + 1)) + SHUFFLE(ints, a, b, EACH_FOUR(2, 3, LANES + 2, LANES + 3));
    vec cd = SHUFFLE(ints, c, d, EACH_FOUR(0, 1, LANES, LANES + 1)) + SHUFFLE(ints, c, d, EACH_FOUR(2, 3, LANES + 2, LANES + 3));
    return SHUFFLE(ints, ab, cd, EACH_FOUR(0, 2, LANES, LANES + 2)) + SHUFFLE(ints, ab, cd, EACH_FOUR(1, 3, LANES + 1, LANES + 3));
}

/* The larger of x and the bound; what is not a number stays so. */
static vec at_least(vec x, float bound)
{
    vec b = (vec){0} + bound;
    ints below = x < b;
    return (vec)(((ints)x & ~below) | ((ints)b & below));
}

/* e^x of each lane for x <= 88 (and e^-87 below -87), to 2 units in the last place: 2^n times a
   polynomial of the rest, |rest| <= ln 2 / 2. */
static vec exp_of(vec x)
{
    x = at_least(x, -87.0f);
    /* Rounded: 1.5 * 2^23 leaves no bits after the point. */
    vec whole = FMA(x, ALL(1.44269504f), ALL(12582912.0f)) - 12582912.0f;
    vec r = FMA(whole, ALL(2.12194440e-4f), FMA(whole, ALL(-0.693359375f), x)), p = ALL(1.98756915e-4f);
    p = FMA(p, r, ALL(1.39819995e-3f));
    p = FMA(p, r, ALL(8.33345191e-3f));
    p = FMA(p, r, ALL(4.16657959e-2f));
    p = FMA(p, r, ALL(1.66666655e-1f));
    p = FMA(p, r, ALL(0.5f));
    return (FMA(p * r, r, r) + 1.0f) * (vec)((__builtin_convertvector(whole, ints) + 127) << 23);
}

/* e^x of what is added to a sum, for x <= 0: 0 where that is below 1e-38. */
static vec share_of(vec x) { return (vec)((ints)exp_of(x) & ~(x < (vec){0} - 87.0f)); }

static float dot(const float *a, const float *b, int count)
{
    vec s = {0};
    int i = 0;
    for (; i + LANES <= count; i += LANES)
        s = FMA(LOAD_FLOATS(a + i), LOAD_FLOATS(b + i), s);
    float sum = sum_of(s);
    for (; i < count; i++)
        sum = FMA1(a[i], b[i], sum);
    return sum;
}

static void rms_norm(const float *x, const float *weight, float eps, int count, float *out)
{
    float scale = 1.0f / sqrtf(dot(x, x, count) / count + eps);
    for (int i = 0; i < count; i++)
        out[i] = x[i] * scale * weight[i];
}

/* ------------------------------------------------------------------------------ matrix products */
/* `dot` of 4 inputs and TILE weight rows. */
static void tile(const float *const w[TILE], const float *const x[4], int cols, float sums[4][TILE])
{
    int whole = cols / LANES * LANES;
    for (int j = 0; j < 4; j += INPUTS) {
        vec s[INPUTS][TILE] = {0};
        for (int k = 0; k < whole; k += LANES)
            for (int l = 0; l < INPUTS; l++)
                for (int i = 0; i < TILE; i++)
                    s[l][i] = FMA(LOAD_FLOATS(w[i] + k), LOAD_FLOATS(x[j + l] + k), s[l][i]);
        *(vec *)sums[j] = sums_of_all(s);
    }
    for (int rest = whole; rest < cols; rest++)
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < TILE; i++)
                sums[j][i] = FMA1(w[i][rest], x[j][rest], sums[j][i]);
}

/* Row `row` of a matrix as floats without its row scale: where it is, or unpacked into `room`. */
static const float *row_of(const Matrix *a, int64_t row, float *room)
{
    int cols = a->cols, i = 0;
    if (!a->scale)
        return (const float *)a->weight + row * cols;
    const int8_t *w = (const int8_t *)a->weight + row * cols;
    for (; i + LANES <= cols; i += LANES)
        *(vec *)(room + i) = LOAD_BYTES(w + i);
    for (; i < cols; i++)
        room[i] = w[i];
    return room;
}

/* `dot` of NX inputs and ROWS weight rows far apart: a few long streams come from memory twice as
   fast as adjacent rows. An input alone takes four, so that enough sums are under way. */
#define FAR_PRODUCT(NAME, TYPE, LOAD, NX, ROWS)                                                                 \
    static void NAME(const TYPE *const *w, const float *const x[NX], int cols, float sums[ROWS][4])             \
    {                                                                                                           \
        vec s[ROWS][NX] = {0};                                                                                  \
        int k = 0;                                                                                              \
        for (; k + LANES <= cols; k += LANES) {                                                                 \
            if (!(k & (64 / sizeof(TYPE) - 1)))    /* a line of the cache */                                    \
                for (int i = 0; i < ROWS; i++)                                                                  \
                    __builtin_prefetch((const char *)(w[i] + k) + AHEAD);                                       \
            for (int i = 0; i < ROWS; i++)                                                                      \
                for (int j = 0; j < NX; j++)                                                                    \
                    s[i][j] = FMA(LOAD(w[i] + k), LOAD_FLOATS(x[j] + k), s[i][j]);                              \
        }                                                                                                       \
        for (int i = 0; i < ROWS; i++)                                                                          \
            for (int j = 0; j < NX; j++) {                                                                      \
                sums[i][j] = sum_of(s[i][j]);                                                                   \
                for (int rest = k; rest < cols; rest++)                                                         \
                    sums[i][j] = FMA1(w[i][rest], x[j][rest], sums[i][j]);                                      \
            }                                                                                                   \
    }
FAR_PRODUCT(floats_by_1, float, LOAD_FLOATS, 1, 4)
FAR_PRODUCT(floats_by_4, float, LOAD_FLOATS, 4, 2)
FAR_PRODUCT(bytes_by_1, int8_t, LOAD_BYTES, 1, 4)
FAR_PRODUCT(bytes_by_4, int8_t, LOAD_BYTES, 4, 2)

/* out[j][r] = value, or += factor[j] * value, for the sum sums[j * step] of weights of `row` times
   input j; r: the row's index in the output. */
static void put(const Matrix *a, int64_t row, int r, const float *sums, int step, int nx, float *const *out, const float *factor)
{
    float scale = a->scale ? a->scale[row] : 1.0f, bias = a->bias ? a->bias[row] : 0.0f;
    for (int j = 0; j < least(nx, 4); j++) {
        float value = FMA1(sums[j * step], scale, bias);
        out[j][r] = factor ? FMA1(factor[j], value, out[j][r]) : value;
    }
}

/* `put` of TILE rows. */
static void put_tile(const Matrix *a, int64_t row, int r, float sums[4][TILE], int nx, float *const *out, const float *factor)
{
    four scale = (four){0} + 1.0f, bias = {0};
    if (a->scale)
        scale = *(const four *)(a->scale + row);
    if (a->bias)
        bias = *(const four *)(a->bias + row);
    for (int j = 0; j < least(nx, 4); j++) {
        four value = FMA4(*(four *)sums[j], scale, bias), *to = (four *)(out[j] + r);
        if (factor)
            value = FMA4((four){0} + factor[j], value, *to);
        *to = value;
    }
}

/* Rows first + [begin, end) of `a` times the inputs x[j], put into out[j] from `begin` on. */
static void product(const Matrix *a, int64_t first, int begin, int end, const float *const *x, int nx, float *const *out,
                    const float *factor, float *room)
{
    int cols = a->cols, few = nx <= 8, rows = few && nx > 1 ? 2 : TILE, part = (end - begin + rows - 1) / rows;
    for (int i = 0; i < (few ? part : end - begin); i += few ? 1 : TILE) {
        const float *w[TILE];
        const int8_t *packed[TILE];
        int r[TILE];
        for (int l = 0; l < rows; l++) {
            r[l] = begin + i + (few ? l * part : l);
            /* Beyond the end the last row is computed again, and not put. */
            int64_t row = first + least(r[l], end - 1);
            if (few)
                packed[l] = (const int8_t *)a->weight + row * cols;
            if (!few || !a->scale)
                w[l] = row_of(a, row, room + (int64_t)l * cols);
        }
        for (int j = 0; j < nx; j += 4) {
            float sums[4][4];
            const float *inputs[4] = {x[j], x[least(j + 1, nx - 1)], x[least(j + 2, nx - 1)], x[least(j + 3, nx - 1)]};
            const float *factors = factor ? factor + j : NULL;
            if (!few)
                tile(w, inputs, cols, sums);
            else if (nx == 1 && a->scale)
                bytes_by_1(packed, inputs, cols, sums);
            else if (nx == 1)
                floats_by_1(w, inputs, cols, sums);
            else if (a->scale)
                bytes_by_4(packed, inputs, cols, sums);
            else
                floats_by_4(w, inputs, cols, sums);
            if (!few && r[TILE - 1] < end) {
                put_tile(a, first + r[0], r[0], sums, nx - j, out + j, factors);
                continue;
            }
            for (int l = 0; l < rows; l++)
                if (r[l] < end)
                    put(a, first + r[l], r[l], few ? sums[l] : &sums[0][l], few ? 1 : TILE, nx - j, out + j, factors);
        }
    }
}

/* This thread's share of a whole matrix times the rows x [n, x_stride]; put into out [n, rows], or
   added to it. */
static void linear(const Pass *p, const Matrix *a, const float *x, int x_stride, float *out, int add, int t, float *room)
{
    int begin, end;
    share(a->rows, TILE, t, p->team, &begin, &end);
    for (int first = 0; first < p->n; first += GROUP) {
        const float *xs[GROUP];
        float *outs[GROUP], factors[GROUP];
        int count = least(GROUP, p->n - first);
        for (int j = 0; j < count; j++) {
            xs[j] = x + (int64_t)(first + j) * x_stride;
            outs[j] = out + (int64_t)(first + j) * a->rows;
            factors[j] = 1.0f;
        }
        product(a, 0, begin, end, xs, count, outs, add ? factors : NULL, room);
    }
}

/* ------------------------------------------------------------------------------------ attention */
/* Normalise (if weight) and rotate one head in place. */
static void turn(const Model *m, float *head, const float *weight, int position)
{
    int D = m->D, half = D / 2;
    if (weight)
        rms_norm(head, weight, m->eps, D, head);
    if (!m->cos)
        return;
    const float *cos = m->cos + (int64_t)position * D, *sin = m->sin + (int64_t)position * D;
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* Rotate the queries and keys of row i, and put its keys and values into its cache. */
static void store(const Pass *p, const Block *b, int l, int i)
{
    const Model *m = p->m;
    int position = p->positions[i], slot = b->is_ring ? position % b->capacity : position, D = m->D;
    float *keys = p->keys[p->caches[i] * m->L + l], *values = p->values[p->caches[i] * m->L + l];
    for (int h = 0; h < m->H; h++)
        turn(m, p->q + ((int64_t)i * m->H + h) * D, b->q_norm, position);
    for (int g = 0; g < m->G; g++) {
        float *k = p->k + ((int64_t)i * m->G + g) * D;
        turn(m, k, b->k_norm, position);
        memcpy(keys + ((int64_t)g * b->capacity + slot) * D, k, 4 * D);
        memcpy(values + ((int64_t)g * b->capacity + slot) * D, p->v + ((int64_t)i * m->G + g) * D, 4 * D);
    }
}

/* The first position that a row at `position` sees. */
static int first_of(const Block *b, int position)
{
    return b->window && position >= b->window ? position - b->window + 1 : 0;
}

/* `dot` of a query and TILE keys. */
static four dots(const float *const k[TILE], const float *q, int D)
{
    vec s[TILE] = {0};
    int d = 0;
    for (; d + LANES <= D; d += LANES)
        for (int i = 0; i < TILE; i++)
            s[i] = FMA(LOAD_FLOATS(k[i] + d), LOAD_FLOATS(q + d), s[i]);
    four sums = sums_of(s[0], s[1], s[2], s[3]);
    for (; d < D; d++)
        sums = FMA4(((four){k[0][d], k[1][d], k[2][d], k[3][d]}), (four){0} + q[d], sums);
    return sums;
}

/* The values of a cache that a group of rows sees: positions start to last, the first in `slot`. */
typedef struct { const float *values; int D, start, last, slot, capacity; } Seen;

/* `chunks` vectors of the outputs of ROWS rows, from element d on: the sum over positions of the
   scores [ROWS][position] times the values, over the rows' totals. Those from `rows` on repeat the
   last one. */
static inline __attribute__((always_inline)) void weigh(const Seen *s, const float *const *scores, const float *totals, float *const *out,
                                                        int rows, int d, const int ROWS, const int CHUNKS)
{
    vec sums[4][4] = {0};
    for (int at = s->start, slot = s->slot; at <= s->last; at++) {
        const float *v = s->values + (int64_t)slot * s->D + d;
        for (int c = 0; c < CHUNKS; c++)
            for (int r = 0; r < ROWS; r++)
                sums[r][c] = FMA(ALL(scores[r][at]), LOAD_FLOATS(v + c * LANES), sums[r][c]);
        slot = slot + 1 == s->capacity ? 0 : slot + 1;
    }
    for (int r = 0; r < ROWS && r < rows; r++)
        for (int c = 0; c < CHUNKS; c++)
            *(vec *)(out[r] + d + c * LANES) = sums[r][c] / ALL(totals[r]);
}

/* `weigh` for what does not fill a vector: one element. */
static void weigh_one(const Seen *s, const float *scores, float total, float *out, int d)
{
    float sum = 0;
    for (int at = s->start, slot = s->slot; at <= s->last; at++) {
        sum = FMA1(scores[at], s->values[(int64_t)slot * s->D + d], sum);
        slot = slot + 1 == s->capacity ? 0 : slot + 1;
    }
    out[d] = sum / total;
}

/* Head h of `rows` following rows of one text, from row i on (at most 4; in a ring 1), over the keys
   of its cache that they see; into y. Bits are the same in any group while values are finite: a
   share of 0 times an infinite value of another row is not a number.
   scores: room for four times as many floats as keys and lanes. */
static void attend(const Pass *p, const Block *b, int l, int i, int rows, int h, float *scores, int width)
{
    const Model *m = p->m;
    int D = m->D, g = h / (m->H / m->G), last = p->positions[i] + rows - 1, stride = (last + LANES) / LANES * LANES;
    /* From a whole vector on, so that a row's last vector ends within its stride. The sum's bits do not
       need it: `sum_of` adds lanes i and i + LANES / 2, then quarters, ..., so lanes may be turned. What
       lies before a row's window has the share 0; in a ring it may be a later position's key. */
    int start = first_of(b, p->positions[i]) / LANES * LANES;
    const float *keys = p->keys[p->caches[i] * m->L + l] + (int64_t)g * b->capacity * D;
    const float *values = p->values[p->caches[i] * m->L + l] + (int64_t)g * b->capacity * D;
    Seen seen = {values, D, start, last, b->is_ring ? start % b->capacity : start, b->capacity};
    const float *q[4], *mine_of[4];
    for (int r = 0; r < 4; r++)
        q[r] = p->q + ((int64_t)(i + least(r, rows - 1)) * m->H + h) * D;
    float scale = 1.0f / sqrtf(D), *out[4], totals[4];
    for (int at = start; at <= last; at += TILE) {
        const float *k[TILE];
        float sums[4][TILE];
        for (int s = 0; s < TILE; s++)
            k[s] = keys + (int64_t)(b->is_ring ? least(at + s, last) % b->capacity : least(at + s, last)) * D;
        if (rows == 1)
            *(four *)sums[0] = dots(k, q[0], D);
        else
            tile(k, q, D, sums);
        for (int r = 0; r < rows; r++)
            *(four *)(scores + r * stride + at) = *(four *)sums[r] * scale;
    }
    for (int r = 0; r < rows; r++) {
        float *mine = scores + r * stride, largest = b->sinks ? b->sinks[h] : -INFINITY;
        int position = p->positions[i] + r, first = first_of(b, position);
        if (b->attention_bias)
            for (int at = first; at <= position; at++)
                mine[at] += b->attention_bias[((int64_t)h * m->table + position) * m->table + at];
        for (int at = first; at <= position; at++)
            largest = mine[at] > largest ? mine[at] : largest;
        /* What a row does not see, and what fills the last vector. */
        for (int at = start; at < start + (last - start + LANES) / LANES * LANES; at++)
            mine[at] = at < first || at > position ? -INFINITY : mine[at] - largest;
        vec total = {0};
        for (int at = start; at <= last; at += LANES) {
            total += *(vec *)(mine + at) = share_of(*(vec *)(mine + at));
        }
        /* A sink adds to the denominator only. */
        totals[r] = sum_of(total) + (b->sinks ? expf(b->sinks[h] - largest) : 0.0f);
        out[r] = p->y + (int64_t)(i + r) * width + h * D;
    }
    for (int r = 0; r < 4; r++)
        mine_of[r] = scores + least(r, rows - 1) * stride;
    int d = 0;
    if (rows == 1)
        for (; d + 4 * LANES <= D; d += 4 * LANES)
            weigh(&seen, mine_of, totals, out, rows, d, 1, 4);
    for (; d + 2 * LANES <= D; d += 2 * LANES)
        if (rows == 1)
            weigh(&seen, mine_of, totals, out, rows, d, 1, 2);
        else
            weigh(&seen, mine_of, totals, out, rows, d, 4, 2);
    for (; d + LANES <= D; d += LANES)
        if (rows == 1)
            weigh(&seen, mine_of, totals, out, rows, d, 1, 1);
        else
            weigh(&seen, mine_of, totals, out, rows, d, 4, 1);
    for (; d < D; d++)
        for (int r = 0; r < rows; r++)
            weigh_one(&seen, mine_of[r], totals[r], out[r], d);
}

/* This thread's share of the attention of all rows: a head of up to 4 rows at a time, if they
   follow one another in one text. */
static void attention(const Pass *p, const Block *b, int l, int t, float *scores, int width)
{
    int unit = 0;
    for (int i = 0, rows; i < p->n; i += rows) {
        for (rows = 1; rows < 4 && i + rows < p->n && p->caches[i + rows] == p->caches[i] && !b->is_ring; rows++)
            ;
        for (int h = 0; h < p->m->H; h++)
            if (unit++ % p->team == t)
                attend(p, b, l, i, rows, h, scores, width);
    }
}

/* --------------------------------------------------------------------------- mixture of experts */
/* Choose the experts of a row from its router logits [E], which are overwritten: chosen [K] and
   routing weights gate [K] with sum 1, strongest first. */
static void choose(const Model *m, const float *bias, float *p_E, int32_t *chosen, float *gate)
{
    float largest = p_E[0], total = 0;
    for (int e = 1; e < m->E; e++)
        largest = p_E[e] > largest ? p_E[e] : largest;
    for (int e = 0; e < m->E; e++)
        total += p_E[e] = expf(p_E[e] - largest);
    float kept = 0;
    for (int k = 0; k < m->K; k++) {
        int best = -1;
        float most = 0;
        for (int e = 0; e < m->E; e++) {
            int taken = 0;
            for (int j = 0; j < k; j++)
                taken |= chosen[j] == e;
            float score = p_E[e] / total + (bias ? bias[e] : 0.0f);
            if (!taken && (best < 0 || score > most)) {
                best = e;
                most = score;
            }
        }
        chosen[k] = best;
        kept += gate[k] = p_E[best] / total;
    }
    for (int k = 0; k < m->K; k++)
        gate[k] /= kept;
}

/* Sort the n * K assignments by expert. */
static void sort_by_expert(const Pass *p)
{
    int E = p->m->E, R = p->n * p->m->K;
    memset(p->starts, 0, sizeof(int32_t) * (E + 1));
    for (int r = 0; r < R; r++)
        p->starts[p->chosen[r] + 1]++;
    for (int e = 0; e < E; e++)
        p->starts[e + 1] += p->starts[e];
    for (int r = 0; r < R; r++)
        p->order[p->starts[p->chosen[r]]++] = r;
    for (int e = E; e > 0; e--)
        p->starts[e] = p->starts[e - 1];
    p->starts[0] = 0;
}

/* The smaller of x and the bound; what is not a number stays so. */
static vec at_most(vec x, float bound) { return -at_least(-x, -bound); }

/* An expert's activation (model_parts.activate) in place of h. The vector code does the same as the
   last line, except for GELU. */
static void activate(float *h, const float *up, int count, int activation)
{
    int f = 0;
    if (activation == SWIGLU)
        for (; f + LANES <= count; f += LANES) {
            vec a = *(vec *)(h + f);
            *(vec *)(h + f) = a / (1.0f + exp_of(-at_least(a, -80.0f))) * *(const vec *)(up + f);
        }
    if (activation == SWIGLU_CLAMPED)
        for (; f + LANES <= count; f += LANES) {
            vec a = at_most(*(vec *)(h + f), LIMIT), u = at_most(at_least(*(const vec *)(up + f), -LIMIT), LIMIT);
            *(vec *)(h + f) = a / (1.0f + exp_of(-at_least(a * STEEPNESS, -80.0f))) * (u + 1.0f);
        }
    for (; f < count; f++) {
        float a = h[f];
        if (activation == GELU)
            h[f] = 0.5f * a * (1.0f + erff(a * 0.70710678f));
        else if (activation == SWIGLU)
            h[f] = a / (1.0f + expf(-a)) * up[f];
        else {
            float u = up[f] > LIMIT ? LIMIT : up[f] < -LIMIT ? -LIMIT : up[f];
            a = a > LIMIT ? LIMIT : a;
            h[f] = a / (1.0f + expf(-a * STEEPNESS)) * (u + 1.0f);
        }
    }
}

/* This thread's share of all experts' hidden layers (is_out 0), or of what they add to x (1). */
static void experts(const Pass *p, const Block *b, int is_out, int t, float *room)
{
    const Model *m = p->m;
    int K = m->K, F = m->F, width = m->C > m->H * m->D ? m->C : m->H * m->D, begin, end;
    /* Whole vectors: `activate` takes another function for what does not fill one. */
    share(is_out ? m->C : F, is_out ? TILE : LANES, t, p->team, &begin, &end);
    for (int e = 0; e < m->E; e++)
        for (int first = p->starts[e]; first < p->starts[e + 1]; first += GROUP) {
            const float *xs[GROUP];
            float *outs[GROUP], *ups[GROUP], factors[GROUP];
            int count = least(GROUP, p->starts[e + 1] - first);
            for (int j = 0; j < count; j++) {
                int r = p->order[first + j];
                float *h = p->h + (int64_t)r * F;
                xs[j] = is_out ? h : p->y + (int64_t)(r / K) * width;
                outs[j] = is_out ? p->x + (int64_t)(r / K) * m->C : h;
                ups[j] = p->up + (int64_t)r * F;
                factors[j] = p->gate[r];
            }
            if (is_out) {
                product(&b->w_out, (int64_t)e * m->C, begin, end, xs, count, outs, factors, room);
                continue;
            }
            product(&b->w_in, (int64_t)e * b->w_in.rows, begin, end, xs, count, outs, NULL, room);
            if (m->activation != GELU)
                product(&b->w_in, (int64_t)e * b->w_in.rows + F, begin, end, xs, count, ups, NULL, room);
            for (int j = 0; j < count; j++)
                activate(outs[j] + begin, ups[j] + begin, end - begin, m->activation);
        }
}

/* ------------------------------------------------------------------------------------- the pass */
/* The first of the largest of x [V]. */
static int argmax(const float *x, int V)
{
    vec most = ALL(-INFINITY);
    int v = 0, best = 0;
    for (; v + LANES <= V; v += LANES) {
        vec y = LOAD_FLOATS(x + v);
        ints more = y > most;
        most = (vec)(((ints)y & more) | ((ints)most & ~more));
    }
    float largest = -INFINITY;
    for (int i = 0; i < LANES; i++)
        largest = most[i] > largest ? most[i] : largest;
    for (; v < V; v++)
        largest = x[v] > largest ? x[v] : largest;
    while (best < V - 1 && x[best] != largest)
        best++;
    return best;
}

/* Score row j from its logits x [V]. NaN or infinity among them makes the scores NaN; -infinity
   is an id without probability. */
static void score(const Pass *p, int j, const float *x)
{
    int V = p->m->V, best = argmax(x, V);
    double total = 0;
    for (int v = 0; v < V;) {
        vec sum = {0};
        /* So few additions in float32 that they are as exact as the exponential function. */
        for (int i = 0; i < 16 && v < V; i++, v += LANES) {
            vec y = ALL(-INFINITY);
            memcpy(&y, x + v, sizeof(float) * least(LANES, V - v));
            sum += share_of(y - ALL(x[best]));
        }
        total += sum_of(sum);
    }
    p->best[j] = best;
    p->best_log_probs[j] = -log(total);
    if (p->targets)
        p->log_probs[j] = (double)x[p->targets[j]] - (double)x[best] - log(total);
}

static void run(Pass *p, int t)
{
    const Model *m = p->m;
    int n = p->n, C = m->C, K = m->K, T = p->team, width = C > m->H * m->D ? C : m->H * m->D;
    /* Never in use at the same time. */
    float *room = p->private + t * p->private_floats, *scores = room;
    for (int i = t; i < n; i += T)
        /* The embedding is never packed: runtime/inference/quantize.py. */
        memcpy(p->x + (int64_t)i * C, row_of(&m->embed, p->ids[i], room), sizeof(float) * C);
    for (int l = 0; l < m->L; l++) {
        const Block *b = &m->blocks[l];
        for (int i = t; i < n; i += T)
            rms_norm(p->x + (int64_t)i * C, b->norm1, m->eps, C, p->y + (int64_t)i * width);
        barrier(p);
        linear(p, &b->q, p->y, width, p->q, 0, t, room);
        linear(p, &b->k, p->y, width, p->k, 0, t, room);
        linear(p, &b->v, p->y, width, p->v, 0, t, room);
        barrier(p);
        for (int i = t; i < n; i += T)
            store(p, b, l, i);
        barrier(p);
        attention(p, b, l, t, scores, width);
        barrier(p);
        linear(p, &b->out, p->y, width, p->x, 1, t, room);
        barrier(p);
        for (int i = t; i < n; i += T) {
            float *y = p->y + (int64_t)i * width;
            rms_norm(p->x + (int64_t)i * C, b->norm2, m->eps, C, y);
            for (int e = 0; e < m->E; e++)
                room[e] = dot(b->router + (int64_t)e * C, y, C) + (b->router_bias ? b->router_bias[e] : 0.0f);
            choose(m, b->selection_bias, room, p->chosen + i * K, p->gate + i * K);
            if (p->experts) {
                int64_t to = ((int64_t)l * n + i) * K;
                memcpy(p->experts + to, p->chosen + i * K, sizeof(int32_t) * K);
                memcpy(p->weights + to, p->gate + i * K, sizeof(float) * K);
            }
        }
        barrier(p);
        if (t == 0)
            sort_by_expert(p);
        barrier(p);
        experts(p, b, 0, t, room);
        barrier(p);
        experts(p, b, 1, t, room);
        barrier(p);
    }
    for (int j = t; j < p->num_logits; j += T)
        rms_norm(p->x + (int64_t)p->logit_rows[j] * C, m->norm, m->eps, C, p->y + (int64_t)j * C);
    barrier(p);
    int begin, end;
    share(m->V, TILE, t, T, &begin, &end);
    for (int first = 0; first < p->num_logits; first += GROUP) {
        const float *xs[GROUP];
        float *outs[GROUP];
        int count = least(GROUP, p->num_logits - first);
        for (int j = 0; j < count; j++) {
            xs[j] = p->y + (int64_t)(first + j) * C;
            outs[j] = p->logits + (int64_t)(p->targets ? j : first + j) * m->V;
        }
        product(&m->head, 0, begin, end, xs, count, outs, NULL, room);
        if (!p->best)
            continue;
        barrier(p);
        for (int j = t; j < count; j += T)
            score(p, first + j, outs[j]);
        barrier(p);
    }
}

typedef struct { Pass *pass; int thread, core; } Start;

/* The core that runs the caller, or -1. */
static int this_core(void)
{
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

/* Let the calling thread run on any core but this one, if it may.

   Linux may start a thread on the core of the one that made it and leave both there for
   milliseconds, with another core idle. A pass takes no longer than that. */
static void leave_core(int core)
{
#ifdef __linux__
    cpu_set_t cores;
    if (core < 0 || sched_getcpu() != core || sched_getaffinity(0, sizeof cores, &cores))
        return;
    CPU_CLR(core, &cores);
    if (CPU_COUNT(&cores))
        sched_setaffinity(0, sizeof cores, &cores);
#else
    (void)core;
#endif
}

static void *run_thread(void *argument)
{
    Start *start = argument;
    leave_core(start->core);
    while (atomic_load(&start->pass->phase) < 0)
        sched_yield();
    run(start->pass, start->thread);
    return NULL;
}

/* One pass on up to m->threads threads; fewer where the system gives no more. */
void gptoss_forward(Pass *p)
{
    pthread_t threads[MOST_THREADS];
    Start starts[MOST_THREADS];
    int core = this_core();
    atomic_store(&p->arrived, 0);
    atomic_store(&p->phase, -1);
    for (p->team = 1; p->team < least(p->m->threads, MOST_THREADS); p->team++) {
        starts[p->team] = (Start){p, p->team, core};
        if (pthread_create(&threads[p->team], NULL, run_thread, &starts[p->team]))
            break;
    }
    atomic_store(&p->phase, 0);
    run(p, 0);
    for (int t = 1; t < p->team; t++)
        pthread_join(threads[t], NULL);
}

/* For the caller's check that both sides mean the same structures. */
int gptoss_sizes(int which) { return which == 0 ? sizeof(Matrix) : which == 1 ? sizeof(Block) : which == 2 ? sizeof(Model) : sizeof(Pass); }
