/* Memory, copies, batches and weights of the CUDA backend. */
#include "tests/ops/cuda_test.h"
#include "tests/ops/upload_test.h"

Test(cuda_memory, is_zero_when_new_and_keeps_what_is_uploaded)
{
    duo d = open_duo(1);
    static const size_t sizes[] = {1, 63, 4096, ((size_t)8 << 20) + 12345};
    for (size_t i = 0; i < QV_ROWS(sizes); i++) {
        void *block;
        unsigned char *got = must(malloc(sizes[i])), *want = must(malloc(sizes[i]));
        PASS(qv_backend_alloc(d.dev, sizes[i], &block));
        PASS(qv_backend_download(d.dev, got, block, sizes[i]));
        for (size_t j = 0; j < sizes[i]; j++)
            cr_assert_eq(got[j], 0, "byte %zu of %zu is not zero", j, sizes[i]);
        for (size_t j = 0; j < sizes[i]; j++)
            want[j] = (unsigned char)(j * 31 + j / 251);
        PASS(qv_backend_upload(d.dev, block, want, sizes[i]));
        PASS(qv_backend_download(d.dev, got, block, sizes[i]));
        cr_assert_eq(memcmp(got, want, sizes[i]), 0, "%zu bytes came back changed", sizes[i]);
        PASS(qv_backend_zero(d.dev, block, sizes[i]));
        PASS(qv_backend_download(d.dev, got, block, sizes[i]));
        cr_assert_eq(got[sizes[i] - 1], 0);
        qv_backend_free(d.dev, block);
        free(got);
        free(want);
    }
    close_duo(&d);
}

Test(cuda_memory, takes_pieces_of_an_upload_where_they_belong)
{
    duo d = open_duo(1);
    check_upload(d.dev);
    check_upload(d.dev); /* through memory that has been used */
    close_duo(&d);
}

Test(cuda_memory, an_upload_waits_for_what_reads_its_place)
{
    duo d = open_duo(1);
    check_upload_order(d.dev);
    close_duo(&d);
}

Test(cuda_memory, refuses_more_than_there_is_and_goes_on)
{
    duo d = open_duo(1);
    void *block;
    FAIL_WITH(QV_ERR_NOMEM, "are free", qv_backend_alloc(d.dev, (size_t)1 << 50, &block));
    PASS(qv_backend_alloc(d.dev, 1 << 20, &block));
    qv_backend_free(d.dev, block);
    PASS(qv_backend_sync(d.dev));
    close_duo(&d);
}

Test(cuda_memory, brings_a_batch_over_in_one_piece)
{
    duo d = open_duo(1);
    const int32_t token[] = {5, 6, 7, 8}, pos[] = {10, 11, 12, 0}, seq_start[] = {0, 3, 4};
    const int32_t pages[] = {3, 1, 4, -1}, slots[] = {2, 0}, seg_start[] = {0, 4}, seg[] = {-1};
    const int32_t rows[] = {2, 3};
    qv_batch host = {.n_tokens = 4,
                     .n_seqs = 2,
                     .token = token,
                     .pos = pos,
                     .seq_start = seq_start,
                     .page_table = pages,
                     .page_stride = 2,
                     .state_slot = slots,
                     .n_segs = 1,
                     .seg_start = seg_start,
                     .seg_slot = seg,
                     .n_logits = 2,
                     .logit_row = rows};
    qv_batch dev;
    for (int i = 0; i < 3; i++) {
        PASS(qv_backend_put_batch(d.dev, &host, &dev));
        const struct {
            const char *name;
            const int32_t *dev, *host;
            size_t n;
        } arrays[] = {
            {"token", dev.token, token, 4},
            {"pos", dev.pos, pos, 4},
            {"seq_start", dev.seq_start, seq_start, 3},
            {"page_table", dev.page_table, pages, 4},
            {"state_slot", dev.state_slot, slots, 2},
            {"seg_start", dev.seg_start, seg_start, 2},
            {"seg_slot", dev.seg_slot, seg, 1},
            {"logit_row", dev.logit_row, rows, 2},
        };
        for (size_t j = 0; j < QV_ROWS(arrays); j++) {
            int32_t got[4];
            PASS(qv_backend_download(d.dev, got, arrays[j].dev, arrays[j].n * sizeof *got));
            cr_assert_eq(memcmp(got, arrays[j].host, arrays[j].n * sizeof *got), 0, "%s",
                         arrays[j].name);
        }
    }
    cr_assert_eq(dev.max_seq_tokens, 3);
    cr_assert_eq(dev.max_context, 13);
    cr_assert_null(dev.logit_seg_start);
    close_duo(&d);
}
