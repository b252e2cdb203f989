/* Sampling on the device: the CPU's choices, row by row. */
#include "tests/ops/cuda_test.h"
#include "tests/ops/shortlist_test.h"

#define N_ROWS 40

typedef struct {
    const char *name;
    int32_t n_vocab, n_valid;
    float scale; /* of the logits: small ones make flat distributions */
    bool ties;   /* logits of a few values only */
} logits_case;

static const logits_case cases[] = {
    {"tiny", 17, 11, 4, false},           {"one block of the scan", 8192, 8192, 8, false},
    {"odd", 8193, 8100, 8, false},        {"a real vocabulary", 248320, 248077, 10, false},
    {"flat", 50000, 50000, 0.01f, false}, {"ties", 5000, 4990, 4, true},
};

static qv_sample_row random_row(qv_rng *rng, int i, const logits_case *c, const int32_t *tokens,
                                const int32_t *banned)
{
    qv_sample_row row = {.target = -1,
                         .temperature = i % 5 == 0 ? 0.0f : 0.3f + 0.2f * (float)(i % 7),
                         .top_k = i % 3 == 1 ? 1 + i % 50 : 0,
                         .top_p = i % 4 == 1   ? 0.9f
                                  : i % 4 == 2 ? 0.5f
                                               : 1.0f,
                         .min_p = i % 6 == 3 ? 0.05f : 0.0f,
                         .repetition_penalty = 1.0f,
                         .seed = qv_rng_u64(rng),
                         .stream = (uint32_t)i,
                         .draw = (uint32_t)(3 * i),
                         .n_top = i % 4 == 0   ? 0
                                  : i % 8 == 2 ? 20
                                               : -1};
    if (i % 7 == 2)
        row.target = c->n_valid / 2;
    if (i % 4 == 3) {
        row.presence_penalty = 0.5f;
        row.frequency_penalty = 0.2f;
        row.repetition_penalty = 1.3f;
        row.tokens = tokens;
        row.n_prompt = 5;
        row.n_tokens = 30;
    }
    if (i % 9 == 4) {
        row.banned = banned;
        row.n_banned = 3;
    }
    return row;
}

static void check_row(const char *what, const qv_sample_result *got, const qv_sample_result *want)
{
    cr_assert_eq(got->token, want->token, "%s: token %d, wanted %d", what, got->token, want->token);
    cr_assert(fabsf(got->logprob - want->logprob) <= 2e-5f * (1 + fabsf(want->logprob)),
              "%s: logprob %.9g, wanted %.9g", what, (double)got->logprob, (double)want->logprob);
    cr_assert_eq(got->n_top, want->n_top, "%s: %d alternatives, wanted %d", what, got->n_top,
                 want->n_top);
    for (int j = 0; j < want->n_top; j++) {
        cr_assert_eq(got->top_token[j], want->top_token[j], "%s: alternative %d", what, j);
        cr_assert(fabsf(got->top_logprob[j] - want->top_logprob[j]) <= 1e-4f, "%s: alternative %d",
                  what, j);
    }
}

static void check_case(duo *d, const logits_case *c)
{
    qv_backend_limits limits = {.max_logits = N_ROWS, .n_vocab = c->n_vocab};
    PASS(qv_backend_reserve(d->cpu, &limits));
    PASS(qv_backend_reserve(d->dev, &limits));
    twin logits = NEW_TWIN(d, QV_F32, N_ROWS, c->n_vocab);
    fill_twin(d, &logits, c->scale);
    float *x = logits.cpu.data;
    for (int64_t i = 0; c->ties && i < logits.n; i++)
        x[i] = floorf(x[i]);
    send_twin(d, &logits);
    int32_t tokens[30], banned[3];
    for (int i = 0; i < 30; i++)
        tokens[i] = (int32_t)qv_rng_range(&d->rng, 0, c->n_valid > 20 ? 20 : c->n_valid);
    for (int i = 0; i < 3; i++)
        banned[i] = i * (c->n_valid / 4);
    qv_sample_row rows[N_ROWS];
    qv_sample_result want[N_ROWS], got[N_ROWS];
    for (int i = 0; i < N_ROWS; i++)
        rows[i] = random_row(&d->rng, i, c, tokens, banned);
    PASS(qv_op_sample(d->dev, logits.dev, c->n_valid, rows, got));
    PASS(qv_op_sample(d->cpu, logits.cpu, c->n_valid, rows, want));
    for (int i = 0; i < N_ROWS; i++) {
        char what[96];
        snprintf(what, sizeof what, "%s, row %d", c->name, i);
        check_row(what, &got[i], &want[i]);
    }
    free_twin(d, &logits);
}

Test(cuda_sample, chooses_what_the_cpu_chooses)
{
    duo d = open_duo(1);
    for (size_t i = 0; i < QV_ROWS(cases); i++)
        check_case(&d, &cases[i]);
    close_duo(&d);
}

/* The least and the most that a draw can be cut to, beside each other in one step. */
Test(cuda_sample, draws_cut_anywhere_choose_what_the_cpu_chooses)
{
    static const struct {
        float temperature, top_p, min_p;
        int32_t top_k;
    } kinds[] = {
        {1, 1, 0, 0},           {0.01f, 1, 0, 0},   {50, 1, 0, 0},       {1, 1, 0.2f, 0},
        {1, 0.999f, 0, 0},      {50, 0.999f, 0, 0}, {1, 1e-6f, 0, 0},    {1, 1, 0, 1},
        {1, 1, 0, 20000},       {50, 1, 0, 20000},  {1, 0.5f, 0, 20000}, {2, 0.9f, 0.01f, 50},
        {0.7f, 0.95f, 0.1f, 0}, {1, 1, 1, 0},       {3, 1, 0, 300},      {0, 1, 0, 0},
    };
    enum { EACH = 4, ROWS = QV_ROWS(kinds) * EACH, VOCAB = 40003 };
    duo d = open_duo(6);
    qv_backend_limits limits = {.max_logits = ROWS, .n_vocab = VOCAB};
    PASS(qv_backend_reserve(d.dev, &limits));
    PASS(qv_backend_reserve(d.cpu, &limits));
    twin logits = NEW_TWIN(&d, QV_F32, ROWS, VOCAB);
    static qv_sample_row rows[ROWS];
    static qv_sample_result got[ROWS], want[ROWS];
    for (int scale = 1; scale <= 16; scale *= 4) {
        fill_twin(&d, &logits, (float)scale);
        for (int i = 0; i < ROWS; i++)
            rows[i] = (qv_sample_row){.target = -1,
                                      .temperature = kinds[i / EACH].temperature,
                                      .top_k = kinds[i / EACH].top_k,
                                      .top_p = kinds[i / EACH].top_p,
                                      .min_p = kinds[i / EACH].min_p,
                                      .repetition_penalty = 1,
                                      .seed = (uint64_t)(i * 31 + scale),
                                      .n_top = i % EACH == 3 ? 5 : -1};
        PASS(qv_op_sample(d.dev, logits.dev, VOCAB - 3, rows, got));
        PASS(qv_op_sample(d.cpu, logits.cpu, VOCAB - 3, rows, want));
        for (int i = 0; i < ROWS; i++) {
            char what[64];
            snprintf(what, sizeof what, "kind %d, scale %d", i / EACH, scale);
            check_row(what, &got[i], &want[i]);
        }
    }
    free_twin(&d, &logits);
    close_duo(&d);
}

Test(cuda_sample, names_rows_that_cannot_be_sampled_and_does_the_others)
{
    duo d = open_duo(2);
    qv_backend_limits limits = {.max_logits = 3, .n_vocab = 300};
    PASS(qv_backend_reserve(d.dev, &limits));
    twin logits = NEW_TWIN(&d, QV_F32, 3, 300);
    fill_twin(&d, &logits, 1);
    ((float *)logits.cpu.data)[300 + 7] = NAN;
    ((float *)logits.cpu.data)[600 + 42] = 9;
    send_twin(&d, &logits);
    qv_sample_row rows[3];
    for (int i = 0; i < 3; i++)
        rows[i] = (qv_sample_row){.target = -1, .top_p = 1, .repetition_penalty = 1, .n_top = -1};
    qv_sample_result results[3];
    FAIL_WITH(QV_ERR_INTERNAL, "row 1", qv_op_sample(d.dev, logits.dev, 300, rows, results));
    cr_assert_eq(results[2].token, 42);
    FAIL_WITH(
        QV_ERR_LIMIT, "reserved",
        qv_op_sample(d.dev, qv_tensor_2d(logits.dev.data, QV_F32, 1, 301), 300, rows, results));
    free_twin(&d, &logits);
    close_duo(&d);
}

/* Parts on the device against whole rows on the device: the same draws, to the last token. */
Test(cuda_sample, merged_shortlists_choose_what_the_whole_row_chooses)
{
    duo d = open_duo(3);
    const backend_pair p = {
        .whole = d.dev, .parts = d.dev, .near = 2e-6f, .one_of = is_emulated(d.dev) ? 4 : 1};
    for (size_t c = 0; c < QV_ROWS(shortlist_cases); c++)
        check_shortlists(&p, &shortlist_cases[c]);
    check_bad_rows(&p);
    close_duo(&d);
}

