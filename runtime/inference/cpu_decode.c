/* A forward pass of a few tokens on a CPU, at the speed at which their weights can be read.

   The same mathematics as model_parts.py and model.py in float32, over the plain model's own
   parameters and the plain KV cache (runtime/inference/cpu_decode.py passes the pointers). A token
   is a row: an id, a position, and the cache it belongs to. One row, the next rows of many texts,
   or some following rows of one text are the same to this code. Threads share each matrix by its
   output rows and meet at a barrier between steps.

   A row's numbers are the same bits whatever other rows the pass has, however its text was cut into
   passes, and on any number of threads. So every sum has one order, whichever function computes it:
   one accumulator of LANES lanes from the beginning on, then `sum_of`, then what does not fill a
   vector; with packed weights one of 8 lanes, from piece to piece. Nothing is left to the compiler:
   each multiply-add is written as one (FMA), and cpu_decode.py forbids others (-ffp-contract=off).

   Letters as in model_parts.py: C d_model, L blocks, H query heads, G key/value heads, D head_dim,
   E experts, K top_k, F d_ff, V vocabulary; n rows. Weights are [outputs, inputs], row by row. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE  /* sched_getcpu, cpu_set_t */
#endif
#include <float.h>
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
typedef int16_t narrow __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef int8_t chars __attribute__((vector_size(32), aligned(1), may_alias));
typedef int32_t eight_ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int16_t shorts __attribute__((vector_size(32), aligned(2), may_alias));
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
#if defined(__AVX2__) && defined(__FMA__)
#define FMA8(a, b, c) ((eight)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#elif defined(__aarch64__)
#define FMA8(a, b, c) fma_of_halves(a, b, c)
#else
#define FMA8(a, b, c) ((a) * (b) + (c))
#endif
#if defined(__AVX2__) && defined(__FMA__) || defined(__aarch64__)
#define FMA1(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA1(a, b, c) ((a) * (b) + (c))
#endif
#define ALL(x) ((vec){0} + (x))
#define LOAD_FLOATS(p) (*(const vec *)(p))
/* FMA(a, b, s) into s, in so many words: a compiler that is free to choose moves sums between
   registers and memory where they just fit. */
#if defined(__AVX512F__) && defined(__FMA__)
#define ADD_PRODUCT(s, a, b) __asm__ volatile("vfmadd231ps %2, %1, %0" : "+v"(s) : "v"(a), "v"(b))
#elif defined(__AVX2__) && defined(__FMA__)
#define ADD_PRODUCT(s, a, b) __asm__ volatile("vfmadd231ps %2, %1, %0" : "+x"(s) : "x"(a), "x"(b))
#else
#define ADD_PRODUCT(s, a, b) s = FMA(a, b, s)
#endif
#define MOST_THREADS 256
#define TILE 4              /* weight rows taken together */
#define MOST_INPUTS 3       /* inputs taken together: TILE times as many sums fill AVX2's registers */
#define MOST_QUERIES 6      /* queries that go over the keys together */
#define NEAR_BYTES (24 << 10)     /* inputs that stay in the first cache while weights pass */
#define BLOCK_BYTES (128 << 10)   /* weights that stay in the second one while inputs pass */
#define INLINE static inline __attribute__((always_inline))
/* Bytes by which weights are prefetched before their use: the processor itself does not prefetch
   across the end of a short row. */
#define AHEAD 1024
#define NIBBLES 32          /* weights of 4 bits that have a scale: quantize.py */
#define WIDE 128            /* inputs of weights of 8 bits that have a scale */
#define GROUP 64            /* rows taken together: they stay in the cache with the weight rows */
#define FEW 8               /* inputs for which weights come from memory at its own speed */

enum { GELU, SWIGLU, SWIGLU_CLAMPED };
#define LIMIT 7.0f          /* of SWIGLU_CLAMPED, as in config_model.py */
#define STEEPNESS 1.702f

/* float; with scale, int8 times the scale of its row; with groups, 4 bits times the scale, a bfloat16,
   of their group of NIBBLES (quantize.py): the last group of a row is whole. */
