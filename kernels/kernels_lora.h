/* Launchers of LoRA over adapter segments. Meanings and layouts are those of ops/ops.h
 * (qv_lora_site, qv_embed_lora_site, qv_moe_lora_site): planes spaced by the pool's rank, B
 * transposed. Which slots have a pair is read from device memory, so that a captured graph serves
 * any adapters: a slot without one has rank 0 in its slices, or an entry that is all zero. A and B
 * are BF16.
 *
 * Grids are sized by n_tokens and n_segs; blocks of segments without a pair leave at once.
 */
#ifndef QV_KERNELS_KERNELS_LORA_H
#define QV_KERNELS_KERNELS_LORA_H

#include "common/status.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QV_K_MAX_SLICES 16
#define QV_K_MAX_RANK   512

/* As qv_lora_slice. */
typedef struct {
    int32_t plane, rank;
    float scale;
    int32_t reserved;
} qv_k_lora_slice;

/* By value into kernels: where slices start. */
typedef struct {
    int32_t n;
    int32_t start[QV_K_MAX_SLICES + 1];
} qv_k_slices;

typedef struct {
    int32_t n_tokens, n_segs;
    const int32_t *seg_start, *seg_slot; /* [n_segs + 1], [n_segs] */
    uint8_t one_form; /* 1: sum in the same order however many tokens there are */
} qv_k_segments;

typedef struct {
    const void *a;                 /* [n_slots, n_slices (planes), max_rank, n_in] */
    const void *b;                 /* [n_slots, max_rank, n_out] */
    const qv_k_lora_slice *slices; /* [n_slots, n_slices] */
    int64_t n_in, n_out;
    int32_t max_rank, n_slots;
    qv_k_slices ranges;
} qv_k_lora_site;

/* y += delta; y BF16, or F32 with y_f32. scratch [n_tokens, n_slices, max_rank].
 * Errors: LIMIT (slices, rank), DEVICE. */
qv_status qv_k_lora(const qv_k_segments *segments, const qv_k_lora_site *site, const void *x,
                    int64_t x_stride, float *scratch, void *y, int64_t y_stride, bool y_f32,
                    void *stream);

/* The first half of it: x1 = A x for the tokens of adapters, into scratch. A kernel that is
 * launched right behind may start once all before this is complete. */
qv_status qv_k_lora_shrink(const qv_k_segments *segments, const qv_k_lora_site *site, const void *x,
                           int64_t x_stride, float *x1, void *stream);

/* As qv_embed_lora_slot. */
typedef struct {
    const void *a, *b; /* [n_vocab, max_rank], [max_rank, n_out] */
    int32_t max_rank, rank;
    float scale;
    int32_t reserved;
} qv_k_embed_lora_slot;

/* y float32. Errors: DEVICE. */
qv_status qv_k_embed_lora(const qv_k_segments *segments, const qv_k_embed_lora_slot *slots,
                          int32_t max_rank, int64_t n_out, const int32_t *ids, void *y,
                          int64_t y_stride, void *stream);

/* As qv_moe_lora_slot. */
typedef struct {
    const void *a, *b;
    const qv_k_lora_slice *slices;
    int32_t max_rank;
    uint8_t a_shared, b_shared, reserved[2];
} qv_k_moe_lora_slot;

typedef struct {
    const qv_k_moe_lora_slot *slots; /* [n_slots] */
    int64_t n_in, n_out;
    int32_t max_rank;
    qv_k_slices ranges;
} qv_k_moe_lora_site;

#ifdef __cplusplus
}
#endif
#endif
