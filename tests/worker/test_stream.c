/* Streams: stop strings and tokens, characters split over tokens, and that what has been emitted is
 * a function of the tokens alone. */
#include "worker/stream.h"

#include "tests/support.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TEXT = 4096, MAX_STOPS = 4 };

/* --- A stream over the bundled tokenizer ------------------------------------------------------ */

typedef struct {
    qv_tokenizer *tokenizer;
    int32_t byte_token[256]; /* the token of one byte */
    qv_stop_string stops[MAX_STOPS];
    uint32_t failure[MAX_STOPS][64];
    int32_t stop_tokens[2];
    qv_stream_rules rules;
    uint32_t matched[MAX_STOPS];
    char *pending;
    qv_stream stream;
} fixture;

static void restart(fixture *f)
{
    qv_stream_init(&f->stream, &f->rules, f->matched, f->pending);
}

/* Stop strings end with NULL. NULL when the bundled model is not there. */
static fixture *fixture_new(const char *const *stops, int32_t max_answer)
{
    const char *dir = qv_demo_path("tiny-qwen3.5");
    if (dir == NULL)
        return NULL;
    fixture *f = calloc(1, sizeof *f);
    cr_assert_eq(qv_tokenizer_open(dir, &f->tokenizer), QV_OK, "%s", qv_error());
    for (int32_t id = 0; id < (int32_t)qv_tokenizer_vocab_size(f->tokenizer); id++) {
        size_t size;
        const char *bytes = qv_tokenizer_bytes(f->tokenizer, id, &size);
        if (bytes != NULL && size == 1)
            f->byte_token[(unsigned char)bytes[0]] = id;
    }
    f->rules = (qv_stream_rules){.tokenizer = f->tokenizer,
                                 .strings = f->stops,
                                 .tokens = f->stop_tokens,
                                 .n_tokens = 1,
                                 .max_answer = max_answer};
    f->stop_tokens[0] = qv_tokenizer_eos(f->tokenizer);
    for (; stops != NULL && stops[f->rules.n_strings] != NULL; f->rules.n_strings++) {
        uint32_t i = f->rules.n_strings;
        f->stops[i] = (qv_stop_string){stops[i], f->failure[i], (uint32_t)strlen(stops[i])};
        qv_stop_string_prepare(&f->stops[i]);
    }
    f->pending = malloc(qv_stream_max_text(&f->rules));
    restart(f);
    return f;
}

static void fixture_free(fixture *f)
{
    qv_tokenizer_close(f->tokenizer);
    free(f->pending);
    free(f);
}

/* Push the bytes of `text` one token each, append what is emitted to `out`, stop when the stream
 * does. Returns the number of tokens pushed. */
static size_t push_bytes(fixture *f, const char *text, size_t size, char *out, size_t *out_size)
{
    size_t i = 0;
    for (; i < size && f->stream.status == QV_STREAM_RUNS; i++) {
        const char *piece;
        size_t piece_size;
        qv_stream_push(&f->stream, f->byte_token[(unsigned char)text[i]], &piece, &piece_size);
        memcpy(out + *out_size, piece, piece_size);
        *out_size += piece_size;
    }
    return i;
}

#define SKIP_WITHOUT_DEMO(f)                                                                       \
    if ((f) == NULL)                                                                               \
    cr_skip_test("the bundled model is not present")

/* --- Stop strings ---------------------------------------------------------------------------- */

Test(stream, ends_before_the_stop_string_wherever_tokens_part_it)
{
    static const struct {
        const char *stops[MAX_STOPS + 1];
        const char *text;
        const char *emitted;
        qv_stream_status status;
    } rows[] = {
        {{"END"}, "one END two", "one ", QV_STREAM_STOP},
        {{"END"}, "one EN two", "one EN two", QV_STREAM_RUNS},
        {{"END"}, "EEND", "E", QV_STREAM_STOP},
        {{"END"}, "ENEND", "EN", QV_STREAM_STOP},
        {{"aab"}, "aaab", "a", QV_STREAM_STOP},
        {{"aaa"}, "aaaaa", "", QV_STREAM_STOP},
        {{"abab"}, "abacabab", "abac", QV_STREAM_STOP},
        {{"\n\n"}, "a\nb\n\nc", "a\nb", QV_STREAM_STOP},
        {{"x"}, "x", "", QV_STREAM_STOP},
        {{"é"}, "cafè é", "cafè ", QV_STREAM_STOP},
        {{"🙂"}, "🙁🙂", "🙁", QV_STREAM_STOP},
        {{"two", "one"}, "one two", "", QV_STREAM_STOP},
        {{"abcd", "c"}, "abcd", "ab", QV_STREAM_STOP}, /* the first to be complete wins */
        {{"bc", "abc"}, "xabc", "x", QV_STREAM_STOP},  /* among those, the longest */
        {{"abc", "b"}, "ab", "a", QV_STREAM_STOP},
        {{"stop here", "stop"}, "please stop now", "please ", QV_STREAM_STOP},
        {{"never"}, "", "", QV_STREAM_RUNS},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        fixture *f = fixture_new(rows[i].stops, 1000);
        SKIP_WITHOUT_DEMO(f);
        char out[MAX_TEXT];
        size_t size = 0;
        push_bytes(f, rows[i].text, strlen(rows[i].text), out, &size);
        cr_expect_eq(f->stream.status, rows[i].status, "row %zu", i);
        if (f->stream.status == QV_STREAM_RUNS) { /* what is held comes with the end */
            const char *rest;
            size_t rest_size;
            qv_stream_end(&f->stream, &rest, &rest_size);
            memcpy(out + size, rest, rest_size);
            size += rest_size;
        }
        cr_expect(size == strlen(rows[i].emitted) && memcmp(out, rows[i].emitted, size) == 0,
                  "row %zu: '%.*s'", i, (int)size, out);
        fixture_free(f);
    }
}

Test(stream, holds_back_only_what_may_begin_a_stop_string)
{
    static const char *const stops[] = {"END", NULL};
    fixture *f = fixture_new(stops, 1000);
    SKIP_WITHOUT_DEMO(f);
    static const struct {
        char byte;
        const char *emitted;
    } steps[] = {{'a', "a"}, {'E', ""}, {'N', ""}, {'x', "ENx"}, {'E', ""}, {'E', "E"}, {'N', ""}};
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        char out[16];
        size_t size = 0;
        push_bytes(f, &steps[i].byte, 1, out, &size);
        cr_expect(size == strlen(steps[i].emitted) && !memcmp(out, steps[i].emitted, size),
                  "step %zu: '%.*s'", i, (int)size, out);
    }
    fixture_free(f);
}

/* --- Characters ------------------------------------------------------------------------------ */

Test(stream, emits_whole_characters_only)
{
    fixture *f = fixture_new(NULL, 1000);
    SKIP_WITHOUT_DEMO(f);
    const char *text = "aé世🙂";
    static const size_t emitted[] = {1, 0, 2, 0, 0, 3, 0, 0, 0, 4};
    for (size_t i = 0; i < strlen(text); i++) {
        char out[16];
        size_t size = 0;
        push_bytes(f, text + i, 1, out, &size);
        cr_expect_eq(size, emitted[i], "byte %zu: %zu", i, size);
    }
    fixture_free(f);
}

Test(stream, ends_a_broken_character_as_a_replacement)
{
    fixture *f = fixture_new(NULL, 2);
    SKIP_WITHOUT_DEMO(f);
    char out[16];
    size_t size = 0;
    push_bytes(f, "\xF0\x9F\x99", 3, out, &size);
    cr_assert_eq(f->stream.status, QV_STREAM_LENGTH);
    cr_assert(size == 3 && !memcmp(out, "\xEF\xBF\xBD", 3), "%zu bytes", size);
    fixture_free(f);
}

/* --- Ends ------------------------------------------------------------------------------------ */

Test(stream, stops_at_a_stop_token_without_its_text)
{
    static const char *const stops[] = {"END", NULL};
    fixture *f = fixture_new(stops, 1000);
    SKIP_WITHOUT_DEMO(f);
    f->stop_tokens[1] = f->byte_token['!'];
    f->rules.n_tokens = 2;
    for (int i = 0; i < 2; i++) {
        restart(f);
        char out[16];
        size_t size = 0;
        push_bytes(f, "aEN", 3, out, &size);
        cr_assert_eq(size, 1);
        const char *rest;
        size_t rest_size;
        cr_assert_eq(qv_stream_push(&f->stream, f->stop_tokens[i], &rest, &rest_size),
                     QV_STREAM_STOP);
        cr_assert(rest_size == 2 && !memcmp(rest, "EN", 2), "held text is emitted at the end");
        cr_assert_eq(f->stream.n_tokens, 4, "the stop token counts");
    }
    fixture_free(f);
}