Test(cuda_sample, shortlists_of_a_real_vocabulary_choose_the_same)
{
    static const shortlist_case c = {"a real vocabulary", 62080, 4, 248077, 10, false};
    duo d = open_duo(4);
    const backend_pair p = {
        .whole = d.dev, .parts = d.dev, .near = 2e-6f, .one_of = is_emulated(d.dev) ? 8 : 1};
    check_shortlists(&p, &c);
    close_duo(&d);
}

/* Two samplings under way: rows of the second count what the first chose, and the next batch takes
 * its tokens from there. As on the CPU. */
static void sample_ahead(qv_backend *be, const twin *first, const twin *second, bool is_cpu,
                         const qv_sample_row *rows, const qv_sample_row *after,
                         qv_sample_result *chosen, qv_sample_result *got, int32_t *ids)
{
    int32_t token[N_ROWS];
    for (int i = 0; i < N_ROWS; i++)
        token[i] = i % 3 == 0 ? i : QV_TOKEN_OF_ROW(N_ROWS - 1 - i);
    int32_t starts[2] = {0, N_ROWS}, pos[N_ROWS] = {0};
    qv_batch batch = {.n_tokens = N_ROWS,
                      .token = token,
                      .pos = pos,
                      .n_seqs = 1,
                      .seq_start = starts},
             out;
    PASS(qv_op_sample_begin(be, is_cpu ? first->cpu : first->dev, 290, rows));
    PASS(qv_backend_put_batch(be, &batch, &out));
    PASS(qv_backend_download(be, ids, out.token, sizeof token));
    PASS(qv_op_sample_begin(be, is_cpu ? second->cpu : second->dev, 290, after));
    PASS(qv_op_sample_end(be, chosen));
    PASS(qv_op_sample_end(be, got));
}

Test(cuda_sample, goes_on_from_what_nobody_has_read)
{
    duo d = open_duo(3);
    qv_backend_limits limits = {.max_tokens = N_ROWS, .max_logits = N_ROWS, .n_vocab = 300};
    PASS(qv_backend_reserve(d.cpu, &limits));
    PASS(qv_backend_reserve(d.dev, &limits));
    twin first = NEW_TWIN(&d, QV_F32, N_ROWS, 300), second = NEW_TWIN(&d, QV_F32, N_ROWS, 300);
    fill_twin(&d, &first, 4);
    fill_twin(&d, &second, 4);
    send_twin(&d, &first);
    send_twin(&d, &second);
    int32_t tokens[N_ROWS][12];
    qv_sample_row rows[N_ROWS], after[N_ROWS];
    qv_sample_result chosen[2][N_ROWS], got[2][N_ROWS];
    for (int i = 0; i < N_ROWS; i++) {
        rows[i] = (qv_sample_row){.target = -1, .top_p = 1, .repetition_penalty = 1, .n_top = -1};
        after[i] = rows[i];
        after[i].temperature = i % 2 ? 0.8f : 0;
        after[i].seed = (uint64_t)i;
        after[i].frequency_penalty = 2;
        after[i].repetition_penalty = 1.5f;
        after[i].tokens = tokens[i];
        after[i].n_prompt = 2;
        after[i].n_tokens = 1 + i % 12 < 2 ? 2 : 1 + i % 12;
        int32_t best = 0; /* that the row chooses: in half of the rows it is among the tokens */
        const float *x = (const float *)first.cpu.data + (int64_t)i * 300;
        for (int32_t j = 0; j < 290; j++)
            best = x[j] > x[best] ? j : best;
        for (int32_t j = 0; j < 12; j++)
            tokens[i][j] = i % 2 && j == 0 ? best : (i * 31 + j * 7) % 290;
        tokens[i][after[i].n_tokens - 1] = QV_TOKEN_OF_ROW(i);
    }
    int32_t ids[2][N_ROWS];
    sample_ahead(d.cpu, &first, &second, true, rows, after, chosen[0], got[0], ids[0]);
    sample_ahead(d.dev, &first, &second, false, rows, after, chosen[1], got[1], ids[1]);
    for (int i = 0; i < N_ROWS; i++) {
        char what[32];
        snprintf(what, sizeof what, "row %d", i);
        check_row(what, &chosen[1][i], &chosen[0][i]);
        check_row(what, &got[1][i], &got[0][i]);
        cr_assert_eq(ids[1][i], ids[0][i], "token %d: %d, wanted %d", i, ids[1][i], ids[0][i]);
    }
    free_twin(&d, &first);
    free_twin(&d, &second);
    close_duo(&d);
}