typedef struct {
    const void *weight;
    const float *scale, *bias;   /* bias [rows] or NULL */
    const uint16_t *groups;
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
    float *gate, *private;               /* [n * K]; per thread: scores or rounded inputs */
    int64_t private_floats;
    int32_t team;               /* threads at work */
    atomic_int arrived, phase;  /* of the barrier; phase -1 while threads are being started */
    /* 1; 2: inputs of weights of 4 bits are rounded to 16 bits, as the sum of two of 8. For comparisons. */
    int32_t planes;
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

static four fold_eight(eight a)
{
    four q[2];
    memcpy(q, &a, sizeof(a));
    return q[0] + q[1];
}

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

/* `sum_of` of four vectors, each folded. */
static four sums_of_folded(four x, four y, four z, four w)
{
    four xy = SHUFFLE(four_ints, x, y, 0, 1, 4, 5) + SHUFFLE(four_ints, x, y, 2, 3, 6, 7);
    four zw = SHUFFLE(four_ints, z, w, 0, 1, 4, 5) + SHUFFLE(four_ints, z, w, 2, 3, 6, 7);
    return SHUFFLE(four_ints, xy, zw, 0, 2, 4, 6) + SHUFFLE(four_ints, xy, zw, 1, 3, 5, 7);
}

static four sums_of(vec a, vec b, vec c, vec d) { return sums_of_folded(fold(a), fold(b), fold(c), fold(d)); }

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
static int groups_of(int cols) { return (cols + NIBBLES - 1) / NIBBLES; }

/* Bytes of a row of weights. */
static int64_t row_bytes_of(const Matrix *a)
{
    return a->groups ? (int64_t)groups_of(a->cols) * NIBBLES / 2 : a->scale ? a->cols : 4 * (int64_t)a->cols;
}

/* What is prefetched while a row passes: from so many bytes after its beginning on, so many for each
   line of the row. */
typedef struct { int64_t from, pace; } Ahead;

/* The vectors of TILE rows and NX inputs from AT on. */
#define STEP(AT)                                                                                                \
    {                                                                                                           \
        vec v0 = LOAD_FLOATS(x0 + (AT)), v1 = LOAD_FLOATS(x1 + (AT)), v2 = LOAD_FLOATS(x2 + (AT));              \
        STEP_OF(LOAD_FLOATS(w0 + (AT)), a0, b0, c0)                                                             \
        STEP_OF(LOAD_FLOATS(w1 + (AT)), a1, b1, c1)                                                             \
        STEP_OF(LOAD_FLOATS(w2 + (AT)), a2, b2, c2)                                                             \
        STEP_OF(LOAD_FLOATS(w3 + (AT)), a3, b3, c3)                                                             \
    }
#define STEP_OF(WEIGHTS, A, B, C)                                                                               \
    {                                                                                                           \
        vec weights = WEIGHTS;                                                                                  \
        ADD_PRODUCT(A, weights, v0);                                                                            \
        if (NX > 1)                                                                                             \
            ADD_PRODUCT(B, weights, v1);                                                                        \
        if (NX > 2)                                                                                             \
            ADD_PRODUCT(C, weights, v2);                                                                        \
    }

/* `dot` of NX inputs and TILE weight rows; sums[j][i]: input j, row i. Each sum has a name: gcc keeps an
   array of them in memory. */
INLINE void float_products_of(const float *const *w, const float *const *x, int cols, Ahead ahead, four *sums, const int NX)
{
    enum { LINE = 64 / sizeof(float) };
    const float *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
    const float *x0 = x[0], *x1 = x[NX > 1 ? 1 : 0], *x2 = x[NX > 2 ? 2 : 0];
    vec a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, b0 = {0}, b1 = {0}, b2 = {0}, b3 = {0}, c0 = {0}, c1 = {0}, c2 = {0}, c3 = {0};
    int k = 0;
    for (; k + LINE <= cols; k += LINE) {
        __builtin_prefetch((const char *)w0 + ahead.from);
        __builtin_prefetch((const char *)w1 + ahead.from);
        __builtin_prefetch((const char *)w2 + ahead.from);
        __builtin_prefetch((const char *)w3 + ahead.from);
        ahead.from += ahead.pace;
        for (int at = 0; at < LINE; at += LANES)
            STEP(k + at)
    }
    for (; k + LANES <= cols; k += LANES)
        STEP(k)
    sums[0] = sums_of(a0, a1, a2, a3);
    if (NX > 1)
        sums[1] = sums_of(b0, b1, b2, b3);
    if (NX > 2)
        sums[2] = sums_of(c0, c1, c2, c3);
    for (; k < cols; k++)
        for (int j = 0; j < NX; j++)
            sums[j] = FMA4(((four){w0[k], w1[k], w2[k], w3[k]}), (four){0} + x[j][k], sums[j]);
}

/* The function NAME for 1 to MOST_INPUTS inputs. */
#define FOR_INPUTS(NAME, WEIGHTS, INPUT)                                                                        \
    static void NAME(WEIGHTS, const INPUT *const *x, int nx, int cols, Ahead ahead, four *sums)                 \
    {                                                                                                           \
        if (nx == 1)                                                                                            \
            NAME##_of(w, x, cols, ahead, sums, 1);                                                              \
        else if (nx == 2)                                                                                       \
            NAME##_of(w, x, cols, ahead, sums, 2);                                                              \
        else                                                                                                    \
            NAME##_of(w, x, cols, ahead, sums, 3);                                                              \
    }
FOR_INPUTS(float_products, const float *const *w, float)

/* ------------------------------------------------------------------------------ products in integers */
/* Packed weights are multiplied with rounded inputs, so that a piece's sums are exact in integers: 8
   lanes of them, which are then scaled and added in float32. */

/* Inputs of weights of 8 bits: WIDE of them as 16 bits times one scale. */
typedef struct {
    shorts x[WIDE / 16];
    eight scale;
} Wide;

/* Inputs of weights of 4 bits: two groups as 8 bits times a scale each, in the order in which `halves_of`
   has their weights. `begin` takes the 8 that weights are kept too large by; lanes 0 to 3 are of the
   first group. */
typedef struct {
    chars low, high;
    eight_ints begin;
    eight scale;
} Narrow;

/* sums + the products of 16 numbers, two of them in each lane. */
INLINE eight_ints add_pairs(eight_ints sums, shorts w, shorts x)
{
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (eight_ints)_mm256_dpwssd_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
#elif defined(__AVX2__)
    return sums + (eight_ints)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#else
    /* Their lower and their upper halves. */
    eight_ints u = (eight_ints)w, v = (eight_ints)x;
    return sums + (u << 16 >> 16) * (v << 16 >> 16) + (u >> 16) * (v >> 16);
#endif
}

INLINE shorts load_bytes(const int8_t *w)
{
#if defined(__AVX2__)    /* gcc 12 does the last line byte by byte */
    return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
#else
    return __builtin_convertvector(*(const bytes *)w, shorts);
#endif
}

/* Two groups of nibbles, 8 too large, a byte each. */
typedef struct { chars low, high; } Halves;

/* count: groups that there are, 1 or 2. */
INLINE Halves halves_of(const int8_t *groups, const int count)
{
    shorts both = {0};
    memcpy(&both, groups, count * (NIBBLES / 2));
    return (Halves){(chars)(both & 0x0f0f), (chars)(both >> 4 & 0x0f0f)};
}

/* x->begin + the products of two groups, eight of them in each lane. */
INLINE eight_ints sums_of_groups(Halves w, const Narrow *x)
{
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    __m256i sums = _mm256_dpbusd_epi32((__m256i)x->begin, (__m256i)w.low, (__m256i)x->low);
    return (eight_ints)_mm256_dpbusd_epi32(sums, (__m256i)w.high, (__m256i)x->high);
#elif defined(__AVX2__)
    /* Up to 4 * 15 * 127: there is room in 16 bits. */
    __m256i low = _mm256_maddubs_epi16((__m256i)w.low, (__m256i)x->low);
    __m256i fours = _mm256_add_epi16(low, _mm256_maddubs_epi16((__m256i)w.high, (__m256i)x->high));
    return x->begin + (eight_ints)_mm256_madd_epi16(fours, _mm256_set1_epi16(1));
#else
    eight_ints sums = x->begin;
    for (int at = 0; at < 32; at += 8) {
        sums += ((eight_ints)w.low >> at & 15) * ((eight_ints)x->low << (24 - at) >> 24);
        sums += ((eight_ints)w.high >> at & 15) * ((eight_ints)x->high << (24 - at) >> 24);
    }
    return sums;
#endif
}

/* The scales of two groups, each in its four lanes. One, if there is no second. */
INLINE eight worth_of(const uint16_t *groups, const int count)
{
    uint32_t both = 0;
    memcpy(&both, groups, count * sizeof(uint16_t));
#if defined(__AVX2__)
    const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 0, 1, -1, -1, 0, 1, -1, -1, 0, 1,
                                            -1, -1, 2, 3, -1, -1, 2, 3, -1, -1, 2, 3, -1, -1, 2, 3);
    return (eight)_mm256_shuffle_epi8(_mm256_set1_epi32((int)both), places);
#else
    int32_t first = (int32_t)(both << 16), second = (int32_t)(both & 0xffff0000);
    return (eight)(eight_ints){first, first, first, first, second, second, second, second};
#endif
}

