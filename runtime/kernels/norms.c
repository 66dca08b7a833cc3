/* RMSNorm of rows, and their rotation by a position's angle: forward and backward, each
   in one pass over memory.

   R rows of n numbers. With a weight: y = x / sqrt(mean(x x) + eps) * weight. With tables [T, n] a row
   is a head, H of a token, and y's pairs (i, i + n / 2) are rotated as model_parts.rotate does it.
   A task is some rows. Sums over rows are made within a task, then over the tasks in their order. */
#include "tiles.h"

typedef struct {
    int64_t R, n, T, H, threads, task_rows;
    double eps;
    Parallel parallel;
    const real *x, *weight, *cos, *sin, *grad;   /* all but x and, backward, grad: or NULL */
    real *y, *scales;           /* [R, n], [R] 1 / root mean square, where there is a weight */
    real *grad_x, *grad_weight; /* the second may be NULL */
    real *sums;                 /* [tasks, n] where there is a weight */
} Rows;

/* The tables' numbers of a row. */
INLINE int64_t table_of(const Rows *p, int64_t row) { return row / p->H % p->T * p->n; }

static real scale_of(const Rows *p, const real *x)
{
    /* Four sums, as each addition waits for the one before. */
    vec sums[4] = {ALL(0), ALL(0), ALL(0), ALL(0)};
    int64_t i = 0;
    for (; i + 4 * LANES <= p->n; i += 4 * LANES)
        for (int part = 0; part < 4; part++) {
            vec v = LOAD(x + i + part * LANES);
            sums[part] += v * v;
        }
    for (; i < p->n; i += LANES) {
        vec v = some(x + i, p->n - i);
        sums[0] += v * v;
    }
    return (real)(1 / sqrt((double)sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) / p->n + p->eps));
}

static void forward(void *job, int64_t task, real *room)
{
    const Rows *p = job;
    int64_t n = p->n, half = n / 2, end = least((task + 1) * p->task_rows, p->R);
    const real *weight = p->weight;
    (void)room;
    for (int64_t r = task * p->task_rows; r < end; r++) {
        const real *x = p->x + r * n;
        real *y = p->y + r * n;
        vec scale = ALL(1);
        if (weight) {
            p->scales[r] = scale_of(p, x);
            scale = ALL(p->scales[r]);
        }
        if (!p->cos) {
            FOR_VECTORS(n, {
                put(y + i, some(x + i, left) * scale * some(weight + i, left), left);
            })
            continue;
        }
        const real *cos = p->cos + table_of(p, r), *sin = p->sin + table_of(p, r);
        FOR_VECTORS(half, {
            vec a = some(x + i, left), b = some(x + half + i, left);
            if (weight) {
                a = a * scale * some(weight + i, left);
                b = b * scale * some(weight + half + i, left);
            }
            put(y + i, a * some(cos + i, left) - b * some(sin + i, left), left);
            put(y + half + i, b * some(cos + half + i, left) + a * some(sin + half + i, left), left);
        })
    }
}

/* The gradient before the rotation. */
static const real *turned_back(const Rows *p, int64_t row, real *to)
{
    const real *grad = p->grad + row * p->n, *cos, *sin;
    int64_t half = p->n / 2;
    if (!p->cos)
        return grad;
    cos = p->cos + table_of(p, row);
    sin = p->sin + table_of(p, row);
    FOR_VECTORS(half, {
        vec a = some(grad + i, left), b = some(grad + half + i, left);
        put(to + i, a * some(cos + i, left) + b * some(sin + half + i, left), left);
        put(to + half + i, b * some(cos + half + i, left) - a * some(sin + i, left), left);
    })
    return to;
}

static void backward(void *job, int64_t task, real *room)
{
    const Rows *p = job;
    int64_t n = p->n, end = least((task + 1) * p->task_rows, p->R);
    const real *weight = p->weight;
    /* Also for a frozen weight: x's gradient keeps its bits. */
    real *sums = p->sums + task * n;
    (void)room;
    if (weight)
        memset(sums, 0, n * sizeof(real));
    for (int64_t r = task * p->task_rows; r < end; r++) {
        const real *x = p->x + r * n;
        real *out = p->grad_x + r * n;
        const real *grad = turned_back(p, r, out);
        if (!weight)
            continue;
        vec total = ALL(0), scale = ALL(p->scales[r]);
        FOR_VECTORS(n, {
            vec product = some(grad + i, left) * some(x + i, left) * scale;
            total += product * some(weight + i, left);
            put(sums + i, some(sums + i, left) + product, left);
        })
        vec mean = ALL(sum_of(total) / n);
        FOR_VECTORS(n, {
            vec product = some(x + i, left) * scale * mean;
            put(out + i, (some(grad + i, left) * some(weight + i, left) - product) * scale, left);
        })
    }
}

static int64_t tasks_of(const Rows *p) { return (p->R + p->task_rows - 1) / p->task_rows; }

/* Rows of a task: some 32 KB. */
int64_t gptoss_task_rows(int64_t n) { return most(1, 8192 / n); }

int64_t gptoss_size(void) { return sizeof(Rows); }

/* A number costs about as much as this many multiplications of a product. */
enum { WORK = 16 };

void gptoss_norms_forward(const Rows *p)
{
    in_parallel(p->parallel, threads_for(p->threads, WORK * p->R * p->n), forward, (void *)p, tasks_of(p), NULL, 0);
}

void gptoss_norms_backward(const Rows *p)
{
    in_parallel(p->parallel, threads_for(p->threads, WORK * p->R * p->n), backward, (void *)p, tasks_of(p), NULL, 0);
    for (int64_t i = 0; p->grad_weight && i < p->n; i++) {
        double sum = 0;
        for (int64_t task = 0; task < tasks_of(p); task++)
            sum += p->sums[task * p->n + i];
        p->grad_weight[i] = (real)sum;
    }
}
