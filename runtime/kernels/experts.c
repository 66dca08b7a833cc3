/* All experts of a block, forward and backward: gather, both products, activation, weighted sum.

   The mathematics of model_parts.LocalDispatcher and Experts. Rows are (token, expert) assignments,
   sorted by expert; the n rows of an expert are read where their tokens lie. A task is an expert, or
   a part of one with many rows, and one thread does it. Parts depend on the number of rows alone,
   and every sum has one order, so the results are the same bits on any number of threads.

   N tokens, K experts of each, R rows (N * K), E experts, C d_model, F d_ff, I = F, or 2F where the
   activation is gated: gate before up. w_in [E, I, C], w_out [E, C, F]. */
#include "tiles.h"

enum { GELU, SWIGLU, SWIGLU_CLAMPED };
#define LIMIT 7             /* of SWIGLU_CLAMPED, as in config_model.py */
#define STEEPNESS 1.702

/* Rows that one task has at most: what it keeps of them stays in the second cache. */
#define MOST_ROWS 252
/* Parts of the gradient of a weight whose expert has several tasks. */
#define PARTS 4
#define TOKENS 64           /* that are summed in one task */

typedef struct {
    int64_t N, R, C, F, I, E, K;
    int32_t activation, threads;
    Parallel parallel;
    const int64_t *counts;      /* [E] */
    const int64_t *experts;     /* [N, K], or NULL: rows are tokens, sorted already */
    const real *x;              /* [N, C] */
    const real *weights;        /* [N, K] with experts, else NULL */
    const real *w_in, *b_in, *w_out, *b_out;  /* biases [E, I], [E, C], or NULL */
    real *h;                    /* [R, I] */
    real *y_rows, *y;           /* [R, C], [N, C]; without experts, y_rows is y */
    /* Backward. What is NULL is not wanted. */
    const real *grad;           /* [N, C] */
    real *grad_h, *a;           /* [R, I], [R, F] room: a is the activation times the row's weight */
    real *grad_x_rows, *grad_x, *grad_weights, *grad_w_in, *grad_b_in, *grad_w_out, *grad_b_out;
    /* Room: [R], [R], [R + E + 1] of 3 numbers. */
    int64_t *order, *inverse, *tasks;
    real *rooms;
    int64_t room_size;          /* gptoss_room of it for each thread */
} Experts;

typedef struct { int64_t expert, first, count; } Part;

static const real *token_of(const Experts *p, const real *x, int64_t row)
{
    return x + (p->experts ? p->order[row] / p->K : row) * p->C;
}

/* --------------------------------------------------------------------------------- activations */
/* The activation of `count` values; gated: of gate and up. */
INLINE vec activate(int activation, vec h, vec up)
{
    vec density;
    if (activation == GELU)
        return h * normal_share(h, &density);
    if (activation == SWIGLU)
        return h * sigmoid_of(h) * up;
    h = at_most(h, LIMIT);
    return h * sigmoid_of(h * ALL(STEEPNESS)) * (at_most(at_least(up, -LIMIT), LIMIT) + 1);
}

/* The same, and the gradients of h and up from that of the result. */
INLINE vec activate_backward(int activation, vec h, vec up, vec grad, vec *grad_h, vec *grad_up)
{
    if (activation == GELU) {
        vec density, share = normal_share(h, &density);
        *grad_h = grad * (share + h * density * ALL(0.39894228040143267794));
        return h * share;
    }
    if (activation == SWIGLU) {
        vec sigmoid = sigmoid_of(h), a = h * sigmoid;
        *grad_up = grad * a;
        *grad_h = grad * up * (sigmoid + a * (1 - sigmoid));
        return a * up;
    }
    vec gate = at_most(h, LIMIT), other = at_most(at_least(up, -LIMIT), LIMIT) + 1;
    vec sigmoid = sigmoid_of(gate * ALL(STEEPNESS)), a = gate * sigmoid;
    *grad_up = choose((up >= -LIMIT) & (up <= LIMIT), grad * a, ALL(0));
    *grad_h = choose(h <= LIMIT, grad * other * (sigmoid + a * ALL(STEEPNESS) * (1 - sigmoid)), ALL(0));
    return a * other;
}

