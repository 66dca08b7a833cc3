/* Sums of squares of many arrays, in double: as exact for any length, at the speed of memory. */
#include "tiles.h"

/* Values of one task. */
#define PIECE 65536

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef double doubles __attribute__((vector_size(32)));

typedef struct {
    int64_t tasks;
    const float *const *arrays;     /* of each task: where it begins, and how many values */
    const int64_t *counts;
    double *sums;
} Squares;

static void one_piece(void *job, int64_t task, real *room)
{
    const Squares *p = job;
    const float *x = p->arrays[task];
    int64_t i = 0, count = p->counts[task];
    doubles sums[4] = {{0}, {0}, {0}, {0}};
    (void)room;
    for (; i + 16 <= count; i += 16)
        for (int j = 0; j < 4; j++) {
            doubles wide = __builtin_convertvector(*(const four *)(x + i + 4 * j), doubles);
            sums[j] += wide * wide;
        }
    doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double sum = (all[0] + all[1]) + (all[2] + all[3]);
    for (; i < count; i++)
        sum += (double)x[i] * x[i];
    p->sums[task] = sum;
}

/* Values of a piece: longer arrays are given in pieces. */
int64_t gptoss_piece(void) { return PIECE; }

void gptoss_squares(Parallel parallel, int threads, int64_t tasks, const float *const *arrays,
                    const int64_t *counts, double *sums)
{
    Squares job = {tasks, arrays, counts, sums};
    in_parallel(parallel, threads, one_piece, &job, tasks, NULL, 0);
}
