/* Newton-Schulz steps of many matrices: X becomes a X + (b S + c S S) X, with S = X X'.

   A task is a matrix. S and S S are symmetric, so half of each is multiplied and the rest is copied:
   of the products of a square matrix, a third is saved. N matrices, R rows, C columns, R <= C. */
#include "tiles.h"

typedef struct {
    int64_t N, R, C, steps;
    real *x;                    /* [N, R, C], in place */
    const real *factors;        /* [steps, 3] a, b, c */
    real *rooms;
    int64_t room_size;
    Parallel parallel;
    int64_t threads;
} Matrices;

/* out [R, R] = X X' for rows [R, C], row by row. */
static void square(int64_t R, int64_t C, const real *x, const real *const *rows, real *out, real *panel)
{
    for (int64_t n = 0; n < R; n += COLUMNS) {
        int64_t columns = least(R - n, COLUMNS);
        for (int64_t k = 0; k < C; k += DEPTH) {
            int64_t depth = least(C - k, DEPTH);
            pack_transposed(x + n * C + k, C, depth, columns, panel);
            rows_times(k ? SUM : ZERO, n + columns, rows, k, panel, depth, NULL, out + n, R, columns);
        }
        for (int64_t i = n; i < n + columns; i++)
            for (int64_t j = 0; j < n; j++)
                out[i * R + j] = out[j * R + i];
    }
}

static int64_t pointers_of(int64_t R) { return rounded_up(R * sizeof(real *) / sizeof(real), LANES); }

static void one_matrix(void *job, int64_t task, real *room)
{
    const Matrices *p = job;
    int64_t R = p->R, C = p->C;
    const real **rows = (const real **)room, **squares = (const real **)(room + pointers_of(R));
    real *panel = room + 2 * pointers_of(R), *s = panel + DEPTH * COLUMNS, *f = s + R * R, *y = f + R * R;
    real *x = p->x + task * R * C, *given = x;
    for (int64_t r = 0; r < R; r++)
        squares[r] = s + r * R;
    for (int64_t step = 0; step < p->steps; step++) {
        const real *factor = p->factors + 3 * step;
        for (int64_t r = 0; r < R; r++) {
            rows[r] = x + r * C;
            squares[r] = s + r * R;
        }
        square(R, C, x, rows, s, panel);
        square(R, R, s, squares, f, panel);
        for (int64_t i = 0; i < R * R; i++)
            f[i] = factor[1] * s[i] + factor[2] * f[i];
        for (int64_t i = 0; i < R * C; i++)
            y[i] = factor[0] * x[i];
        for (int64_t r = 0; r < R; r++)
            squares[r] = f + r * R;
        for (int64_t n = 0; n < C; n += COLUMNS) {
            int64_t columns = least(C - n, COLUMNS);
            for (int64_t k = 0; k < R; k += DEPTH) {
                int64_t depth = least(R - k, DEPTH);
                pack(rows + k, n, depth, columns, panel);
                rows_times(SUM, R, squares, k, panel, depth, NULL, y + n, C, columns);
            }
        }
        real *other = x;
        x = y;
        y = other;
    }
    if (x != given)
        memcpy(given, x, R * C * sizeof(real));
}

/* Values of room that each thread needs. */
int64_t gptoss_room(int64_t R, int64_t C)
{
    return 2 * pointers_of(R) + DEPTH * COLUMNS + 2 * R * R + R * C + 2 * LANES;
}

int64_t gptoss_size(void) { return sizeof(Matrices); }

void gptoss_newton_schulz(const Matrices *p)
{
    in_parallel(p->parallel, threads_for(p->threads, p->N * p->R * p->R * p->C), one_matrix, (void *)p, p->N, p->rooms, p->room_size);
}