INLINE void activate_row(const int activation, int64_t F, const real *h, real *a)
{
    for (int64_t f = 0; f < F; f += LANES) {
        vec up = some(h + (activation == GELU ? 0 : F) + f, F - f);
        put(a + f, activate(activation, some(h + f, F - f), up), F - f);
    }
}

/* From a row's hidden layer h [I] and the gradient grad_a [F] of its activation before it is
   weighted: grad_h [I] and the weighted activation a [F], which may be NULL. Return the gradient of
   the weight. */
INLINE real backward_row(const int activation, int64_t F, const real *h, const real *grad_a, real weight,
                         real *grad_h, real *a)
{
    vec grad_weight = ALL(0);
    for (int64_t f = 0; f < F; f += LANES) {
        int64_t left = F - f;
        vec g = some(grad_a + f, left), up = some(h + (activation == GELU ? 0 : F) + f, left);
        vec grad_gate, grad_up = ALL(0);
        vec value = activate_backward(activation, some(h + f, left), up, g * weight, &grad_gate, &grad_up);
        /* Beyond the end g is 0. */
        grad_weight += value * g;
        put(grad_h + f, grad_gate, left);
        if (activation != GELU)
            put(grad_h + F + f, grad_up, left);
        if (a)
            put(a + f, value * weight, left);
    }
    return sum_of(grad_weight);
}

static real dot(const real *a, const real *b, int64_t count)
{
    vec sum = ALL(0);
    for (int64_t i = 0; i < count; i += LANES)
        sum += some(a + i, count - i) * some(b + i, count - i);
    return sum_of(sum);
}

/* --------------------------------------------------------------------------------- tasks */
/* What a thread needs at once: pointers to a task's rows, twice, and the larger of a panel and
   [MOST_ROWS, F], and what `sum_over_rows` needs. */
static int64_t room_of(int64_t F, int64_t most_rows)
{
    int64_t pointers = most(most_rows, MOST_ROWS) * 2 * sizeof(real *) / sizeof(real);
    return pointers + most(DEPTH * COLUMNS + MOST_ROWS * F, SUM_ROOM) + 2 * LANES;
}

/* Sort assignments by expert, each expert's in the tokens' order. Return 0 if that fits counts. */
static int sort_rows(const Experts *p)
{
    int64_t sum = 0, starts[p->E + 1];
    for (int64_t e = 0; e < p->E; e++) {
        if (p->counts[e] < 0)
            return 1;
        starts[e] = sum;
        sum += p->counts[e];
    }
    if (sum != p->R)
        return 1;
    if (!p->experts)
        return 0;
    for (int64_t i = 0; i < p->R; i++) {
        int64_t e = p->experts[i];
        if (e < 0 || e >= p->E)
            return 1;
        if (starts[e] >= p->R)
            return 1;
        p->inverse[i] = starts[e];
        p->order[starts[e]++] = i;
    }
    sum = 0;
    for (int64_t e = 0; e < p->E; e++)
        if (starts[e] != (sum += p->counts[e]))
            return 1;
    return 0;
}

static int by_count(const void *a, const void *b)
{
    const Part *x = a, *y = b;
    return x->count != y->count ? (x->count < y->count) - (x->count > y->count)
                                : (x->expert > y->expert) - (x->expert < y->expert);
}

/* Parts of experts, the largest first; return how many. */
static int64_t list_parts(const Experts *p)
{
    Part *parts = (Part *)p->tasks;
    int64_t made = 0, first = 0;
    for (int64_t e = 0; e < p->E; e++) {
        int64_t n = p->counts[e], pieces = most((n + MOST_ROWS - 1) / MOST_ROWS, 1);
        int64_t size = most(rounded_up((n + pieces - 1) / pieces, ROWS), 1);
        for (int64_t at = 0; at == 0 || at < n; at += size)
            parts[made++] = (Part){e, first + at, least(size, n - at)};
        first += n;
    }
    qsort(parts, made, sizeof(Part), by_count);
    return made;
}