/* The scale by which the largest of `count` inputs becomes `steps`, and `back`, by which inputs are divided:
   0 where all become 0. Infinity has no place among integers: its scale is not a number. count: whole
   vectors. */
static float scale_of(const float *x, int count, float steps, float *back)
{
    int32_t largest = 0;
    ints most = {0};
    for (int at = 0; at < count; at += LANES) {
        /* As integers: what is not a number is larger than all that are. */
        ints size = (ints)LOAD_FLOATS(x + at) & 0x7fffffff, more = size > most;
        most = (size & more) | (most & ~more);
    }
    for (int lane = 0; lane < LANES; lane++)
        largest = most[lane] > largest ? most[lane] : largest;
    float top;
    memcpy(&top, &largest, sizeof(top));
    *back = top > 1e-30f && top <= FLT_MAX ? steps / top : 0.0f;
    return *back > 0 ? top / steps : top <= FLT_MAX ? 0.0f : NAN;
}

/* x * back, rounded, of LANES inputs. */
INLINE ints rounded(const float *x, float back)
{
    /* 1.5 * 2^23 leaves no bits after the point. */
    return back > 0 ? __builtin_convertvector(LOAD_FLOATS(x) * back + 12582912.0f - 12582912.0f, ints) : (ints){0};
}

/* `count` inputs of a row, as many as are left of `most`, then zeros; in `room` unless all are there. */
INLINE const float *filled(const float *x, int count, int most, float *room)
{
    if (count >= most)
        return x;
    memset(room, 0, sizeof(float) * most);
    memcpy(room, x, sizeof(float) * count);
    return room;
}

static void round_wide(const float *x, int count, Wide *to)
{
    float room[WIDE], back;
    x = filled(x, count, WIDE, room);
    to->scale = (eight){0} + scale_of(x, WIDE, 32767.0f, &back);
    for (int at = 0; at < WIDE; at += LANES) {
        narrow n = __builtin_convertvector(rounded(x + at, back), narrow);
        memcpy((int16_t *)to->x + at, &n, sizeof(n));
    }
}

