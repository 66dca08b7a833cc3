/* Cross-entropy of a linear layer: logits, softmax and all gradients of some rows at a time.

   The mathematics of runtime/kernels/linear_cross_entropy.py. For each chunk of rows: logits h W' + b
   (a task is a range of ids), their softmax minus the target (a task is a row), the gradient of h
   (rows) and of W and b (ids). Every sum has one order, on any number of threads.

   N rows, C d_model, V vocabulary; chunk: rows whose logits are held. */
#include "tiles.h"

typedef struct {
    int64_t N, C, V, chunk, ignore;
    int32_t threads, unused;
    Parallel parallel;
    const real *h, *weight, *bias;      /* [N, C], [V, C], [V] or NULL */
    const int64_t *targets;             /* [N], `ignore` where a row does not count */
    double *losses;                     /* [N] */
    /* Gradients of the sum of losses. What is NULL is not wanted. */
    real *grad_h, *grad_weight, *grad_bias;
    real *logits;                       /* [chunk, V] room */
    real *rooms;
    int64_t room_size;
    int64_t first, count;               /* the rows of this chunk */
} Loss;

/* Ids of one task. */
#define IDS 256

static const real **rows_of(const real *first, int64_t step, int64_t count, real *room)
{
    const real **rows = (const real **)room;
    for (int64_t r = 0; r < count; r++)
        rows[r] = first + r * step;
    return rows;
}

static real *after_rows(const Loss *p, real *room) { return room + 2 * p->chunk * sizeof(real *) / sizeof(real); }

static void logits_of_ids(void *job, int64_t task, real *room)
{
    const Loss *p = job;
    int64_t first = task * IDS, C = p->C, V = p->V;
    Factor f = {p->weight + first * C, C, C, least(V - first, IDS), 1};
    product_with(&f, p->count, rows_of(p->h + p->first * C, C, p->count, room), p->bias ? p->bias + first : NULL,
            p->logits + first, V, after_rows(p, room));
}

static void softmax_of_row(void *job, int64_t task, real *room)
{
    const Loss *p = job;
    int64_t V = p->V, target = p->targets[p->first + task];
    real *x = p->logits + task * V;
    int counts = target != p->ignore, wanted = p->grad_h || p->grad_weight || p->grad_bias;
    (void)room;
    if (!counts) {
        p->losses[p->first + task] = 0;
        if (wanted)
            memset(x, 0, V * sizeof(real));
        return;
    }
    vec largest = ALL(-INFINITY);
    int64_t whole_vectors = V / LANES * LANES;
    /* What is not a number stays: it has to show. */
    for (int64_t v = 0; v < whole_vectors; v += LANES)
        largest = choose(LOAD(x + v) <= largest, largest, LOAD(x + v));
    real top = largest[0], at_target = x[target];
    for (int l = 1; l < LANES; l++)
        top = largest[l] <= top ? top : largest[l];
    for (int64_t v = whole_vectors; v < V; v++)
        top = x[v] <= top ? top : x[v];
    double sum = 0;
    for (int64_t v = 0; v < V;) {
        vec part = ALL(0);
        /* So few additions in one precision that they are as exact as the exponential function. */
        for (int i = 0; i < 16 && v < V; i++, v += LANES) {
            int64_t left = V - v;
            vec y = some(x + v, left) - top, e = exp_of(y);
            /* Below e^-87 the function stays there: such a share is 0. */
            e = choose(y < -87, ALL(0), e);
            for (int64_t l = left; l < LANES; l++)
                e[l] = 0;
            put(x + v, e, left);
            part += e;
        }
        sum += sum_of(part);
    }
    p->losses[p->first + task] = log(sum) + ((double)top - at_target);
    if (!wanted)
        return;
    real factor = 1 / sum;
    for (int64_t v = 0; v < V; v += LANES)
        put(x + v, some(x + v, V - v) * factor, V - v);
    /* Rounded once. */
    x[target] = expm1((double)at_target - top - log(sum));
}

/* Rows of one task: each thread gets one. A row's sums are the same in any group. */
static int64_t lines_of(const Loss *p)
{
    return rounded_up((p->count + p->threads - 1) / p->threads, ROWS);
}

static void gradient_of_rows(void *job, int64_t task, real *room)
{
    const Loss *p = job;
    int64_t lines_at_once = lines_of(p), first = task * lines_at_once, C = p->C, V = p->V;
    int64_t count = least(p->count - first, lines_at_once);
    const real **rows = rows_of(p->logits + first * V, V, count, room);
    real *panels = after_rows(p, room), *out = p->grad_h + (p->first + first) * C;
    for (int64_t k = 0; k < V; k += DEPTH) {
        int64_t depth = least(V - k, DEPTH);
        const real *lines[DEPTH];
        for (int64_t d = 0; d < depth; d++)
            lines[d] = p->weight + (k + d) * C;
        for (int64_t n = 0; n < C; n += COLUMNS) {
            int64_t columns = least(C - n, COLUMNS);
            pack(lines, n, depth, columns, panels);
            rows_times(k ? SUM : ZERO, count, rows, k, panels, depth, NULL, out + n, C, columns);
        }
    }
}

static void gradient_of_ids(void *job, int64_t task, real *room)
{
    const Loss *p = job;
    int64_t first = task * IDS, end = least(p->V, first + IDS), C = p->C;
    const real **rows = rows_of(p->logits, p->V, p->count, room);
    const real **h = rows_of(p->h + p->first * C, C, p->count, (real *)(rows + p->chunk));
    if (p->grad_weight)
        sum_over_rows(p->first > 0, p->count, rows, first, end, h, C, p->grad_weight, after_rows(p, room));
    if (p->grad_bias)
        for (int64_t r = 0; r < p->count; r++)
            for (int64_t v = first; v < end; v++)
                p->grad_bias[v] = (p->first || r ? p->grad_bias[v] : 0) + rows[r][v];
}

/* Values of room that each thread needs. */
int64_t gptoss_room(int64_t chunk)
{
    return 2 * chunk * sizeof(real *) / sizeof(real) + most(DEPTH * COLUMNS, SUM_ROOM) + 2 * LANES;
}

int64_t gptoss_size(void) { return sizeof(Loss); }

/* Return 0, or 1 where a target is no id. */
int gptoss_loss(Loss *p)
{
    for (int64_t r = 0; r < p->N; r++)
        if (p->targets[r] != p->ignore && (p->targets[r] < 0 || p->targets[r] >= p->V))
            return 1;
    int64_t ids = (p->V + IDS - 1) / IDS;
    p->threads = threads_for(p->threads, least(p->N, p->chunk) * p->C * p->V);
    for (p->first = 0; p->first < p->N; p->first += p->chunk) {
        p->count = least(p->chunk, p->N - p->first);
        in_parallel(p->parallel, p->threads, logits_of_ids, p, ids, p->rooms, p->room_size);
        in_parallel(p->parallel, p->threads, softmax_of_row, p, p->count, p->rooms, p->room_size);
        if (p->grad_h)
            in_parallel(p->parallel, p->threads, gradient_of_rows, p, (p->count + lines_of(p) - 1) / lines_of(p),
                        p->rooms, p->room_size);
        if (p->grad_weight || p->grad_bias)
            in_parallel(p->parallel, p->threads, gradient_of_ids, p, ids, p->rooms, p->room_size);
    }
    return 0;
}
