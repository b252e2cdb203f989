/* The whole engine over a tiny model of each family: however a request is run, the same bits. The
 * bundled model, with its adapters, is in test_engine.c. */
#include "tests/models/fixtures_moe.h"
#include "tests/worker/drive.h"

#include <criterion/criterion.h>
#include <stdlib.h>

enum { VOCAB = 1600, KV_TOKEN_BYTES = 2 * 24 * 4 }; /* one layer of attention, 2 heads of 12 */

/* The model of a family with the bundled model's tokenizer. */
static const char *family_dir(fx_family family)
{
    static const char *const files[] = {"tokenizer.json", "tokenizer_config.json"};
    const char *dir = fx_family_write(family, VOCAB, 5);
    for (int i = 0; i < 2; i++) {
        size_t size;
        char *text = qv_read_file(qv_demo_path(qv_path("tiny-qwen3.5", "%s", files[i])), &size);
        qv_write_file(qv_path(dir, "%s", files[i]), text, size);
        free(text);
    }
    return dir;
}

#define LONG                                                                                       \
    "'tokens':[386,12,7,99,833,45,8,611,20,950,77,31,5,640,22,9,10,11,12,13,14,15,16,17,18,19,"    \
    "300,301,302,303,304,305,306,307,308,309,310,311,312,313,314,315,316,317,318,319,320,321],"    \
    "'ignore_eos':true,"

static const char *const cases[] = {
    LONG "'temperature':0,'max_tokens':40,'logprobs':2",
    LONG "'temperature':1.1,'seed':3,'n':3,'max_tokens':24,'logprobs':0",
    LONG "'max_tokens':0,'prompt_logprobs':2",
    "'tokens':[386],'temperature':0,'ignore_eos':true,'max_tokens':70,'logprobs':0",
    "'tokens':[386,327,5],'temperature':0.7,'top_p':0.9,'seed':4,'ignore_eos':true,"
    "'max_tokens':50,'logprobs':1",
    "'messages':[{'role':'user','content':'Ines carried two black shoes.'}],'temperature':0,"
    "'ignore_eos':true,'max_tokens':20,'logprobs':0",
};
enum { N_CASES = sizeof cases / sizeof *cases };

static const struct {
    const char *what;
    int64_t prefill_chunk, preempt_every, swap_bytes, max_running, step_tokens, threads, kv_pages;
    bool preempts;
} variants[] = {
    {"one mixed batch", 0, 0, 1 << 28, 16, 128, 2, 0, false},
    {"chunks of 1", 1, 0, 1 << 28, 16, 128, 1, 0, false},
    {"chunks of 7 in tiny steps", 7, 0, 1 << 28, 16, 11, 2, 0, false},
    {"two at a time", 0, 0, 1 << 28, 2, 128, 2, 0, false},
    {"preempted every other step, saved", 7, 2, 1 << 28, 16, 128, 2, 0, true},
    {"preempted every third step, computed again", 16, 3, 0, 16, 128, 2, 0, true},
    {"too few pages, saved", 0, 0, 1 << 28, 16, 128, 2, 16, true},
    {"too few pages, computed again", 0, 0, 0, 16, 128, 2, 16, true},
};

static void check_family(fx_family family)
{
    const char *dir = family_dir(family);
    char *want[N_CASES];
    qv_engine_options options = drive_options(dir);
    options.adapter_slots = 0;
    options.prefix_cache = false;
    drive *alone = drive_open(&options);
    for (int i = 0; i < N_CASES; i++) {
        uint64_t number = drive_submit(alone, cases[i]);
        drive_run(alone);
        cr_assert_not(drive_get(alone, number)->failed, "%s", drive_get(alone, number)->message);
        want[i] = drive_signature(alone, number);
    }
    drive_close(alone);
    options.prefix_cache = true;
    for (size_t v = 0; v < sizeof variants / sizeof *variants; v++) {
        options.prefill_chunk = variants[v].prefill_chunk;
        options.preempt_every = variants[v].preempt_every;
        options.swap_bytes = variants[v].swap_bytes;
        options.max_running = variants[v].max_running;
        options.step_tokens = variants[v].step_tokens;
        options.threads = variants[v].threads;
        options.kv_bytes = variants[v].kv_pages * options.page_tokens * KV_TOKEN_BYTES;
        options.max_context = variants[v].kv_pages > 0 ? 128 : 0;
        drive *d = drive_open(&options);
        uint64_t numbers[2][N_CASES];
        for (int copy = 0; copy < 2; copy++)
            for (int i = 0; i < N_CASES; i++)
                numbers[copy][i] = drive_submit(d, cases[i]);
        drive_run(d);
        for (int copy = 0; copy < 2; copy++)
            for (int i = 0; i < N_CASES; i++) {
                char *got = drive_signature(d, numbers[copy][i]);
                cr_expect_str_eq(got, want[i], "%s, %s: case %d\n got %s\nwant %s",
                                 fx_family_name(family), variants[v].what, i, got, want[i]);
                free(got);
            }
        qv_engine_stats stats;
        qv_engine_get_stats(d->engine, &stats);
        cr_expect_eq(stats.preemptions > 0, variants[v].preempts, "%s, %s: %d preemptions",
                     fx_family_name(family), variants[v].what, (int)stats.preemptions);
        cr_expect_gt(stats.prefix.hits, 0, "%s, %s: no beginning was found", fx_family_name(family),
                     variants[v].what);
        drive_close(d);
    }
    for (int i = 0; i < N_CASES; i++)
        free(want[i]);
}

Test(engine_families, dense_answers_are_the_same_however_they_are_run)
{
    QV_SKIP_WITHOUT(qv_demo_path("tiny-qwen3.5"));
    check_family(FX_DENSE);
}

Test(engine_families, moe_answers_are_the_same_however_they_are_run)
{
    QV_SKIP_WITHOUT(qv_demo_path("tiny-qwen3.5"));
    check_family(FX_MOE);
}

Test(engine_families, nano_answers_are_the_same_however_they_are_run)
{
    QV_SKIP_WITHOUT(qv_demo_path("tiny-qwen3.5"));
    check_family(FX_NANO);
}

Test(engine_families, super_answers_are_the_same_however_they_are_run)
{
    QV_SKIP_WITHOUT(qv_demo_path("tiny-qwen3.5"));
    check_family(FX_SUPER);
}