Test(stream, a_stop_string_in_the_last_token_is_a_stop)
{
    static const char *const stops[] = {"c", NULL};
    fixture *f = fixture_new(stops, 3);
    SKIP_WITHOUT_DEMO(f);
    char out[16];
    size_t size = 0;
    push_bytes(f, "abc", 3, out, &size);
    cr_assert_eq(f->stream.status, QV_STREAM_STOP);
    restart(f);
    push_bytes(f, "abd", 3, out, &size);
    cr_assert_eq(f->stream.status, QV_STREAM_LENGTH);
    fixture_free(f);
}

/* --- Drawn texts against the plain definition ------------------------------------------------- */

/* Bytes of text[size] that may leave: up to the stop string that is first complete, or else up to
 * the longest ending that begins one. */
static size_t may_leave(const char *text, size_t size, const qv_stream_rules *rules, bool *stopped)
{
    *stopped = false;
    for (size_t end = 1; end <= size; end++) {
        size_t longest = 0;
        for (uint32_t s = 0; s < rules->n_strings; s++) {
            size_t n = rules->strings[s].size;
            if (n <= end && n > longest && !memcmp(text + end - n, rules->strings[s].text, n))
                longest = n;
        }
        if (longest > 0) {
            *stopped = true;
            return end - longest;
        }
    }
    for (size_t held = size; held > 0; held--)
        for (uint32_t s = 0; s < rules->n_strings; s++)
            if (held < rules->strings[s].size &&
                !memcmp(text + size - held, rules->strings[s].text, held))
                return size - held;
    return size;
}

Test(stream, agrees_with_the_definition_after_every_token)
{
    static const char *const sets[][MAX_STOPS + 1] = {
        {"ab", NULL}, {"aba", "bb", NULL}, {"aaaa", "abab", "c", NULL}, {"abcabd", NULL}, {NULL}};
    for (uint64_t seed = 0; seed < 200; seed++) {
        qv_rng rng = qv_rng_seed(seed);
        fixture *f = fixture_new(sets[seed % 5], 1000);
        SKIP_WITHOUT_DEMO(f);
        char text[64], out[MAX_TEXT];
        size_t emitted = 0;
        bool stopped = false;
        for (size_t i = 0; i < sizeof text && !stopped; i++) {
            text[i] = (char)('a' + qv_rng_range(&rng, 0, 4) % 3);
            push_bytes(f, text + i, 1, out, &emitted);
            size_t want = may_leave(text, i + 1, &f->rules, &stopped);
            cr_assert_eq(emitted, want, "seed %d, byte %zu: %zu, not %zu", (int)seed, i, emitted,
                         want);
            cr_assert_eq(f->stream.status, stopped ? QV_STREAM_STOP : QV_STREAM_RUNS);
        }
        cr_assert_eq(memcmp(out, text, emitted), 0);
        fixture_free(f);
    }
}

Test(stream, replayed_tokens_lead_to_the_same_place)
{
    static const char *const stops[] = {"lamp at", NULL};
    fixture *f = fixture_new(stops, 1000);
    SKIP_WITHOUT_DEMO(f);
    const char *text = "Zoé found a lamp and a 🙂 lamp at the harbor.";
    qv_tokens tokens = {0};
    cr_assert_eq(qv_tokenizer_encode(f->tokenizer, text, strlen(text), 0, 1000, &tokens), QV_OK);
    size_t cuts[256], n = 0;
    for (; n < tokens.count && f->stream.status == QV_STREAM_RUNS; n++) {
        const char *piece;
        qv_stream_push(&f->stream, tokens.data[n], &piece, &cuts[n]);
    }
    cr_assert_eq(f->stream.status, QV_STREAM_STOP);
    for (size_t from = 0; from < n; from++) { /* a worker is lost after `from` tokens */
        restart(f);
        for (size_t i = 0; i < n; i++) {
            const char *piece;
            size_t size;
            qv_stream_push(&f->stream, tokens.data[i], &piece, &size);
            if (i >= from)
                cr_assert_eq(size, cuts[i], "token %zu after %zu replayed", i, from);
        }
    }
    qv_tokens_deinit(&tokens);
    fixture_free(f);
}
