/* Sampling from parts of the vocabulary: the same tokens and alternatives as from the whole row,
 * for every combination of options, however the vocabulary is cut. */
#include "tests/ops/shortlist_test.h"

static backend_pair open_cpu_pair(const char *isa)
{
    backend_pair p = {.whole = open_isa(isa, 2), .near = 4 * U32, .one_of = 1};
    p.parts = p.whole;
    return p;
}

Test(shortlist, merged_lists_choose_what_the_whole_row_chooses)
{
    for (size_t a = 0; a < QV_ROWS(isas); a++) {
        backend_pair p = open_cpu_pair(isas[a]);
        for (size_t c = 0; p.whole != NULL && c < QV_ROWS(shortlist_cases); c++)
            check_shortlists(&p, &shortlist_cases[c]);
        qv_backend_close(p.whole);
    }
}

Test(shortlist, bad_rows_are_named_and_leave_the_others_their_results)
{
    backend_pair p = open_cpu_pair(NULL);
    check_bad_rows(&p);
    qv_backend_close(p.whole);
}

Test(shortlist, knows_which_rows_it_is_enough_for)
{
    static const struct {
        const char *what;
        qv_sample_row row;
        bool is_short;
        int32_t k;
    } rows[] = {
        {"greedy", {.target = -1}, true, 1},
        {"greedy with top-k", {.target = -1, .top_k = 50}, true, 1},
        {"scored", {.target = 3, .temperature = 1}, true, 0},
        {"top-k", {.target = -1, .temperature = 1, .top_k = 20}, true, 20},
        {"the longest", {.target = -1, .temperature = 1, .top_k = QV_MAX_SHORTLIST}, true, 256},
        {"longer", {.target = -1, .temperature = 1, .top_k = QV_MAX_SHORTLIST + 1}, false, 0},
        {"all", {.target = -1, .temperature = 1}, false, 0},
        {"top-p alone", {.target = -1, .temperature = 1, .top_p = 0.5f}, false, 0},
    };
    for (size_t i = 0; i < QV_ROWS(rows); i++) {
        cr_expect_eq(qv_sample_row_is_short(&rows[i].row, 1000), rows[i].is_short, "%s",
                     rows[i].what);
        cr_expect_eq(qv_shortlist_shape_of(&rows[i].row, 1, 1000).k, rows[i].k, "%s", rows[i].what);
    }
    qv_sample_row all = {.target = -1, .temperature = 1, .top_k = 20};
    cr_expect_not(qv_sample_row_is_short(&all, 20), "a top-k of everything cuts nothing");
}

Test(shortlist, refuses_what_does_not_fit)
{
    qv_backend *be = open_cpu(1);
    float part[20] = {0}, list[64] = {0};
    qv_sample_row row = {.target = -1, .top_p = 1, .repetition_penalty = 1, .n_top = -1};
    qv_shortlist_part where = {.n_vocab = 20, .n_valid = 20, .shape = {.k = 1}};
    qv_tensor x = qv_tensor_2d(part, QV_F32, 1, 20);
    qv_tensor l = qv_tensor_2d(list, QV_F32, 1, qv_shortlist_words(where.shape));
    FAIL_WITH(QV_ERR_LIMIT, "20 logits, but 0 are reserved",
              qv_op_shortlist(be, x, &where, &row, l));
    PASS(qv_backend_reserve(be, &(qv_backend_limits){.n_vocab = 20}));
    PASS(qv_op_shortlist(be, x, &where, &row, l));
    where.first = 1;
    FAIL_WITH(QV_ERR_SHAPE, "columns 1 to 21 of 20", qv_op_shortlist(be, x, &where, &row, l));
    where.first = 0;
    where.n_valid = 21;
    FAIL_WITH(QV_ERR_SHAPE, "21 valid tokens of 20", qv_op_shortlist(be, x, &where, &row, l));
    where.n_valid = 20;
    int32_t tokens[] = {3, QV_TOKEN_OF_ROW(0)};
    row.tokens = tokens;
    row.n_tokens = 2;
    FAIL_WITH(QV_ERR_ARG, "the last token of row 0 is not known",
              qv_op_shortlist(be, x, &where, &row, l));
    row.n_tokens = 1;
    PASS(qv_op_shortlist(be, x, &where, &row, l));
    where.shape.k = 2;
    FAIL_WITH(QV_ERR_SHAPE, "shortlist", qv_op_shortlist(be, x, &where, &row, l));
    qv_backend_close(be);
}
