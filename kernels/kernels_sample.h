/* Launcher of sampling: qv_op_sample for rows of logits on the device.
 */
#ifndef QV_KERNELS_KERNELS_SAMPLE_H
#define QV_KERNELS_KERNELS_SAMPLE_H

#include "common/status.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QV_K_MAX_TOP 32

/* One token of a row's prompt or answer, for penalties. Each token once a row. */
typedef struct {
    int32_t token, count; /* how often it was generated */
    float raw;            /* out: its logit before */
} qv_k_sample_seen;

typedef struct {
    int32_t target; /* >= 0: score it and do nothing else */
    int32_t top_k, n_top;
    float temperature, top_p, min_p;
    float presence_penalty, frequency_penalty, repetition_penalty;
    int32_t seen, n_seen;     /* its part of args.seen */
    int32_t banned, n_banned; /* its part of args.banned */
    int32_t
        list; /* which list of candidates is its; -1: none, top-k and top-p go over all logits */
    int32_t after; /* the last of its seen tokens is what that row of the results before chose, and
                    * may be among the others; -1: it is a token like them */
    int32_t keep;  /* of shortlists: tokens to choose among; 0: the row is scored; -1: not short */
    double u;      /* the draw, in [0, 1) */
} qv_k_sample_row;

#define QV_K_SAMPLE_NOT_FINITE (-1) /* in token: why there is none */
#define QV_K_SAMPLE_ALL_BANNED (-2)

typedef struct {
    int32_t token;
    float logprob;
    int32_t n_top;
    int32_t top_token[QV_K_MAX_TOP];
    float top_logprob[QV_K_MAX_TOP];
} qv_k_sample_result;

typedef struct {
    float *logits; /* [n_rows, n_vocab], rows `stride` apart; changed */
    int64_t stride;
    int32_t n_rows, n_vocab, n_valid;
    const qv_k_sample_row *rows; /* [n_rows] */
    qv_k_sample_seen *seen;
    const int32_t *banned;
    qv_k_sample_result *results; /* [n_rows] */
    int32_t n_lists, n_drawn;    /* lists of candidates; rows with a temperature */
    void *scratch;               /* of qv_k_sample_scratch bytes */
} qv_k_sample_args;

/* Tokens that the host did not know when it enqueued this: token[i] < 0 becomes what row
 * -1 - token[i] of `chosen` chose (0 if that row had none). In place, n numbers. */
qv_status qv_k_take_chosen(int32_t *token, int32_t n, const qv_k_sample_result *chosen,
                           void *stream);

/* Before qv_k_sample: settle the last seen token of the rows that have `after`. If it is among the
 * row's others, its count grows and the row has one less. Rows are changed. */
qv_status qv_k_sample_settle(qv_k_sample_row *rows, int32_t n_rows, qv_k_sample_seen *seen,
                             const qv_k_sample_result *chosen, void *stream);

/* With room for the lists of n_lists rows, at most n_rows. */
size_t qv_k_sample_scratch(int32_t n_rows, int32_t n_vocab, int32_t n_lists);
qv_status qv_k_sample(const qv_k_sample_args *args, void *stream);

/* Lists of one part of the vocabulary, as shortlist.h lays them out. `part` has the logits of the
 * part and rows whose ids count from its first; a target that is not here is -1. No lists for
 * top-k, no results. */
typedef struct {
    qv_k_sample_args part;
    int64_t first;    /* id of column 0 */
    int32_t k, n_top; /* what lists have room for */
    int32_t *lists;   /* [n_rows, words] */
} qv_k_shortlist_args;

qv_status qv_k_shortlist(const qv_k_shortlist_args *args, void *stream);

/* Results of rows that are short from the lists of all parts, side by side. */
typedef struct {
    const int32_t *lists;        /* [n_rows, n_parts, words] */
    const qv_k_sample_row *rows; /* [n_rows]; their targets count in the whole vocabulary */
    int32_t n_rows, n_parts, k, n_top;
    qv_k_sample_result *results; /* [n_rows] */
    void *scratch;               /* of qv_k_merge_scratch bytes */
} qv_k_merge_args;

size_t qv_k_merge_scratch(int32_t n_rows, int32_t n_parts, int32_t k);
qv_status qv_k_merge_shortlists(const qv_k_merge_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif
