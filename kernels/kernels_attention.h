/* Launchers of causal attention over paged keys and values. BF16 in and out, softmax and sums in
 * float32, probabilities rounded to BF16 before they meet the values.
 */
#ifndef QV_KERNELS_KERNELS_ATTENTION_H
#define QV_KERNELS_KERNELS_ATTENTION_H

#include "kernels/kernels_dense.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const int32_t *pos, *seq_start, *page_table;
    int32_t n_tokens, n_seqs, page_stride, page_tokens;
    int32_t n_heads, n_kv_heads, head_dim;
    float scale;
    qv_k_rows q, o;                /* [n_tokens, n_heads, head_dim] */
    qv_k_rows gate;                /* the same, or data NULL: o, rounded, times its sigmoid */
    const void *k_pages, *v_pages; /* [n_pages, page_tokens, n_kv_heads, head_dim] */
    int64_t n_pages;
    bool hopper;                         /* the device has wgmma: compute capability 9.x */
    int32_t max_seq_tokens, max_context; /* bounds; decides which kernels are launched */
    int32_t n_splits;   /* of decode: pieces of a context at most; depends on the shape of the batch
                         * alone, so that a recorded launch serves all contexts */
    void *scratch;      /* of qv_k_attention_scratch bytes; of decode */
    uint32_t *counters; /* [n_seqs * n_kv_heads], all 0, and 0 again afterwards */
    uint8_t one_form;   /* 1: single tokens by the prefill kernel as well, so that what a token gets
                         * depends on its position and its context alone; no scratch, no counters */
} qv_k_attention_args;

/* How many pieces of a context decode works on at once: enough to fill the device with this batch.
 */
int32_t qv_k_attention_splits(int32_t n_seqs, int32_t n_kv_heads, int32_t n_sms);
size_t qv_k_attention_scratch(int32_t n_seqs, int32_t n_heads, int32_t head_dim, int32_t n_splits);

/* Sequences with one token in this step by the decode kernel, all others by the prefill kernel;
 * head dims 64, 128 and 256 with up to 16 heads a KV head and rows on 16 bytes. */
bool qv_k_attention_can(const qv_k_attention_args *args);
qv_status qv_k_attention(const qv_k_attention_args *args, void *stream);

/* Any head dim up to 1024 and any alignment, slowly. Errors: LIMIT. */
qv_status qv_k_any_attention(const qv_k_attention_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif
