/* Plans to batches: every array of a small mixed plan, and segments. */
#include "worker/batch_build.h"

#include <criterion/criterion.h>
#include <string.h>

static void expect(const char *what, const int32_t *got, const int32_t *want, int n)
{
    for (int i = 0; i < n; i++)
        cr_expect_eq(got[i], want[i], "%s[%d] is %d, not %d", what, i, got[i], want[i]);
}
#define EXPECT(got, ...)                                                                           \
    expect(#got, got, (const int32_t[]){__VA_ARGS__},                                              \
           sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t))

static const qv_batch_limits limits = {
    .max_tokens = 32, .max_seqs = 8, .max_logits = 16, .max_seq_pages = 4};

Test(batch_build, lays_out_a_mixed_plan)
{
    int32_t a_tokens[] = {10, 11, 12, 13, 14}, a_pages[] = {7, 3};
    int32_t b_tokens[] = {20, 21, 22, 23}, b_pages[] = {5};
    int32_t c_tokens[] = {30, 31, 32}, c_pages[] = {1};
    int32_t d_tokens[] = {40, 41}, d_pages[] = {2};
    qv_sequence a = {.tokens = a_tokens,
                     .n_prompt = 4,
                     .n_tokens = 5,
                     .n_computed = 4,
                     .pages = a_pages,
                     .n_pages = 2,
                     .state_slot = 3,
                     .adapter_slot = -1};
    qv_sequence b = {.tokens = b_tokens,
                     .n_prompt = 4,
                     .n_tokens = 4,
                     .n_computed = 1,
                     .score_prompt = true,
                     .next_score = 1,
                     .pages = b_pages,
                     .n_pages = 1,
                     .state_slot = 0,
                     .adapter_slot = 1};
    qv_sequence c = {.tokens = c_tokens,
                     .n_prompt = 3,
                     .n_tokens = 3,
                     .pages = c_pages,
                     .n_pages = 1,
                     .state_slot = 1,
                     .adapter_slot = 1};
    qv_sequence d = {.tokens = d_tokens,
                     .n_prompt = 2,
                     .n_tokens = 2,
                     .pages = d_pages,
                     .n_pages = 1,
                     .state_slot = 2,
                     .adapter_slot = 4};
    qv_plan_item items[] = {
        {&a, 1, qv_sequence_logit_rows(&a, 1)}, /* decode, base */
        {&b, 3, qv_sequence_logit_rows(&b, 3)}, /* the rest of a scored prompt */
        {&c, 2, qv_sequence_logit_rows(&c, 2)}, /* a chunk without logits */
        {&d, 2, qv_sequence_logit_rows(&d, 2)},
    };
    qv_plan plan = {.items = items, .n_items = 4, .n_tokens = 8, .n_logits = 5};
    qv_batch_builder *builder;
    cr_assert_eq(qv_batch_builder_new(&limits, &builder), QV_OK);
    for (int round = 0; round < 2; round++) { /* the second finds nothing of the first */
        const qv_batch *batch = qv_batch_build(builder, &plan);
        cr_expect_eq(batch->n_tokens, 8);
        cr_expect_eq(batch->n_seqs, 4);
        EXPECT(batch->token, 14, 21, 22, 23, 30, 31, 40, 41);
        EXPECT(batch->pos, 4, 1, 2, 3, 0, 1, 0, 1);
        EXPECT(batch->seq_start, 0, 1, 4, 6, 8);
        EXPECT(batch->state_slot, 3, 0, 1, 2);
        cr_expect_eq(batch->page_stride, 2);
        EXPECT(batch->page_table, 7, 3, 5);
        cr_expect_eq(batch->page_table[4], 1);
        cr_expect_eq(batch->page_table[6], 2);
        cr_expect_eq(batch->n_segs, 3);
        EXPECT(batch->seg_start, 0, 1, 6, 8);
        EXPECT(batch->seg_slot, -1, 1, 4);
        cr_expect_eq(batch->n_logits, 5);
        EXPECT(batch->logit_row, 0, 1, 2, 3, 7);
        cr_expect_eq(batch->n_logit_segs, 3);
        EXPECT(batch->logit_seg_start, 0, 1, 4, 5);
        EXPECT(batch->logit_seg_slot, -1, 1, 4);
    }
    qv_batch_builder_free(builder);
}

Test(batch_build, skips_adapters_without_rows_in_the_segments_of_logits)
{
    int32_t tokens[] = {1, 2, 3}, pages[] = {0};
    qv_sequence chunk = {.tokens = tokens,
                         .n_prompt = 3,
                         .n_tokens = 3,
                         .pages = pages,
                         .n_pages = 1,
                         .adapter_slot = 0};
    qv_sequence last = {.tokens = tokens,
                        .n_prompt = 2,
                        .n_tokens = 2,
                        .pages = pages,
                        .n_pages = 1,
                        .adapter_slot = 2};
    qv_plan_item items[] = {{&chunk, 2, qv_sequence_logit_rows(&chunk, 2)},
                            {&last, 2, qv_sequence_logit_rows(&last, 2)}};
    qv_plan plan = {.items = items, .n_items = 2, .n_tokens = 4, .n_logits = 1};
    qv_batch_builder *builder;
    cr_assert_eq(qv_batch_builder_new(&limits, &builder), QV_OK);
    const qv_batch *batch = qv_batch_build(builder, &plan);
    EXPECT(batch->seg_start, 0, 2, 4);
    cr_expect_eq(batch->n_logit_segs, 1);
    EXPECT(batch->logit_seg_start, 0, 1);
    EXPECT(batch->logit_seg_slot, 2);
    EXPECT(batch->logit_row, 3);
    qv_batch_builder_free(builder);
}
