/* Sequences of several lengths that go through an op with a state in steps of a few tokens each,
 * for the tests of such ops.
 */
#ifndef QV_TESTS_OPS_STEPS_H
#define QV_TESTS_OPS_STEPS_H

#include "tests/ops/ops_test.h"

#define MAX_SEQS 4
#define N_SLOTS  6

static const int32_t lengths[MAX_SEQS] = {1, 150, 2, 33};
static const int32_t slots[MAX_SEQS] = {4, 0, 5, 2};

static inline int64_t n_all(void)
{
    int64_t n = 0;
    for (int i = 0; i < MAX_SEQS; i++)
        n += lengths[i];
    return n;
}

/* A step: up to `chunk` tokens of every sequence that has some left. from[i] is the token's place
 * in the whole. Returns the number of tokens. */
typedef struct {
    int32_t seq_start[MAX_SEQS + 1], state_slot[MAX_SEQS], pos[256], from[256];
    qv_batch batch;
} step;

static inline int32_t next_step(step *s, int32_t *done, int32_t chunk)
{
    int32_t n = 0, n_seqs = 0, base = 0;
    s->seq_start[0] = 0;
    for (int i = 0; i < MAX_SEQS; base += lengths[i++]) {
        int32_t more = lengths[i] - done[i] < chunk ? lengths[i] - done[i] : chunk;
        if (more == 0)
            continue;
        for (int32_t t = 0; t < more; t++, n++) {
            s->pos[n] = done[i] + t;
            s->from[n] = base + done[i] + t;
        }
        done[i] += more;
        s->state_slot[n_seqs] = slots[i];
        s->seq_start[++n_seqs] = n;
    }
    s->batch = (qv_batch){.n_tokens = n,
                          .n_seqs = n_seqs,
                          .pos = s->pos,
                          .seq_start = s->seq_start,
                          .state_slot = s->state_slot};
    return n;
}

static inline void take_rows(float *dst, const float *src, const int32_t *from, int32_t n,
                             int64_t d)
{
    for (int32_t i = 0; i < n; i++)
        memcpy(dst + i * d, src + from[i] * d, (size_t)d * sizeof *dst);
}

static inline void put_rows(float *dst, const float *src, const int32_t *from, int32_t n, int64_t d)
{
    for (int32_t i = 0; i < n; i++)
        memcpy(dst + from[i] * d, src + i * d, (size_t)d * sizeof *dst);
}

#endif