/* Two groups, as a sum of `planes` pieces, `distance` apart. */
static void round_narrow(const float *x, int count, Narrow *to, int planes, int distance)
{
    float room[2 * NIBBLES], back;
    int8_t low[2][NIBBLES], high[2][NIBBLES];
    x = filled(x, count, 2 * NIBBLES, room);
    for (int group = 0; group < 2; group++) {
        const float *own = x + group * NIBBLES;
        float scale = scale_of(own, NIBBLES, 127.0f, &back), left[NIBBLES];
        for (int plane = 0; plane < planes; plane++) {
            int32_t values[NIBBLES];
            for (int at = 0; at < NIBBLES; at += LANES) {
                ints whole = rounded(own + at, back);
                vec rest = LOAD_FLOATS(own + at) - __builtin_convertvector(whole, vec) * scale;
                memcpy(values + at, &whole, sizeof(whole));
                memcpy(left + at, &rest, sizeof(rest));
            }
            /* Of each 16 bits of weights the lowest 4 are element e, the next e + 8, ...: quantize.py. */
            for (int e = 0; e < 8; e++) {
                int at = group * NIBBLES / 2 + 2 * e;
                low[plane][at] = (int8_t)values[e];
                high[plane][at] = (int8_t)values[e + 8];
                low[plane][at + 1] = (int8_t)values[e + 16];
                high[plane][at + 1] = (int8_t)values[e + 24];
            }
            for (int lane = 4 * group; lane < 4 * group + 4; lane++)
                to[plane * distance].scale[lane] = scale;
            /* What is left is half a step at most. */
            own = left;
            scale /= 254.0f;
            back *= 254.0f;
        }
    }
    for (int plane = 0; plane < planes; plane++, to += distance) {
        chars eights = (chars){0} + 8;
        memcpy(&to->low, low[plane], sizeof(low[plane]));
        memcpy(&to->high, high[plane], sizeof(high[plane]));
        to->begin = (eight_ints){0};
        to->begin = -sums_of_groups((Halves){eights, eights}, to);
    }
}

/* cpu_decode.py makes room for this. */
_Static_assert(2 * sizeof(Narrow) <= sizeof(Wide), "Narrow needs no more room than Wide");

/* Pieces that a row's inputs are rounded in. */
static int pieces_of(const Matrix *a)
{
    int piece = a->groups ? 2 * NIBBLES : WIDE;
    return (a->cols + piece - 1) / piece;
}

static void round_input(const Matrix *a, const float *x, int planes, void *to)
{
    int pieces = pieces_of(a);
    for (int i = 0; i < pieces; i++)
        if (a->groups)
            round_narrow(x + i * 2 * NIBBLES, a->cols - i * 2 * NIBBLES, (Narrow *)to + i, planes, pieces);
        else
            round_wide(x + i * WIDE, a->cols - i * WIDE, (Wide *)to + i);
}

/* 16 bytes of TILE rows, from byte AT of a piece on; LOAD: of a row. */
#define BYTES_STEP(LOAD, AT)                                                                                    \
    {                                                                                                           \
        BYTES_STEP_OF(LOAD(w0), AT, i0, j0, k0)                                                                 \
        BYTES_STEP_OF(LOAD(w1), AT, i1, j1, k1)                                                                 \
        BYTES_STEP_OF(LOAD(w2), AT, i2, j2, k2)                                                                 \
        BYTES_STEP_OF(LOAD(w3), AT, i3, j3, k3)                                                                 \
    }
#define BYTES_STEP_OF(WEIGHTS, AT, I, J, K)                                                                     \
    {                                                                                                           \
        shorts weights = WEIGHTS;                                                                               \
        I = add_pairs(I, weights, x0->x[AT]);                                                                   \
        if (NX > 1)                                                                                             \
            J = add_pairs(J, weights, x1->x[AT]);                                                               \
        if (NX > 2)                                                                                             \
            K = add_pairs(K, weights, x2->x[AT]);                                                               \
    }
#define SCALED(SUMS, x, S) S = FMA8(__builtin_convertvector(SUMS, eight), x->scale, S)

/* TILE rows of packed weights, and their scales if they have 4 bits. */
typedef struct {
    const int8_t *weights[TILE];
    const uint16_t *scales[TILE];
    int64_t rows[TILE];
} Packed;

/* `dot` of NX inputs and TILE rows of bytes, without the rows' scales. */
INLINE void byte_products_of(const Packed *w, const Wide *const *x, int cols, Ahead ahead, four *sums, const int NX)
{
    const int8_t *w0 = w->weights[0], *w1 = w->weights[1], *w2 = w->weights[2], *w3 = w->weights[3];
    const Wide *x0 = x[0], *x1 = x[NX > 1 ? 1 : 0], *x2 = x[NX > 2 ? 2 : 0];
    eight a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, b0 = {0}, b1 = {0}, b2 = {0}, b3 = {0}, c0 = {0}, c1 = {0}, c2 = {0}, c3 = {0};
    for (int left = cols; left > 0; left -= WIDE, x0++, x1++, x2++) {
        eight_ints i0 = {0}, i1 = {0}, i2 = {0}, i3 = {0}, j0 = {0}, j1 = {0}, j2 = {0}, j3 = {0}, k0 = {0}, k1 = {0}, k2 = {0}, k3 = {0};
        int count = least(left, WIDE), at = 0;
        for (; at + 16 <= count; at += 16) {
            if (!(at & 63) && ahead.from) {    /* a line of the cache */
                __builtin_prefetch(w0 + ahead.from);
                __builtin_prefetch(w1 + ahead.from);
                __builtin_prefetch(w2 + ahead.from);
                __builtin_prefetch(w3 + ahead.from);
            }
            BYTES_STEP(load_bytes, at / 16)
            w0 += 16, w1 += 16, w2 += 16, w3 += 16;
        }
        if (at < count) {
#define LAST_BYTES(W) load_bytes(memcpy(last, W, count - at))
            int8_t last[16] = {0};
            BYTES_STEP(LAST_BYTES, at / 16)
        }
        SCALED(i0, x0, a0), SCALED(i1, x0, a1), SCALED(i2, x0, a2), SCALED(i3, x0, a3);
        if (NX > 1)
            SCALED(j0, x1, b0), SCALED(j1, x1, b1), SCALED(j2, x1, b2), SCALED(j3, x1, b3);
        if (NX > 2)
            SCALED(k0, x2, c0), SCALED(k1, x2, c1), SCALED(k2, x2, c2), SCALED(k3, x2, c3);
    }
    sums[0] = sums_of_folded(fold_eight(a0), fold_eight(a1), fold_eight(a2), fold_eight(a3));
    if (NX > 1)
        sums[1] = sums_of_folded(fold_eight(b0), fold_eight(b1), fold_eight(b2), fold_eight(b3));
    if (NX > 2)
        sums[2] = sums_of_folded(fold_eight(c0), fold_eight(c1), fold_eight(c2), fold_eight(c3));
}
FOR_INPUTS(byte_products, const Packed *w, Wide)