static void forward_part(void *job, int64_t task, real *room)
{
    const Experts *p = job;
    Part part = ((Part *)p->tasks)[task];
    int64_t e = part.expert, n = part.count, C = p->C, F = p->F, I = p->I;
    if (!n)
        return;
    const real **rows = (const real **)room, **hidden = rows + MOST_ROWS;
    real *panel = (real *)(hidden + MOST_ROWS), *a = panel + DEPTH * COLUMNS, *h = p->h + part.first * I;
    for (int64_t r = 0; r < n; r++) {
        rows[r] = token_of(p, p->x, part.first + r);
        hidden[r] = a + r * F;
    }
    Factor in = {p->w_in + e * I * C, C, C, I, 1}, out = {p->w_out + e * C * F, F, F, C, 1};
    product_with(&in, n, rows, p->b_in ? p->b_in + e * I : NULL, h, I, panel);
    for (int64_t r = 0; r < n; r++)
        if (p->activation == GELU)
            activate_row(GELU, F, h + r * I, a + r * F);
        else if (p->activation == SWIGLU)
            activate_row(SWIGLU, F, h + r * I, a + r * F);
        else
            activate_row(SWIGLU_CLAMPED, F, h + r * I, a + r * F);
    product_with(&out, n, hidden, p->b_out ? p->b_out + e * C : NULL, p->y_rows + part.first * C, C, panel);
}

/* The gradients of an expert's weights from the rows of all its parts: of w_in (0) or w_out (1),
   one of `parts` pieces of its rows, with the biases in the first. */
static void weight_gradients(const Experts *p, int64_t e, int64_t first, int64_t n, int is_out, int64_t piece,
                             int64_t parts, real *room)
{
    int64_t C = p->C, F = p->F, I = p->I, M = is_out ? C : I, N = is_out ? F : C;
    real *weight = is_out ? p->grad_w_out : p->grad_w_in, *bias = is_out ? p->grad_b_out : p->grad_b_in;
    const real **a = (const real **)room, **b = a + most(n, MOST_ROWS);
    int64_t size = rounded_up((M + parts - 1) / parts, ROWS);
    int64_t begin = least(M, piece * size), end = least(M, begin + size);
    for (int64_t r = 0; r < n; r++) {
        a[r] = is_out ? token_of(p, p->grad, first + r) : p->grad_h + (first + r) * I;
        b[r] = is_out ? p->a + (first + r) * F : token_of(p, p->x, first + r);
    }
    if (weight && n)
        sum_over_rows(0, n, a, begin, end, b, N, weight + e * M * N, (real *)(b + most(n, MOST_ROWS)));
    else if (weight)
        memset(weight + (e * M + begin) * N, 0, (end - begin) * N * sizeof(real));
    if (!bias)
        return;
    memset(bias + e * M + begin, 0, (end - begin) * sizeof(real));
    for (int64_t r = 0; r < n; r++) {
        real factor = is_out && p->weights ? p->weights[p->order[first + r]] : 1;
        for (int64_t m = begin; m < end; m++)
            bias[e * M + m] += a[r][m] * factor;
    }
}

static void backward_part(void *job, int64_t task, real *room)
{
    const Experts *p = job;
    Part part = ((Part *)p->tasks)[task];
    int64_t e = part.expert, n = part.count, C = p->C, F = p->F, I = p->I;
    int in = p->grad_x_rows || p->grad_w_in || p->grad_b_in || p->grad_weights;
    const real **rows = (const real **)room, **hidden = rows + MOST_ROWS;
    real *panel = (real *)(hidden + MOST_ROWS), *grad_a = panel + DEPTH * COLUMNS;
    for (int64_t r = 0; r < n; r++) {
        rows[r] = token_of(p, p->grad, part.first + r);
        hidden[r] = p->grad_h + (part.first + r) * I;
    }
    Factor out_back = {p->w_out + e * C * F, F, C, F, 0}, in_back = {p->w_in + e * I * C, C, I, C, 0};
    if (n && in)
        product_with(&out_back, n, rows, NULL, grad_a, F, panel);
    for (int64_t r = 0; r < n; r++) {
        int64_t row = part.first + r;
        real weight = p->weights ? p->weights[p->order[row]] : 1, grad_weight;
        const real *h = p->h + row * I, *given = in ? grad_a + r * F : h;
        real *to = p->grad_h + row * I, *a = p->a ? p->a + row * F : NULL;
        if (p->activation == GELU)
            grad_weight = backward_row(GELU, F, h, given, weight, to, a);
        else if (p->activation == SWIGLU)
            grad_weight = backward_row(SWIGLU, F, h, given, weight, to, a);
        else
            grad_weight = backward_row(SWIGLU_CLAMPED, F, h, given, weight, to, a);
        if (p->grad_weights)
            p->grad_weights[p->order[row]] = grad_weight + (p->b_out ? dot(rows[r], p->b_out + e * C, C) : 0);
    }
    if (n && p->grad_x_rows)
        product_with(&in_back, n, hidden, NULL, p->grad_x_rows + part.first * C, C, panel);
    if (part.count == p->counts[e])
        for (int is_out = 0; is_out < 2; is_out++)
            weight_gradients(p, e, part.first, n, is_out, 0, 1, room);
}

