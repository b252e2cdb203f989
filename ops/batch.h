/* qv_batch: one step of the engine as ops see it - a ragged batch of tokens of many sequences,
 * sorted by adapter so that every adapter's tokens are one segment.
 *
 * All arrays live in memory of the backend (for the CPU: ordinary memory) and stay unchanged until
 * the step has finished. The builder (worker/batch_build.c) owns them. Sequences come in the order
 * of their adapter slot, base (-1) first; tokens come sequence by sequence, oldest first.
 */
#ifndef QV_OPS_BATCH_H
#define QV_OPS_BATCH_H

#include <stdint.h>

/* A token that row `row` of a sampling chooses, in place of its id; and back. Always negative. */
#define QV_TOKEN_OF_ROW(row)   (-1 - (row))
#define QV_ROW_OF_TOKEN(token) (-1 - (token))

typedef struct {
    int32_t n_tokens;
    int32_t n_seqs;

    /* What the host knows of the arrays below, for choosing how to compute: bounds, never less than
     * the truth. 0: not known, n_tokens and page_stride bound them. */
    int32_t max_seq_tokens; /* most tokens of one sequence in this step */
    int32_t max_context;    /* largest position + 1 */

    /* Tokens. On the host one may be QV_TOKEN_OF_ROW(r), whose id nobody there knows yet: what row
     * r of the sampling begun last chose. Bringing the batch to the backend puts the id in its
     * place (a row that had no token to choose: some id). */
    const int32_t *token; /* [n_tokens] ids to embed */
    const int32_t *pos;   /* [n_tokens] position in the sequence, from 0 */

    /* Sequences. A sequence whose first position is 0 starts from zero recurrent state; any other
     * goes on from what its state slot holds. */
    const int32_t *seq_start;  /* [n_seqs + 1] first token of each sequence; last entry n_tokens.
                                * On a device the counts may be padded, so that one recorded step
                                * serves several sizes: sequences without tokens at the end (state
                                * slot -1), and tokens behind the last entry that belong to none;
                                * what is computed for those is never read */
    const int32_t *page_table; /* [n_seqs, page_stride] KV page of positions p/page_tokens */
    int32_t page_stride;
    const int32_t *state_slot; /* [n_seqs] slot of convolution and recurrent state */

    /* Adapter segments over the tokens: [seg_start[i], seg_start[i+1]) uses adapter slot
     * seg_slot[i], -1 meaning no adapter. Segments cover all tokens. */
    int32_t n_segs;
    const int32_t *seg_start; /* [n_segs + 1] */
    const int32_t *seg_slot;  /* [n_segs] */

    /* Rows that need logits, ascending token indices, and their own adapter segments. */
    int32_t n_logits;
    const int32_t *logit_row; /* [n_logits] */
    int32_t n_logit_segs;
    const int32_t *logit_seg_start; /* [n_logit_segs + 1] */
    const int32_t *logit_seg_slot;  /* [n_logit_segs] */
} qv_batch;

/* A batch of nothing: for steps that read none, and to fill a recording with padding. */
extern const qv_batch qv_empty_batch;

#endif