/* COUNT groups, from piece g on, of TILE rows. */
#define GROUPS_STEP(COUNT)                                                                                      \
    {                                                                                                           \
        GROUPS_STEP_OF(0, COUNT, a0, b0, c0)                                                                    \
        GROUPS_STEP_OF(1, COUNT, a1, b1, c1)                                                                    \
        GROUPS_STEP_OF(2, COUNT, a2, b2, c2)                                                                    \
        GROUPS_STEP_OF(3, COUNT, a3, b3, c3)                                                                    \
    }
#define GROUPS_STEP_OF(ROW, COUNT, A, B, C)                                                                     \
    {                                                                                                           \
        Halves halves = halves_of(w->weights[ROW] + g * NIBBLES, COUNT);                                        \
        eight worth = worth_of(w->scales[ROW] + 2 * g, COUNT);                                                  \
        A = FMA8(__builtin_convertvector(sums_of_groups(halves, x0 + g), eight), worth * x0[g].scale, A);       \
        if (NX > 1)                                                                                             \
            B = FMA8(__builtin_convertvector(sums_of_groups(halves, x1 + g), eight), worth * x1[g].scale, B);   \
        if (NX > 2)                                                                                             \
            C = FMA8(__builtin_convertvector(sums_of_groups(halves, x2 + g), eight), worth * x2[g].scale, C);   \
    }

/* `dot` of NX inputs and TILE rows of nibbles. */
INLINE void nibble_products_of(const Packed *w, const Narrow *const *x, int cols, Ahead ahead, four *sums, const int NX)
{
    int groups = groups_of(cols), g = 0;
    const Narrow *x0 = x[0], *x1 = x[NX > 1 ? 1 : 0], *x2 = x[NX > 2 ? 2 : 0];
    eight a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0}, b0 = {0}, b1 = {0}, b2 = {0}, b3 = {0}, c0 = {0}, c1 = {0}, c2 = {0}, c3 = {0};
    for (; g < groups / 2; g++) {
        if (!(g & 1) && ahead.from) {    /* a line of the cache */
            __builtin_prefetch(w->weights[0] + g * NIBBLES + ahead.from);
            __builtin_prefetch(w->weights[1] + g * NIBBLES + ahead.from);
            __builtin_prefetch(w->weights[2] + g * NIBBLES + ahead.from);
            __builtin_prefetch(w->weights[3] + g * NIBBLES + ahead.from);
        }
        GROUPS_STEP(2)
    }
    if (groups & 1)
        GROUPS_STEP(1)
    sums[0] = sums_of_folded(fold_eight(a0), fold_eight(a1), fold_eight(a2), fold_eight(a3));
    if (NX > 1)
        sums[1] = sums_of_folded(fold_eight(b0), fold_eight(b1), fold_eight(b2), fold_eight(b3));
    if (NX > 2)
        sums[2] = sums_of_folded(fold_eight(c0), fold_eight(c1), fold_eight(c2), fold_eight(c3));
}
FOR_INPUTS(nibble_products, const Packed *w, Narrow)

/* How many of `left` inputs are taken next: four are two and two, as one alone has few sums. */
static int next_inputs(int left) { return left == 4 ? 2 : least(left, MOST_INPUTS); }

/* The part of a row that is `distance` bytes further on, which inputs j to j + count of nx prefetch. */
static Ahead ahead_of(int j, int count, int nx, int row_bytes, int64_t distance)
{
    return (Ahead){(distance > AHEAD || !distance ? distance : AHEAD) + (int64_t)row_bytes * j / nx, distance ? 64 * count / nx : 0};
}

/* out[r] = value, or += factor * value, for the sum of weights of `row` times an input; r: the row's
   index in the output. */
static void put(const Matrix *a, int64_t row, float sum, const float *factor, float *to)
{
    float scale = a->scale ? a->scale[row] : 1.0f, bias = a->bias ? a->bias[row] : 0.0f;
    float value = FMA1(sum, scale, bias);
    *to = factor ? FMA1(*factor, value, *to) : value;
}

/* `put` of TILE rows that follow one another. */
static void put_tile(const Matrix *a, int64_t row, four sums, const float *factor, float *out)
{
    four scale = (four){0} + 1.0f, bias = {0}, *to = (four *)out;
    if (a->scale)
        scale = *(const four *)(a->scale + row);
    if (a->bias)
        bias = *(const four *)(a->bias + row);
    four value = FMA4(sums, scale, bias);
    if (factor)
        value = FMA4((four){0} + *factor, value, *to);
    *to = value;
}

static Packed packed_rows(const Matrix *a, int64_t row, int64_t step, int64_t last)
{
    Packed w;
    for (int l = 0; l < TILE; l++) {
        /* Beyond the end the last row is computed again, and not put. */
        w.rows[l] = row + l * step < last ? row + l * step : last;
        w.weights[l] = (const int8_t *)a->weight + w.rows[l] * row_bytes_of(a);
        w.scales[l] = a->groups ? a->groups + w.rows[l] * groups_of(a->cols) : NULL;
    }
    return w;
}

/* The products of packed rows and `count` rounded inputs. */
INLINE void packed_products(const Matrix *a, const Packed *w, const void *const *inputs, int count, int planes, Ahead ahead,
                            four *sums)
{
    if (!a->groups) {
        byte_products(w, (const Wide *const *)inputs, count, a->cols, ahead, sums);
        return;
    }
    nibble_products(w, (const Narrow *const *)inputs, count, a->cols, ahead, sums);
    if (planes > 1) {
        const Narrow *rest[MOST_INPUTS];
        four more[MOST_INPUTS];
        for (int k = 0; k < count; k++)
            rest[k] = (const Narrow *)inputs[k] + pieces_of(a);
        nibble_products(w, rest, count, a->cols, (Ahead){0}, more);
        for (int k = 0; k < count; k++)
            sums[k] += more[k];
    }
}

/* `product` for packed weights. room: for the rounded inputs. */
static void product_of_packed(const Matrix *a, int64_t first, int begin, int end, const float *const *x, int nx,
                              float *const *out, const float *factor, int planes, float *room)
{
    int row_bytes = (int)row_bytes_of(a), input_bytes = pieces_of(a) * (int)(a->groups ? planes * sizeof(Narrow) : sizeof(Wide));
    const void *inputs[GROUP];
    four sums[MOST_INPUTS];
    for (int j = 0; j < nx; j++) {
        inputs[j] = (char *)room + (int64_t)j * input_bytes;
        round_input(a, x[j], planes, (char *)room + (int64_t)j * input_bytes);
    }
    if (nx <= FEW && end - begin >= TILE) {
        /* As in `product_of_few`. */
        int part = (end - begin) / TILE;
        Packed w = packed_rows(a, first + begin, part, first + end - 1);
        Ahead next = {row_bytes < AHEAD ? AHEAD : row_bytes, 0};
        for (int i = 0; i < part; i++) {
            for (int j = 0, count; j < nx; j += count) {
                count = next_inputs(nx - j);
                packed_products(a, &w, inputs + j, count, planes, j ? (Ahead){0} : next, sums);
                for (int k = 0; k < count; k++)
                    for (int l = 0; l < TILE; l++)
                        put(a, w.rows[l], sums[k][l], factor ? factor + j + k : NULL, out[j + k] + (w.rows[l] - first));
            }
            for (int l = 0; l < TILE; l++) {
                w.rows[l]++;
                w.weights[l] += row_bytes;
                if (a->groups)
                    w.scales[l] += groups_of(a->cols);
            }
        }
        begin += part * TILE;
    }
    /* Blocks of rows stay in the second cache, while parts of the inputs pass. */
    int part = NEAR_BYTES / 2 / input_bytes / MOST_INPUTS * MOST_INPUTS, block = BLOCK_BYTES / 4 / row_bytes / TILE * TILE;
    part = part < MOST_INPUTS ? MOST_INPUTS : part;
    block = block < TILE ? TILE : block;
    for (int from = begin; from < end; from += block) {
        int many = least(block, end - from);
        for (int j0 = 0; j0 < nx; j0 += part)
            for (int r = from; r < from + many; r += TILE) {
                Packed w = packed_rows(a, first + r, 1, first + end - 1);
                for (int j = j0, count; j < least(j0 + part, nx); j += count) {
                    count = next_inputs(least(j0 + part, nx) - j);
                    packed_products(a, &w, inputs + j, count, planes, (Ahead){j == j0 ? TILE * (int64_t)row_bytes : 0, 0}, sums);
                    for (int k = 0; k < count; k++) {
                        const float *by = factor ? factor + j + k : NULL;
                        if (r + TILE <= end)
                            put_tile(a, w.rows[0], sums[k], by, out[j + k] + r);
                        else
                            for (int l = 0; r + l < end; l++)
                                put(a, w.rows[l], sums[k][l], by, out[j + k] + r + l);
                    }
                }
            }
    }
}

/* `product` for few inputs: the weights come from memory, and a few long streams come twice as fast
   as adjacent rows. */
static void product_of_few(const Matrix *a, int64_t first, int begin, int end, const float *const *x, int nx, float *const *out,
                           const float *factor)
{
    int cols = a->cols, part = (end - begin + TILE - 1) / TILE;
    int64_t row_bytes = row_bytes_of(a);
    for (int i = 0; i < part; i++) {
        const float *w[TILE];
        int64_t rows[TILE];
        int r[TILE];
        for (int l = 0; l < TILE; l++) {
            r[l] = begin + i + l * part;
            /* Beyond the end the last row is computed again, and not put. */
            rows[l] = first + least(r[l], end - 1);
            w[l] = (const float *)a->weight + rows[l] * cols;
        }
        for (int j = 0, count; j < nx; j += count) {
            four sums[MOST_INPUTS];
            count = next_inputs(nx - j);
            Ahead ahead = ahead_of(j, count, nx, row_bytes, row_bytes);
            float_products(w, x + j, count, cols, ahead, sums);
            for (int k = j; k < j + count; k++)
                for (int l = 0; l < TILE; l++)
                    if (r[l] < end)
                        put(a, first + r[l], sums[k - j][l], factor ? factor + k : NULL, out[k] + r[l]);
        }
    }
}