/* A piece of the weights' gradients of an expert that several tasks have prepared. */
static void gradient_part(void *job, int64_t task, real *room)
{
    const Experts *p = job;
    Part part = ((Part *)p->tasks)[task / (2 * PARTS)];
    weight_gradients(p, part.expert, part.first, part.count, task / PARTS % 2, task % PARTS, PARTS, room);
}

/* Sum each token's rows, weighted in the forward pass. */
static void sum_rows(const Experts *p, int64_t task, const real *weights, const real *rows, real *out)
{
    int64_t C = p->C, K = p->K;
    for (int64_t t = task * TOKENS; t < least(p->N, (task + 1) * TOKENS); t++)
        for (int64_t k = 0; k < K; k++) {
            const real *row = rows + p->inverse[t * K + k] * C;
            real weight = weights ? weights[t * K + k] : 1, *to = out + t * C;
            if (k)
                for (int64_t c = 0; c < C; c++)
                    to[c] += weight * row[c];
            else
                for (int64_t c = 0; c < C; c++)
                    to[c] = weight * row[c];
        }
}

static void sum_forward(void *job, int64_t task, real *room)
{
    const Experts *p = job;
    (void)room;
    sum_rows(p, task, p->weights, p->y_rows, p->y);
}

static void sum_backward(void *job, int64_t task, real *room)
{
    const Experts *p = job;
    (void)room;
    sum_rows(p, task, NULL, p->grad_x_rows, p->grad_x);
}

static void all_tasks(const Experts *p, Task task, int64_t tasks)
{
    int threads = threads_for(p->threads, p->R * p->C * (p->I + p->F));
    in_parallel(p->parallel, threads, task, (void *)p, tasks, p->rooms, p->room_size);
}

/* --------------------------------------------------------------------------------- the entries */
/* Values of room that each thread needs; most_rows: of one expert. */
int64_t gptoss_room(int64_t F, int64_t most_rows) { return room_of(F, most_rows); }

/* Parts at most, each of 3 numbers. */
int64_t gptoss_parts(int64_t R, int64_t E) { return R / (MOST_ROWS / 2) + 2 * E + 1; }

int64_t gptoss_size(void) { return sizeof(Experts); }

/* Return 0, or 1 where counts and experts do not fit. */
int gptoss_experts_forward(const Experts *p)
{
    if (sort_rows(p))
        return 1;
    all_tasks(p, forward_part, list_parts(p));
    if (p->experts)
        all_tasks(p, sum_forward, (p->N + TOKENS - 1) / TOKENS);
    return 0;
}

int gptoss_experts_backward(const Experts *p)
{
    if (sort_rows(p))
        return 1;
    all_tasks(p, backward_part, list_parts(p));
    if (p->experts && p->grad_x)
        all_tasks(p, sum_backward, (p->N + TOKENS - 1) / TOKENS);
    /* Experts whose rows were cut. */
    Part *parts = (Part *)p->tasks;
    int64_t cut = 0, first = 0;
    for (int64_t e = 0; e < p->E; first += p->counts[e++])
        if (p->counts[e] > MOST_ROWS)
            parts[cut++] = (Part){e, first, p->counts[e]};
    qsort(parts, cut, sizeof(Part), by_count);
    if (p->grad_w_in || p->grad_b_in || p->grad_w_out || p->grad_b_out)
        all_tasks(p, gradient_part, cut * 2 * PARTS);
    return 0;
}
