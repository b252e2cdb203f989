/* What an upload of many pieces does on any backend: every piece in its place, and nothing beside
 * it. */
#ifndef QV_TESTS_OPS_UPLOAD_TEST_H
#define QV_TESTS_OPS_UPLOAD_TEST_H

#include "tests/ops/ops_test.h"

/* Pieces of odd sizes at odd places, more of them than a device takes in one copy; every fifth is
 * zeros, and one is larger than a piece may be. */
static inline void check_upload(qv_backend *be)
{
    enum { N = 9000, LARGE = 3000000, TOTAL = 3800000 };
    unsigned char *want = must(malloc(TOTAL)), *got = must(malloc(TOTAL));
    unsigned char *large = must(malloc(LARGE));
    for (size_t i = 0; i < TOTAL; i++)
        want[i] = (unsigned char)(i * 7 + i / 253);
    for (size_t i = 0; i < LARGE; i++)
        large[i] = (unsigned char)(i * 13 + i / 241);
    void *block;
    PASS(qv_backend_alloc(be, TOTAL, &block));
    PASS(qv_backend_upload(be, block, want, TOTAL));
    qv_upload up;
    PASS(qv_upload_begin(be, &up));
    size_t at = 3;
    for (int i = 0; i < N; i++) {
        size_t bytes = i % 3 == 0 ? 16 : i % 3 == 1 ? 4 * (1 + (size_t)i % 20) : 1 + (size_t)i % 77;
        at = i % 4 == 0 ? (at + 15) / 16 * 16 : at + (size_t)i % 5;
        if (i % 5 == 0) {
            PASS(qv_upload_zero(&up, (char *)block + at, bytes));
            memset(want + at, 0, bytes);
        } else {
            void *piece;
            PASS(qv_upload_piece(&up, (char *)block + at, bytes, &piece));
            memset(piece, i % 251, bytes);
            memset(want + at, i % 251, bytes);
        }
        at += bytes;
    }
    cr_assert_leq(at + LARGE, TOTAL, "%zu", at);
    PASS(qv_upload_copy(&up, (char *)block + at, large, LARGE));
    memcpy(want + at, large, LARGE);
    PASS(qv_upload_end(&up));
    PASS(qv_backend_download(be, got, block, TOTAL));
    for (size_t i = 0; i < TOTAL; i++)
        cr_assert_eq(got[i], want[i], "byte %zu is %d, wanted %d", i, got[i], want[i]);
    qv_backend_free(be, block);
    free(want);
    free(got);
    free(large);
}

/* What was enqueued before an upload began reads what was there before, what comes after it the
 * pieces. */
static inline void check_upload_order(qv_backend *be)
{
    enum { BYTES = 32 << 20, ROUNDS = 8 };
    void *slot, *copies[ROUNDS];
    unsigned char *host = must(malloc(BYTES));
    PASS(qv_backend_alloc(be, BYTES, &slot));
    for (int i = 0; i < ROUNDS; i++)
        PASS(qv_backend_alloc(be, BYTES, &copies[i]));
    for (int i = 0; i < ROUNDS; i++) {
        qv_upload up;
        memset(host, i + 1, BYTES);
        PASS(qv_upload_begin(be, &up));
        PASS(qv_upload_copy(&up, slot, host, BYTES));
        PASS(qv_upload_end(&up));
        PASS(qv_backend_copy(be, copies[i], slot, BYTES)); /* in the order of steps, unwaited for */
    }
    for (int i = 0; i < ROUNDS; i++) {
        PASS(qv_backend_download(be, host, copies[i], BYTES));
        for (size_t j = 0; j < BYTES; j += 4097)
            cr_assert_eq(host[j], i + 1, "round %d read byte %zu of another", i, j);
        qv_backend_free(be, copies[i]);
    }
    qv_backend_free(be, slot);
    free(host);
}

#endif
