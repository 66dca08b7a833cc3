/* A forward pass of a few tokens on a CPU, at the speed at which their weights can be read.

   The same mathematics as model_parts.py and model.py in float32, over the plain model's own
   parameters and the plain KV cache (runtime/inference/cpu_decode.py passes the pointers). A token
   is a row: an id, a position, and the cache it belongs to. One row, the next rows of many texts,
   or some following rows of one text are the same to this code. Threads share each matrix by its
   output rows and meet at a barrier between steps.

   Letters as in model_parts.py: C d_model, L blocks, H query heads, G key/value heads, D head_dim,
   E experts, K top_k, F d_ff, V vocabulary; n rows. Weights are [outputs, inputs], row by row. */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
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
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (four_ints){__VA_ARGS__})
#endif
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
    float *logits;              /* [num_logits, V] */
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

/* The part of `count` that thread t of `threads` does, in whole tiles. */
static void share(int count, int t, int threads, int *begin, int *end)
{
    int tiles = (count + TILE - 1) / TILE;
    *begin = least(count, (int)((int64_t)tiles * t / threads) * TILE);
    *end = least(count, (int)((int64_t)tiles * (t + 1) / threads) * TILE);
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

/* The sums of four vectors. */
static four sums_of(vec a, vec b, vec c, vec d)
{
    four x = fold(a), y = fold(b), z = fold(c), w = fold(d);
    four xy = SHUFFLE(x, y, 0, 4, 1, 5) + SHUFFLE(x, y, 2, 6, 3, 7), zw = SHUFFLE(z, w, 0, 4, 1, 5) + SHUFFLE(z, w, 2, 6, 3, 7);
    return SHUFFLE(xy, zw, 0, 1, 4, 5) + SHUFFLE(xy, zw, 2, 3, 6, 7);
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
    vec whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = ((((r * 1.98756915e-4f + 1.39819995e-3f) * r + 8.33345191e-3f) * r + 4.16657959e-2f) * r + 1.66666655e-1f) * r + 0.5f;
    return (p * r * r + r + 1.0f) * (vec)((__builtin_convertvector(whole, ints) + 127) << 23);
}

static float dot(const float *a, const float *b, int count)
{
    vec s = {0};
    int i = 0;
    for (; i + LANES <= count; i += LANES)
        s += *(const vec *)(a + i) * *(const vec *)(b + i);
    float sum = sum_of(s);
    for (; i < count; i++)
        sum += a[i] * b[i];
    return sum;
}

static void rms_norm(const float *x, const float *weight, float eps, int count, float *out)
{
    float scale = 1.0f / sqrtf(dot(x, x, count) / count + eps);
    for (int i = 0; i < count; i++)
        out[i] = x[i] * scale * weight[i];
}

/* ------------------------------------------------------------------------------ matrix products */
/* TILE weight rows times 4 inputs. */
static void tile(const float *const w[TILE], const float *const x[4], int cols, float sums[TILE][4])
{
    vec s[TILE][4] = {0};
    int k = 0;
    for (; k + LANES <= cols; k += LANES)
        for (int i = 0; i < TILE; i++)
            for (int j = 0; j < 4; j++)
                s[i][j] += *(const vec *)(w[i] + k) * *(const vec *)(x[j] + k);
    for (int i = 0; i < TILE; i++) {
        *(four *)sums[i] = sums_of(s[i][0], s[i][1], s[i][2], s[i][3]);
        for (int j = 0; j < 4; j++)
            for (int rest = k; rest < cols; rest++)
                sums[i][j] += w[i][rest] * x[j][rest];
    }
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

/* Two weight rows far apart times NX inputs, UNROLL vectors at a time: two long streams come from
   memory twice as fast as four adjacent rows. */
#define PAIR_PRODUCT(NAME, TYPE, LOAD, NX, UNROLL)                                                              \
    static void NAME(const TYPE *const w[2], const float *const x[NX], int cols, float sums[2][4])              \
    {                                                                                                           \
        vec s[2][NX][UNROLL] = {0};                                                                             \
        int k = 0;                                                                                              \
        for (; k + UNROLL * LANES <= cols; k += UNROLL * LANES) {                                               \
            for (int i = 0; i < 2; i++)                                                                         \
                __builtin_prefetch((const char *)(w[i] + k) + AHEAD);                                           \
            for (int u = 0; u < UNROLL; u++)                                                                    \
                for (int i = 0; i < 2; i++)                                                                     \
                    for (int j = 0; j < NX; j++)                                                                \
                        s[i][j][u] += LOAD(w[i] + k + u * LANES) * *(const vec *)(x[j] + k + u * LANES);        \
        }                                                                                                       \
        for (int i = 0; i < 2; i++)                                                                             \
            for (int j = 0; j < NX; j++) {                                                                      \
                for (int u = 1; u < UNROLL; u++)                                                                \
                    s[i][j][0] += s[i][j][u];                                                                   \
                sums[i][j] = sum_of(s[i][j][0]);                                                                \
                for (int rest = k; rest < cols; rest++)                                                         \
                    sums[i][j] += w[i][rest] * x[j][rest];                                                      \
            }                                                                                                   \
    }
PAIR_PRODUCT(floats_by_1, float, LOAD_FLOATS, 1, 2)
PAIR_PRODUCT(floats_by_4, float, LOAD_FLOATS, 4, 1)
PAIR_PRODUCT(bytes_by_1, int8_t, LOAD_BYTES, 1, 2)
PAIR_PRODUCT(bytes_by_4, int8_t, LOAD_BYTES, 4, 1)

/* out[j][r] = value, or += factor[j] * value, for a sum of weights of `row` times input j;
   r: the row's index in the output. */
static void put(const Matrix *a, int64_t row, int r, const float *sums, int nx, float *const *out, const float *factor)
{
    float scale = a->scale ? a->scale[row] : 1.0f, bias = a->bias ? a->bias[row] : 0.0f;
    for (int j = 0; j < least(nx, 4); j++) {
        float value = sums[j] * scale + bias;
        out[j][r] = factor ? out[j][r] + factor[j] * value : value;
    }
}

/* Rows first + [begin, end) of `a` times the inputs x[j], put into out[j] from `begin` on. */
static void product(const Matrix *a, int64_t first, int begin, int end, const float *const *x, int nx, float *const *out,
                    const float *factor, float *room)
{
    int cols = a->cols, half = (end - begin + 1) / 2, few = nx <= 8, rows = few ? 2 : TILE;
    for (int i = 0; i < (few ? half : end - begin); i += few ? 1 : TILE) {
        const float *w[TILE];
        const int8_t *packed[2];
        int r[TILE];
        for (int l = 0; l < rows; l++) {
            r[l] = begin + i + (few ? l * half : l);
            /* Beyond the end the last row is computed again, and not put. */
            int64_t row = first + least(r[l], end - 1);
            if (few)
                packed[l] = (const int8_t *)a->weight + row * cols;
            if (!few || !a->scale)
                w[l] = row_of(a, row, room + (int64_t)l * cols);
        }
        for (int j = 0; j < nx; j += 4) {
            float sums[TILE][4];
            const float *four[4] = {x[j], x[least(j + 1, nx - 1)], x[least(j + 2, nx - 1)], x[least(j + 3, nx - 1)]};
            if (!few)
                tile(w, four, cols, sums);
            else if (nx == 1 && a->scale)
                bytes_by_1(packed, four, cols, sums);
            else if (nx == 1)
                floats_by_1(w, four, cols, sums);
            else if (a->scale)
                bytes_by_4(packed, four, cols, sums);
            else
                floats_by_4(w, four, cols, sums);
            for (int l = 0; l < rows; l++)
                if (r[l] < end)
                    put(a, first + r[l], r[l], sums[l], nx - j, out + j, factor ? factor + j : NULL);
        }
    }
}

/* This thread's share of a whole matrix times the rows x [n, x_stride]; put into out [n, rows], or
   added to it. */
static void linear(const Pass *p, const Matrix *a, const float *x, int x_stride, float *out, int add, int t, float *room)
{
    int begin, end;
    share(a->rows, t, p->team, &begin, &end);
    /* 64: as many inputs as stay in the cache with the weight rows. */
    for (int first = 0; first < p->n; first += 64) {
        const float *xs[64];
        float *outs[64], factors[64];
        int count = least(64, p->n - first);
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

/* Head h of `rows` following rows of one text, from row i on (at most 4), over the keys of its
   cache up to their positions; into y.
   scores: room for four times as many floats as keys. */
static void attend(const Pass *p, const Block *b, int l, int i, int rows, int h, float *scores, int width)
{
    const Model *m = p->m;
    int D = m->D, g = h / (m->H / m->G), last = p->positions[i] + rows - 1, stride = (last + LANES) / LANES * LANES;
    int start = b->window && p->positions[i] >= b->window ? p->positions[i] - b->window + 1 : 0;
    const float *keys = p->keys[p->caches[i] * m->L + l] + (int64_t)g * b->capacity * D;
    const float *values = p->values[p->caches[i] * m->L + l] + (int64_t)g * b->capacity * D;
    const float *q[4];
    for (int r = 0; r < 4; r++)
        q[r] = p->q + ((int64_t)(i + least(r, rows - 1)) * m->H + h) * D;
    float scale = 1.0f / sqrtf(D);
    for (int at = start; at <= last; at += rows == 1 ? 1 : TILE) {
        const float *k[TILE];
        float sums[TILE][4];
        for (int s = 0; s < TILE; s++)
            k[s] = keys + (int64_t)(b->is_ring ? least(at + s, last) % b->capacity : least(at + s, last)) * D;
        if (rows == 1)
            scores[at] = dot(q[0], k[0], D) * scale;
        else {
            tile(k, q, D, sums);
            for (int r = 0; r < rows; r++)
                for (int s = 0; s < TILE && at + s <= last; s++)
                    scores[r * stride + at + s] = sums[s][r] * scale;
        }
    }
    float *out[4], totals[4];
    for (int r = 0; r < rows; r++) {
        float *mine = scores + r * stride, largest = b->sinks ? b->sinks[h] : -INFINITY;
        int position = p->positions[i] + r, first = b->window && position >= b->window ? position - b->window + 1 : 0;
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
            vec x = *(vec *)(mine + at);
            total += *(vec *)(mine + at) = (vec)((ints)exp_of(x) & ~(x < (vec){0} - 87.0f));
        }
        /* A sink adds to the denominator only. */
        totals[r] = sum_of(total) + (b->sinks ? expf(b->sinks[h] - largest) : 0.0f);
        out[r] = p->y + (int64_t)(i + r) * width + h * D;
        memset(out[r], 0, 4 * D);
    }
    for (int at = start; at <= last; at++) {
        const float *v = values + (int64_t)(b->is_ring ? at % b->capacity : at) * D;
        for (int r = 0; r < rows; r++) {
            float w = scores[r * stride + at];
            for (int d = 0; d < D; d++)
                out[r][d] += w * v[d];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int d = 0; d < D; d++)
            out[r][d] /= totals[r];
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
    share(is_out ? m->C : F, t, p->team, &begin, &end);
    for (int e = 0; e < m->E; e++)
        for (int first = p->starts[e]; first < p->starts[e + 1]; first += 64) {
            const float *xs[64];
            float *outs[64], *ups[64], factors[64];
            int count = least(64, p->starts[e + 1] - first);
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
    share(m->V, t, T, &begin, &end);
    for (int first = 0; first < p->num_logits; first += 64) {
        const float *xs[64];
        float *outs[64];
        int count = least(64, p->num_logits - first);
        for (int j = 0; j < count; j++) {
            xs[j] = p->y + (int64_t)(first + j) * C;
            outs[j] = p->logits + (int64_t)(first + j) * m->V;
        }
        product(&m->head, 0, begin, end, xs, count, outs, NULL, room);
    }
}

typedef struct { Pass *pass; int thread; } Start;

static void *run_thread(void *argument)
{
    Start *start = argument;
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
    atomic_store(&p->arrived, 0);
    atomic_store(&p->phase, -1);
    for (p->team = 1; p->team < least(p->m->threads, MOST_THREADS); p->team++) {
        starts[p->team] = (Start){p, p->team};
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