/* Rows first + [begin, end) of `a` times the inputs x[j], put into out[j] from `begin` on. Many inputs
   pass a block of weights in parts, so that both come from caches. */
static void product(const Matrix *a, int64_t first, int begin, int end, const float *const *x, int nx, float *const *out,
                    const float *factor, int planes, float *room)
{
    if (a->groups || a->scale) {
        product_of_packed(a, first, begin, end, x, nx, out, factor, planes, room);
        return;
    }
    if (nx <= FEW) {
        product_of_few(a, first, begin, end, x, nx, out, factor);
        return;
    }
    int cols = a->cols, block = BLOCK_BYTES / 4 / cols / TILE * TILE;
    int part = NEAR_BYTES / 4 / cols / MOST_INPUTS * MOST_INPUTS;
    if (part < MOST_INPUTS)
        part = MOST_INPUTS;
    if (block < TILE)
        block = TILE;
    int64_t distance = (int64_t)block * 4 * cols;
    for (int from = begin; from < end; from += block) {
        int rows = least(block, end - from);
        for (int j0 = 0; j0 < nx; j0 += part)
            for (int r = 0; r < rows; r += TILE) {
                const float *w[TILE];
                for (int l = 0; l < TILE; l++)
                    w[l] = (const float *)a->weight + (first + from + least(r + l, rows - 1)) * cols;
                for (int j = j0, count; j < least(j0 + part, nx); j += count) {
                    four sums[MOST_INPUTS];
                    count = next_inputs(least(j0 + part, nx) - j);
                    float_products(w, x + j, count, cols, ahead_of(j, count, nx, 4 * cols, distance), sums);
                    for (int k = j; k < j + count; k++) {
                        const float *by = factor ? factor + k : NULL;
                        float *to = out[k] + from + r;
                        if (r + TILE <= rows)
                            put_tile(a, first + from + r, sums[k - j], by, to);
                        else
                            for (int l = 0; r + l < rows; l++)
                                put(a, first + from + r + l, sums[k - j][l], by, to + l);
                    }
                }
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
        product(a, 0, begin, end, xs, count, outs, add ? factors : NULL, p->planes, room);
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

/* The values of a cache that some queries see: positions start to last, the first in `slot`. */
typedef struct { const float *values; int D, start, last, slot, capacity; } Seen;

/* `chunks` vectors of the outputs of some queries, from element d on: the sum over positions of the
   scores [query][position] times the values, over the queries' totals. */
INLINE void weigh(const Seen *s, const float *const *scores, const float *totals, float *const *out, int d, const int QUERIES,
                  const int CHUNKS)
{
    vec sums[MOST_QUERIES][4] = {0};
    for (int at = s->start, slot = s->slot; at <= s->last; at++) {
        const float *v = s->values + (int64_t)slot * s->D + d;
        for (int r = 0; r < QUERIES; r++)
            for (int c = 0; c < CHUNKS; c++)
                sums[r][c] = FMA(ALL(scores[r][at]), LOAD_FLOATS(v + c * LANES), sums[r][c]);
        slot = slot + 1 == s->capacity ? 0 : slot + 1;
    }
    for (int r = 0; r < QUERIES; r++)
        for (int c = 0; c < CHUNKS; c++)
            *(vec *)(out[r] + d + c * LANES) = sums[r][c] / ALL(totals[r]);
}

/* `weigh` from d on, as far as whole groups of CHUNKS vectors go. */
#define WEIGH(QUERIES, CHUNKS)                                                                                  \
    for (; d + CHUNKS * LANES <= D; d += CHUNKS * LANES)                                                        \
        weigh(s, scores, totals, out, d, QUERIES, CHUNKS);

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

/* `weigh` for all elements. Those queries that fill a call repeat the last one. */
static void weigh_all(const Seen *s, const float *const *scores, const float *totals, float *const *out, int queries)
{
    int d = 0, D = s->D;
    if (queries == 1) {
        WEIGH(1, 4)
        WEIGH(1, 2)
        WEIGH(1, 1)
    } else if (queries == 2) {
        WEIGH(2, 4)
        WEIGH(2, 1)
    } else if (queries <= 4) {
        WEIGH(4, 2)
        WEIGH(4, 1)
    } else {
        WEIGH(MOST_QUERIES, 2)
        WEIGH(MOST_QUERIES, 1)
    }
    for (; d < D; d++)
        for (int r = 0; r < queries; r++)
            weigh_one(s, scores[r], totals[r], out[r], d);
}

/* `heads` heads from h on, which have the same keys, of `rows` following rows of one text from row i
   on (in a ring 1), over the keys of its cache that they see; into y. rows * heads: at most
   MOST_QUERIES. Bits are the same in any group while values are finite: a share of 0 times an
   infinite value of another row is not a number.
   scores: room for MOST_QUERIES times as many floats as keys and lanes. */
static void attend(const Pass *p, const Block *b, int l, int i, int rows, int h, int heads, float *scores, int width)
{
    const Model *m = p->m;
    int D = m->D, g = h / (m->H / m->G), last = p->positions[i] + rows - 1, stride = (last + LANES) / LANES * LANES;
    int queries = rows * heads;
    /* From a whole vector on, so that a row's last vector ends within its stride. The sum's bits do not
       need it: `sum_of` adds lanes i and i + LANES / 2, then quarters, ..., so lanes may be turned. What
       lies before a row's window has the share 0; in a ring it may be a later position's key. */
    int start = first_of(b, p->positions[i]) / LANES * LANES;
    const float *keys = p->keys[p->caches[i] * m->L + l] + (int64_t)g * b->capacity * D;
    const float *values = p->values[p->caches[i] * m->L + l] + (int64_t)g * b->capacity * D;
    Seen seen = {values, D, start, last, b->is_ring ? start % b->capacity : start, b->capacity};
    const float *q[MOST_QUERIES], *scores_of[MOST_QUERIES];
    float scale = 1.0f / sqrtf(D), *out[MOST_QUERIES], totals[MOST_QUERIES];
    for (int r = 0; r < MOST_QUERIES; r++) {
        int own = least(r, queries - 1), row = i + own / heads, head = h + own % heads;
        q[r] = p->q + ((int64_t)row * m->H + head) * D;
        out[r] = p->y + (int64_t)row * width + head * D;
        scores_of[r] = scores + own * stride;
    }
    for (int at = start; at <= last; at += TILE) {
        const float *k[TILE];
        for (int s = 0; s < TILE; s++)
            k[s] = keys + (int64_t)(b->is_ring ? least(at + s, last) % b->capacity : least(at + s, last)) * D;
        for (int r = 0, count; r < queries; r += count) {
            four sums[MOST_INPUTS];
            count = next_inputs(queries - r);
            float_products(k, q + r, count, D, (Ahead){0}, sums);
            for (int j = 0; j < count; j++)
                *(four *)(scores + (r + j) * stride + at) = sums[j] * scale;
        }
    }
    for (int r = 0; r < queries; r++) {
        int position = p->positions[i] + r / heads, first = first_of(b, position), head = h + r % heads;
        float *mine = scores + r * stride, largest = b->sinks ? b->sinks[head] : -INFINITY;
        if (b->attention_bias)
            for (int at = first; at <= position; at++)
                mine[at] += b->attention_bias[((int64_t)head * m->table + position) * m->table + at];
        /* What a row does not see, and what fills the last vector. */
        for (int at = start; at < first; at++)
            mine[at] = -INFINITY;
        for (int at = position + 1; at < start + (last - start + LANES) / LANES * LANES; at++)
            mine[at] = -INFINITY;
        vec most = ALL(largest), total = {0};
        for (int at = start; at <= last; at += LANES) {
            vec x = *(vec *)(mine + at);
            ints more = x > most;
            most = (vec)(((ints)x & more) | ((ints)most & ~more));
        }
        for (int lane = 0; lane < LANES; lane++)
            largest = most[lane] > largest ? most[lane] : largest;
        for (int at = start; at <= last; at += LANES)
            total += *(vec *)(mine + at) = share_of(*(vec *)(mine + at) - largest);
        /* A sink adds to the denominator only. */
        totals[r] = sum_of(total) + (b->sinks ? expf(b->sinks[head] - largest) : 0.0f);
    }
    for (int r = queries; r < MOST_QUERIES; r++)
        totals[r] = totals[queries - 1];
    weigh_all(&seen, scores_of, totals, out, queries);
}

/* This thread's share of the attention of all rows. Rows that follow one another in one text, and
   heads that share keys, are taken together, as far as each thread gets a part. */
static void attention(const Pass *p, const Block *b, int l, int t, float *scores, int width)
{
    int unit = 0, sharing = p->m->H / p->m->G, wide = (p->n * p->m->H + p->team - 1) / p->team;
    for (int i = 0, rows; i < p->n; i += rows) {
        for (rows = 1; rows < MOST_QUERIES && i + rows < p->n && p->caches[i + rows] == p->caches[i] && !b->is_ring; rows++)
            ;
        int most = least(least(MOST_QUERIES / rows, wide), sharing);
        for (int h = 0, heads; h < p->m->H; h += heads) {
            heads = least(most, sharing - h % sharing);
            if (unit++ % p->team == t)
                attend(p, b, l, i, rows, h, heads, scores, width);
        }
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

/* The router's logits [E] of one row. */
static void route(const Model *m, const Block *b, const float *y, float *logits)
{
    int e = 0, C = m->C;
    for (; e + TILE <= m->E; e += TILE) {
        const float *w[TILE];
        for (int i = 0; i < TILE; i++)
            w[i] = b->router + (int64_t)(e + i) * C;
        float_products(w, &y, 1, C, (Ahead){0}, (four *)(logits + e));
    }
    for (; e < m->E; e++)
        logits[e] = dot(b->router + (int64_t)e * C, y, C);
    for (e = 0; b->router_bias && e < m->E; e++)
        logits[e] += b->router_bias[e];
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
                product(&b->w_out, (int64_t)e * m->C, begin, end, xs, count, outs, factors, p->planes, room);
                continue;
            }
            product(&b->w_in, (int64_t)e * b->w_in.rows, begin, end, xs, count, outs, NULL, p->planes, room);
            if (m->activation != GELU)
                product(&b->w_in, (int64_t)e * b->w_in.rows + F, begin, end, xs, count, ups, NULL, p->planes, room);
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
        memcpy(p->x + (int64_t)i * C, (const float *)m->embed.weight + p->ids[i] * C, sizeof(float) * C);
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
            route(m, b, y, room);
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
        product(&m->head, 0, begin, end, xs, count, outs, NULL, p->planes, room);
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
int gptoss_sizes(int which)
{
    return which == 0 ? sizeof(Matrix) : which == 1 ? sizeof(Block) : which == 2 ? sizeof(Model) : which == 3 ? sizeof(Pass) : sizeof(Wide);
}
