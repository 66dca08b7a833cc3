/* What a router makes of its scores, forward and backward: a softmax, the experts of each token and
   their weights, and what the losses and the log say of all tokens.

   N tokens, E experts, K of them for each token. model_parts.py has the same in PyTorch's operations
   (Router, MoE.routed). A task is some tokens. Sums over tokens are made within a task, then over the
   tasks in their order. */
#include "tiles.h"

typedef struct {
    int64_t N, E, K, threads, task_rows;
    Parallel parallel;
    const real *logits, *selection;   /* [N, E], [E] added to the shares for the choice, or NULL */
    real *shares, *weights, *logs;    /* [N, E] softmax, in the place of logits or not; [N, K];
                                         [N] log of the sum of exponentials */
    int64_t *experts, *counts;        /* [N, K], [E] */
    real *mean, *z_loss, *entropy;    /* [E] mean of the softmax, mean of logs squared, mean entropy (nats) */
    real *sums;                       /* [tasks, E + 2] */
    const real *grad_weights, *grad_mean, *grad_z_loss; /* [N, K], [E], one; each may be NULL */
    real *grad_logits;                /* [N, E] */
} Router;

/* The best K by share and expert bias, the first of equals. Any order among numbers that are none:
   the experts are different ones in any case. */
static void choose_experts(const Router *p, const real *share, int64_t *chosen)
{
    for (int64_t k = 0; k < p->K; k++) {
        int64_t best = -1;
        real highest = 0;
        for (int64_t e = 0; e < p->E; e++) {
            real score = p->selection ? share[e] + p->selection[e] : share[e];
            if (best >= 0 && score <= highest)
                continue;
            int64_t j = 0;
            while (j < k && chosen[j] != e)
                j++;
            if (j == k)
                best = e, highest = score;
        }
        chosen[k] = best;
    }
}

static void forward(void *job, int64_t task, real *room)
{
    const Router *p = job;
    int64_t E = p->E, K = p->K, end = least((task + 1) * p->task_rows, p->N);
    real *sums = p->sums + task * (E + 2);
    double squares = 0, entropy = 0;
    (void)room;
    memset(sums, 0, E * sizeof(real));
    for (int64_t n = task * p->task_rows; n < end; n++) {
        const real *x = p->logits + n * E;
        real *share = p->shares + n * E, highest = x[0], weight = 0;
        for (int64_t e = 1; e < E; e++)
            highest = x[e] > highest ? x[e] : highest;
        vec mean = ALL(0), all = ALL(0);
        FOR_VECTORS(E, {
            /* From where exp_of changes no more: a share of nothing has an entropy, too. */
            vec under = at_least(some(x + i, left) - highest, -87);
            put(share + i, exp_of(under), left);
            /* Read again: 0 where there is no expert. */
            vec s = some(share + i, left);
            all += s;
            mean += s * under;
        })
        real total = sum_of(all), log_total = (real)log((double)total);
        FOR_VECTORS(E, {
            vec s = some(share + i, left) / total;
            put(share + i, s, left);
            put(sums + i, some(sums + i, left) + s, left);
        })
        entropy += log_total - sum_of(mean) / total;
        p->logs[n] = highest + log_total;
        squares += (double)p->logs[n] * p->logs[n];
        int64_t *chosen = p->experts + n * K;
        choose_experts(p, share, chosen);
        for (int64_t k = 0; k < K; k++)
            weight += share[chosen[k]];
        for (int64_t k = 0; k < K; k++)
            p->weights[n * K + k] = share[chosen[k]] / weight;
    }
    sums[E] = (real)squares;
    sums[E + 1] = (real)entropy;
}

static void backward(void *job, int64_t task, real *room)
{
    const Router *p = job;
    int64_t E = p->E, K = p->K, end = least((task + 1) * p->task_rows, p->N);
    (void)room;
    for (int64_t n = task * p->task_rows; n < end; n++) {
        const real *share = p->shares + n * E;
        real *grad = p->grad_logits + n * E;
        /* d z_loss / d log, and what each share gets from the mean and, through the softmax, from all. */
        real all = p->grad_z_loss ? 2 * *p->grad_z_loss * p->logs[n] / p->N : 0;
        if (p->grad_mean) {
            vec mean = ALL(0);
            FOR_VECTORS(E, mean += some(share + i, left) * some(p->grad_mean + i, left);)
            all -= sum_of(mean) / p->N;
        }
        FOR_VECTORS(E, {
            vec of_share = ALL(all);
            if (p->grad_mean)
                of_share += some(p->grad_mean + i, left) / ALL(p->N);
            put(grad + i, some(share + i, left) * of_share, left);
        })
        if (!p->grad_weights)
            continue;
        /* The weights add to 1, so that the softmax's own sum over them is 0. */
        const real *weight = p->weights + n * K, *given = p->grad_weights + n * K;
        real mean = 0;
        for (int64_t k = 0; k < K; k++)
            mean += given[k] * weight[k];
        for (int64_t k = 0; k < K; k++)
            grad[p->experts[n * K + k]] += weight[k] * (given[k] - mean);
    }
}

static int64_t tasks_of(const Router *p) { return (p->N + p->task_rows - 1) / p->task_rows; }

/* Tokens of a task: some 32 KB. */
int64_t gptoss_task_rows(int64_t E) { return most(1, 8192 / E); }

int64_t gptoss_size(void) { return sizeof(Router); }

/* A score costs about as much as this many multiplications of a product. */
enum { WORK = 64 };

void gptoss_router_forward(const Router *p)
{
    int64_t tasks = tasks_of(p), E = p->E;
    in_parallel(p->parallel, threads_for(p->threads, WORK * p->N * E), forward, (void *)p, tasks, NULL, 0);
    for (int64_t i = 0; i < E + 2; i++) {
        double sum = 0;
        for (int64_t task = 0; task < tasks; task++)
            sum += p->sums[task * (E + 2) + i];
        *(i < E ? p->mean + i : i == E ? p->z_loss : p->entropy) = (real)(sum / p->N);
    }
    memset(p->counts, 0, E * sizeof(int64_t));
    for (int64_t r = 0; r < p->N * p->K; r++)
        p->counts[p->experts[r]]++;
}

void gptoss_router_backward(const Router *p)
{
    in_parallel(p->parallel, threads_for(p->threads, WORK * p->N * p->E), backward, (void *)p, tasks_of(p), NULL, 0);
}
