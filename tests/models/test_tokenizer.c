/* The tokenizer against the Hugging Face library: its answers for whole files of texts (golden),
 * and for a small vocabulary under each setting that tokenizer.json may have (tables below, whose
 * right sides that library gave). */
#include "common/json.h"
#include "models/tokenizer.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* ---- Golden files ---------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    const char *tokenizer; /* path below the golden folder; may be gzip'ed */
} golden_file;

static const golden_file golden_files[] = {
    {"tiny-qwen3.5", "tiny-qwen3.5/tokenizer.json"},
    {"tiny-nemotron3-nano", "tiny-nemotron3-nano/tokenizer.json"},
    {"qwen3.5-style-151k", "tokenizers/qwen3.5-style-151k.tokenizer.json.gz"},
};

/* Unpack a .gz into the temporary folder; other files stay where they are. NULL if gzip is absent.
 */
static const char *unpacked(const char *path)
{
    if (!strstr(path, ".gz"))
        return path;
    char command[1024];
    const char *out = qv_path(qv_temp_dir(), "tokenizer.json");
    snprintf(command, sizeof command, "gzip -dc '%s' > '%s'", path, out);
    return system(command) == 0 ? out : NULL;
}

/* The tokenizer of a golden file and its cases; NULL when they are not there. */
static qv_tokenizer *open_golden(const golden_file *file, json_t **cases)
{
    const char *path = qv_golden_path(file->tokenizer);
    const char *texts = qv_golden_path(qv_path("tokenizers", "%s.json", file->name));
    path = path ? unpacked(path) : NULL;
    if (!path || !texts)
        return NULL;
    qv_tokenizer *tok;
    cr_assert_eq(qv_tokenizer_open(path, &tok), QV_OK, "%s", qv_error());
    cr_assert_eq(qv_json_load_file(texts, 64 << 20, cases), QV_OK, "%s", qv_error());
    return tok;
}

static bool is_utf8(const char *text, size_t len)
{
    json_t *string = json_stringn(text, len);
    json_decref(string);
    return string != NULL;
}

/* Decode token by token and check that each step gives whole characters and that all of them give
 * what decode gives at once. */
static void check_detok(const qv_tokenizer *tok, const int32_t *tokens, size_t n, bool skip_special)
{
    char *whole, *piece = malloc(qv_tokenizer_max_text(tok));
    size_t len, total = 0, n_piece;
    cr_assert_eq(qv_tokenizer_decode(tok, tokens, n, skip_special, &whole, &len), QV_OK);
    cr_assert(is_utf8(whole, len));
    cr_assert_eq(whole[len], '\0');
    qv_detok d;
    qv_detok_init(&d, skip_special);
    for (size_t i = 0; i <= n; i++) {
        qv_detok copy = d;
        n_piece = i < n ? qv_detok_push(&d, tok, tokens[i], piece) : qv_detok_flush(&d, piece);
        cr_assert_leq(n_piece, qv_tokenizer_max_text(tok));
        cr_assert(is_utf8(piece, n_piece), "token %zu of %zu splits a character", i, n);
        cr_assert_leq(total + n_piece, len);
        cr_assert_arr_eq(whole + total, piece, n_piece);
        total += n_piece;
        /* A copy of the state goes on like the original. */
        char again[16];
        if (i == n)
            cr_assert_eq(qv_detok_flush(&copy, again), n_piece);
    }
    cr_assert_eq(total, len);
    free(whole);
    free(piece);
}

static void check_golden_case(const qv_tokenizer *tok, const char *name, json_t *one)
{
    const json_t *text = json_object_get(one, "text"), *ids = json_object_get(one, "ids");
    const char *s = json_string_value(text);
    static const char *const decoded[] = {"decoded", "decoded_skip_special"};
    qv_tokens got = {0};
    cr_assert_eq(qv_tokenizer_encode(tok, s, json_string_length(text), QV_ENCODE_PARSE_SPECIAL,
                                     SIZE_MAX, &got),
                 QV_OK, "%s", qv_error());
    cr_assert_eq(got.count, json_array_size(ids), "%s: '%s'", name, s);
    for (size_t i = 0; i < got.count; i++)
        cr_assert_eq(got.data[i], json_integer_value(json_array_get(ids, i)), "%s: '%s' token %zu",
                     name, s, i);
    for (int skip = 0; skip < 2; skip++) {
        const json_t *want = json_object_get(one, decoded[skip]);
        char *back;
        size_t len;
        cr_assert_eq(qv_tokenizer_decode(tok, got.data, got.count, skip, &back, &len), QV_OK);
        cr_assert_eq(len, json_string_length(want), "%s: '%s'", name, s);
        cr_assert_arr_eq(back, json_string_value(want), len, "%s: '%s'", name, s);
        free(back);
        check_detok(tok, got.data, got.count, skip);
    }
    qv_tokens_deinit(&got);
}

static void check_golden_file(const golden_file *file)
{
    json_t *cases, *one;
    size_t i;
    qv_tokenizer *tok = open_golden(file, &cases);
    if (!tok)
        cr_skip_test("golden data for %s is not there", file->name);
    cr_assert_gt(json_array_size(cases), 0);
    json_array_foreach(cases, i, one) check_golden_case(tok, file->name, one);
    json_decref(cases);
    qv_tokenizer_close(tok);
}

Test(tokenizer, agrees_with_every_text_of_tiny_qwen)
{
    check_golden_file(&golden_files[0]);
}

Test(tokenizer, agrees_with_every_text_of_tiny_nemotron)
{
    check_golden_file(&golden_files[1]);
}

Test(tokenizer, agrees_with_every_text_of_a_real_vocabulary)
{
    check_golden_file(&golden_files[2]);
}

Test(tokenizer, decodes_any_tokens_alike_one_by_one_and_at_once)
{
    for (size_t f = 0; f < COUNT(golden_files); f++) {
        json_t *cases;
        qv_tokenizer *tok = open_golden(&golden_files[f], &cases);
        if (!tok)
            continue;
        qv_rng rng = qv_rng_seed(f);
        int64_t n_ids = (int64_t)qv_tokenizer_vocab_size(tok);
        for (int round = 0; round < 400; round++) {
            int32_t tokens[64];
            size_t n = (size_t)qv_rng_range(&rng, 0, 65);
            /* Some rounds of single bytes, which break characters most; some ids that are none. */
            for (size_t i = 0; i < n; i++)
                tokens[i] = (int32_t)qv_rng_range(&rng, -1, round % 2 ? n_ids + 2 : 270);
            check_detok(tok, tokens, n, round % 3 == 0);
        }
        json_decref(cases);
        qv_tokenizer_close(tok);
    }
}

/* ---- A small vocabulary ---------------------------------------------------------------------- */

static const char *const merges[] = {"h e", "l l",  "he ll", "hell o", "Ġ hello", "i n", "in g",
                                     "1 2", "12 3", "Ġ Ġ",   "a b",    "ab c",    "b c"};

/* 256 bytes, the merges, one token that no merge makes. */
enum { N_MODEL = 256 + 13 + 1 };

/* How the byte-level alphabet spells a byte. */
static size_t spell_byte(unsigned byte, char out[3])
{
    unsigned cp = byte;
    if (byte <= 0x20)
        cp = 0x100 + byte;
    else if (byte >= 0x7F && byte <= 0xA0)
        cp = 0x121 + byte - 0x7F;
    else if (byte == 0xAD)
        cp = 0x143;
    size_t n = 0;
    if (cp < 0x80) {
        out[n++] = (char)cp;
    } else {
        out[n++] = (char)(0xC0 | cp >> 6);
        out[n++] = (char)(0x80 | (cp & 0x3F));
    }
    out[n] = '\0';
    return n;
}

static json_t *small_model(void)
{
    json_t *vocab = json_object(), *list = json_array();
    for (unsigned byte = 0; byte < 256; byte++) {
        char text[3];
        spell_byte(byte, text);
        json_object_set_new(vocab, text, json_integer(byte));
    }
    for (size_t i = 0; i < COUNT(merges); i++) {
        char joined[32] = "";
        const char *space = strchr(merges[i], ' ');
        strncat(joined, merges[i], (size_t)(space - merges[i]));
        strcat(joined, space + 1);
        json_object_set_new(vocab, joined, json_integer(256 + (json_int_t)i));
        json_array_append_new(list, json_string(merges[i]));
    }
    json_object_set_new(vocab, "hello12", json_integer(N_MODEL - 1));
    return json_pack("{s:s, s:o, s:o}", "type", "BPE", "vocab", vocab, "merges", list);
}

/* JSON with ' for " , so that tables stay readable. */
static json_t *parse_quoted(const char *text)
{
    char *copy = strdup(text);
    for (char *p = copy; *p; p++)
        *p = *p == '\'' ? '"' : *p;
    json_error_t error;
    json_t *json = json_loads(copy, JSON_DECODE_ANY, &error);
    cr_assert(json, "%s: %s", text, error.text);
    free(copy);
    return json;
}

#define BYTE_LEVEL "{'type':'ByteLevel','add_prefix_space':false,'use_regex':false}"

/* The small tokenizer with some sections replaced. A key "model.x" replaces what is in the model;
 * null removes. */
static json_t *small_tokenizer(const char *patch)
{
    json_t *root = parse_quoted(
        "{'version':'1.0','truncation':null,'padding':null,"
        "'added_tokens':[{'id':270,'content':'<s>','special':true,'normalized':false},"
        "{'id':271,'content':'<think>','special':false,'normalized':false}],"
        "'normalizer':null,'post_processor':null,"
        "'pre_tokenizer':{'type':'ByteLevel','add_prefix_space':false,'use_regex':true},"
        "'decoder':{'type':'ByteLevel'}}");
    json_object_set_new(root, "model", small_model());
    json_t *changes = parse_quoted(patch), *value;
    const char *key;
    json_object_foreach(changes, key, value)
    {
        bool in_model = strncmp(key, "model.", 6) == 0;
        json_t *object = in_model ? json_object_get(root, "model") : root;
        json_object_set(object, in_model ? key + 6 : key, value);
    }
    json_decref(changes);
    return root;
}

/* The text of a small tokenizer.json; the caller frees. */
static char *small_text(void)
{
    json_t *root = small_tokenizer("{}");
    char *text = json_dumps(root, 0);
    json_decref(root);
    return text;
}

/* Open a tokenizer of this content. */
static qv_status open_json(json_t *root, qv_tokenizer **tok)
{
    char *text = json_dumps(root, 0);
    const char *path = qv_path(qv_temp_dir(), "small.json");
    qv_write_text(path, text);
    free(text);
    json_decref(root);
    return qv_tokenizer_open(path, tok);
}

static qv_tokenizer *open_small(const char *patch)
{
    qv_tokenizer *tok;
    cr_assert_eq(open_json(small_tokenizer(patch), &tok), QV_OK, "%s: %s", patch, qv_error());
    return tok;
}

/* The spellings of the tokens of a text, joined by '|'. */
static const char *pieces(const qv_tokenizer *tok, const char *text, unsigned flags)
{
    static char out[4096];
    qv_tokens ids = {0};
    out[0] = '\0';
    cr_assert_eq(qv_tokenizer_encode(tok, text, strlen(text), flags, SIZE_MAX, &ids), QV_OK, "%s",
                 qv_error());
    for (size_t i = 0; i < ids.count; i++) {
        strcat(out, i > 0 ? "|" : "");
        strcat(out, qv_tokenizer_token(tok, ids.data[i], NULL));
    }
    qv_tokens_deinit(&ids);
    return out;
}

#define SEQUENCE(steps)                                                                            \
    "'pre_tokenizer':{'type':'Sequence','pretokenizers':[" steps "," BYTE_LEVEL "]}"
#define SPLIT(pattern, behavior)                                                                   \
    "{'type':'Split','pattern':{'Regex':'" pattern "'},'behavior':'" behavior "','invert':false}"
#define INVERTED(pattern, behavior)                                                                \
    "{'type':'Split','pattern':{'Regex':'" pattern "'},'behavior':'" behavior "','invert':true}"
#define LITERAL(pattern, behavior)                                                                 \
    "{'type':'Split','pattern':{'String':'" pattern "'},'behavior':'" behavior "','invert':false}"
#define ADDED(id, content, more)                                                                   \
    "{'id':" #id ",'content':'" content "','special':true,'normalized':false" more "}"
#define PREFIXED(use_regex)                                                                        \
    "'pre_tokenizer':{'type':'ByteLevel','add_prefix_space':true,'use_regex':" use_regex "}"
#define TEMPLATE(single)                                                                           \
    "{'type':'TemplateProcessing','single':[" single "],'pair':[],"                                \
    "'special_tokens':{'<s>':{'id':'<s>','ids':[270],'tokens':['<s>']}}}"
#define BOS  "{'SpecialToken':{'id':'<s>','type_id':0}}"
#define SELF "{'Sequence':{'id':'A','type_id':0}}"

static const struct {
    const char *patch, *text;
    unsigned flags;
    const char *want;
} settings[] = {
    {"{}", "hello hello", 2, "hello|Ġhello"},
    {"{}", " hello  hello abc", 2, "Ġhello|Ġ|Ġhello|Ġ|abc"},
    {"{}", "ing<s>in<think>", 2, "ing|<s>|in|<think>"},
    {"{}", "ing<s>in<think>", 0, "ing|<|s|>|in|<think>"},
    {"{}", "don't we'LL", 2, "d|o|n|'|t|Ġ|w|e|'|L|L"},
    {"{'model.ignore_merges':true}", "hello12", 2, "hello|12"},
    {"{'model.ignore_merges':true,'pre_tokenizer':" BYTE_LEVEL "}", "hello12", 2, "hello12"},
    {"{'pre_tokenizer':" BYTE_LEVEL "}", "hello12", 2, "hello|12"},
    {"{" SEQUENCE(SPLIT(" ", "Isolated")) "}", "a  b c ", 2, "a|Ġ|Ġ|b|Ġ|c|Ġ"},
    {"{" SEQUENCE(SPLIT(" ", "Removed")) "}", "a  b c ", 2, "a|b|c"},
    {"{" SEQUENCE(SPLIT("ab", "MergedWithPrevious")) "}", "cabcababc", 2, "c|ab|c|ab|ab|c"},
    {"{" SEQUENCE(SPLIT(" ", "MergedWithPrevious")) "}", "  hello ", 2, "Ġ|Ġ|hello|Ġ"},
    {"{" SEQUENCE(SPLIT(" ", "MergedWithNext")) "}", "  hello ", 2, "Ġ|Ġhello|Ġ"},
    {"{" SEQUENCE(SPLIT(" ", "Contiguous")) "}", "  hello ", 2, "ĠĠ|hello|Ġ"},
    {"{" SEQUENCE(INVERTED("[ab]+", "Isolated")) "}", "12ab123b", 2, "12|ab|123|b"},
    {"{" SEQUENCE(INVERTED("[ab]+", "Removed")) "}", "xxabyyab", 2, "ab|ab"},
    {"{" SEQUENCE(LITERAL("l", "Removed")) "}", "hello", 2, "he|o"},
    {"{" SEQUENCE(LITERAL(".", "Removed")) "}", "a.b", 2, "a|b"},
    {"{" SEQUENCE(SPLIT("b*", "Isolated")) "}", "abbc", 2, "a|b|b|c"},
    {"{" SEQUENCE(SPLIT("x*", "Isolated")) "}", "hello", 2, "h|e|l|l|o"},
    {"{" SEQUENCE("{'type':'Digits','individual_digits':true}") "}", "a123", 2, "a|1|2|3"},
    {"{" SEQUENCE("{'type':'Digits','individual_digits':false}") "}", "a123b", 2, "a|123|b"},
    {"{" SEQUENCE(SPLIT("\\\\p{L}+|\\\\s+", "Isolated")) "}", "hello\u180Ein", 2, "hello|á|ł|İ|in"},
    {"{" PREFIXED("false") "}", "hello", 2, "Ġhello"},
    {"{" PREFIXED("true") "}", "hello hello", 2, "Ġhello|Ġhello"},
    {"{" PREFIXED("false") "}", "<s>hello", 2, "<s>|Ġhello"},
    {"{'normalizer':{'type':'NFC'}}", "e\u0301 \u212B", 2, "Ã|©|Ġ|Ã|ħ"},
    {"{'normalizer':{'type':'NFD'}}", "\u00E9", 2, "e|Ì|ģ"},
    {"{'normalizer':{'type':'NFKC'}}", "\uFB01\u00B2", 2, "f|i|2"},
    {"{'normalizer':{'type':'Sequence','normalizers':[{'type':'NFD'},{'type':'NFKC'}]}}",
     "\u00E9\uFB01", 2, "Ã|©|f|i"},
    {"{'added_tokens':[" ADDED(270, "<m>", ",'lstrip':true") "]}", "a  <m>  b", 2, "a|<m>|Ġ|Ġ|b"},
    {"{'added_tokens':[" ADDED(270, "<m>", ",'rstrip':true") "]}", "a  <m>  b", 2, "a|ĠĠ|<m>|b"},
    {"{'added_tokens':[" ADDED(270, "<m>", ",'lstrip':true,'rstrip':true") "]}",
     "a \t\u3000<m>\n <m> b", 2, "a|<m>|<m>|b"},
    {"{'added_tokens':[" ADDED(270, "wrd", ",'single_word':true") "]}", "wrd wrd. \u00EDwrd wrd_",
     2, "wrd|Ġ|wrd|.|Ġ|Ã|Ń|w|r|d|Ġ|w|r|d|_"},
    {"{'added_tokens':[" ADDED(270, "xyz", "") "," ADDED(271, "xy", "") "," ADDED(272, "yz",
                                                                                  "") "]}",
     "xyzxyyzxy", 2, "xyz|xy|yz|xy"},
    {"{'added_tokens':[" ADDED(270, "xy", "") "," ADDED(271, "xyzw", "") "]}", "xyzxyzw", 2,
     "xy|z|xyzw"},
    {"{'normalizer':{'type':'NFC'},'added_tokens':[{'id':270,'content':'\u00E9x','special':true,"
     "'normalized':true}]}",
     "ae\u0301xb", 2, "a|\u00E9x|b"},
    {"{'normalizer':{'type':'NFC'},'added_tokens':[{'id':270,'content':'\u00E9x','special':true,"
     "'normalized':false}]}",
     "ae\u0301xb", 2, "a|Ã|©|x|b"},
    {"{'post_processor':" TEMPLATE(BOS "," SELF) "}", "in", 3, "<s>|in"},
    {"{'post_processor':" TEMPLATE(BOS "," SELF) "}", "in", 2, "in"},
    {"{'post_processor':{'type':'Sequence','processors':[{'type':'ByteLevel'}," TEMPLATE(
         BOS "," SELF "," BOS) "]}}",
     "in", 3, "<s>|in|<s>"},
    {"{'model.merges':[['h','e'],['l','l'],['he','ll']]}", "hello", 2, "hell|o"},
    {"{'model.merges':['b c','a b','ab c']}", "abc", 2, "a|bc"},
    {"{'model.merges':['a b','b c','ab c','a b']}", "abc", 2, "a|bc"},
};

Test(tokenizer, follows_every_setting_as_the_library_does)
{
    for (size_t i = 0; i < COUNT(settings); i++) {
        qv_tokenizer *tok = open_small(settings[i].patch);
        const char *got = pieces(tok, settings[i].text, settings[i].flags);
        cr_expect_str_eq(got, settings[i].want, "%s: '%s' gives %s, not %s", settings[i].patch,
                         settings[i].text, got, settings[i].want);
        qv_tokenizer_close(tok);
    }
}

/* ---- What is refused ------------------------------------------------------------------------- */

static const struct {
    const char *patch;
    qv_status status;
    const char *words; /* occur in the error */
} refusals[] = {
    {"{'extra':1}", QV_ERR_UNSUPPORTED, "'extra'"},
    {"{'model.type':'Unigram'}", QV_ERR_UNSUPPORTED, "'Unigram'"},
    {"{'model.byte_fallback':true}", QV_ERR_UNSUPPORTED, "byte_fallback"},
    {"{'model.dropout':0.1}", QV_ERR_UNSUPPORTED, "dropout 0.1"},
    {"{'model.end_of_word_suffix':'</w>'}", QV_ERR_UNSUPPORTED, "'</w>'"},
    {"{'model.continuing_subword_prefix':'##'}", QV_ERR_UNSUPPORTED, "'##'"},
    {"{'model.novelty':1}", QV_ERR_UNSUPPORTED, "'novelty'"},
    {"{'model.merges':'a b'}", QV_ERR_FORMAT, "merges"},
    {"{'model.merges':['ab']}", QV_ERR_FORMAT, "merge 0"},
    {"{'model.merges':['a b c']}", QV_ERR_FORMAT, "merge 0"},
    {"{'model.merges':[['a','b','c']]}", QV_ERR_FORMAT, "merge 0"},
    {"{'model.merges':['a z']}", QV_ERR_FORMAT, "'a' + 'z'"},
    {"{'model.vocab':{'a':0},'model.merges':[]}", QV_ERR_UNSUPPORTED, "byte 0x00"},
    {"{'model.vocab':{'a':'0'}}", QV_ERR_FORMAT, "'a'"},
    {"{'model.vocab':{'a':-1}}", QV_ERR_FORMAT, "'a'"},
    {"{'model.vocab':{'a':99999999}}", QV_ERR_FORMAT, "'a'"},
    {"{'model.vocab':{'a':0,'b':0}}", QV_ERR_FORMAT, "id 0"},
    {"{'model':7}", QV_ERR_FORMAT, "model"},
    {"{'normalizer':{'type':'Lowercase'}}", QV_ERR_UNSUPPORTED, "'Lowercase'"},
    {"{'normalizer':{'type':'NFC','strip':true}}", QV_ERR_UNSUPPORTED, "'strip'"},
    {"{'normalizer':{}}", QV_ERR_FORMAT, "type"},
    {"{'pre_tokenizer':null}", QV_ERR_FORMAT, "pre_tokenizer"},
    {"{'pre_tokenizer':{'type':'Metaspace'}}", QV_ERR_UNSUPPORTED, "'Metaspace'"},
    {"{'pre_tokenizer':{'type':'Digits','individual_digits':true}}", QV_ERR_UNSUPPORTED,
     "no ByteLevel"},
    {"{" SEQUENCE(BYTE_LEVEL) "}", QV_ERR_UNSUPPORTED, "after ByteLevel"},
    {"{" SEQUENCE(SPLIT("a", "Shuffled")) "}", QV_ERR_UNSUPPORTED, "'Shuffled'"},
    {"{" SEQUENCE(SPLIT("(a", "Isolated")) "}", QV_ERR_FORMAT, "split pattern"},
    {"{" SEQUENCE(SPLIT("\\\\w+", "Isolated")) "}", QV_ERR_UNSUPPORTED, "\\w+"},
    {"{" SEQUENCE(SPLIT("\\\\p{Han}", "Isolated")) "}", QV_ERR_UNSUPPORTED, "\\p{Han}"},
    {"{" SEQUENCE(SPLIT("^a", "Isolated")) "}", QV_ERR_UNSUPPORTED, "^a"},
    {"{" SEQUENCE(SPLIT("[a&&b]", "Isolated")) "}", QV_ERR_UNSUPPORTED, "&&b]"},
    {"{" SEQUENCE(SPLIT("[[a]b]", "Isolated")) "}", QV_ERR_UNSUPPORTED, "[a]b]"},
    {"{" SEQUENCE(SPLIT("(?i)a", "Isolated")) "}", QV_ERR_UNSUPPORTED, "(?i)a"},
    {"{" SEQUENCE(SPLIT("a{1,2}+", "Isolated")) "}", QV_ERR_UNSUPPORTED, "}+"},
    {"{" SEQUENCE(SPLIT("a{,2}", "Isolated")) "}", QV_ERR_UNSUPPORTED, "{,2}"},
    {"{'post_processor':{'type':'BertProcessing'}}", QV_ERR_UNSUPPORTED, "'BertProcessing'"},
    {"{'post_processor':" TEMPLATE(SELF "," SELF) "}", QV_ERR_UNSUPPORTED, "2 sequences"},
    {"{'post_processor':" TEMPLATE("{'SpecialToken':{'id':'<x>'}}," SELF) "}", QV_ERR_FORMAT,
     "'<x>'"},
    {"{'decoder':null}", QV_ERR_FORMAT, "decoder"},
    {"{'decoder':{'type':'WordPiece'}}", QV_ERR_UNSUPPORTED, "'WordPiece'"},
    {"{'added_tokens':[{'content':'x'}]}", QV_ERR_FORMAT, "id"},
    {"{'added_tokens':[{'id':270}]}", QV_ERR_FORMAT, "content"},
    {"{'added_tokens':[{'id':270,'content':''}]}", QV_ERR_FORMAT, "empty"},
    {"{'added_tokens':[{'id':270,'content':'hello'}]}", QV_ERR_FORMAT, "'hello'"},
    {"{'added_tokens':[{'id':5,'content':'<x>'}]}", QV_ERR_FORMAT, "id 5"},
    {"{'added_tokens':[{'id':-5,'content':'<x>'}]}", QV_ERR_FORMAT, "-5"},
    {"{'added_tokens':7}", QV_ERR_FORMAT, "added_tokens"},
};

Test(tokenizer, refuses_what_it_would_get_wrong_and_names_it)
{
    for (size_t i = 0; i < COUNT(refusals); i++) {
        qv_tokenizer *tok;
        qv_status status = open_json(small_tokenizer(refusals[i].patch), &tok);
        cr_expect_eq(status, refusals[i].status, "%s: %s (%s)", refusals[i].patch,
                     qv_status_name(status), qv_error());
        cr_expect(strstr(qv_error(), refusals[i].words), "%s: '%s' lacks '%s'", refusals[i].patch,
                  qv_error(), refusals[i].words);
        cr_expect(strstr(qv_error(), "small.json"), "%s", qv_error());
        if (status == QV_OK)
            qv_tokenizer_close(tok);
    }
}

Test(tokenizer, refuses_files_that_are_missing_or_broken)
{
    qv_tokenizer *tok;
    const char *dir = qv_temp_dir(), *path = qv_path(dir, "broken.json");
    cr_assert_eq(qv_tokenizer_open(qv_path(dir, "absent"), &tok), QV_ERR_NOT_FOUND);
    cr_assert_eq(qv_tokenizer_open(dir, &tok), QV_ERR_NOT_FOUND, "a directory without tokenizer");
    char *text = small_text();
    for (size_t cut = 1; cut < strlen(text); cut = cut * 3 / 2 + 1) {
        qv_write_file(path, text, strlen(text) - cut);
        cr_assert_eq(qv_tokenizer_open(path, &tok), QV_ERR_FORMAT, "%zu bytes cut off", cut);
    }
    qv_write_text(path, "[]");
    cr_assert_eq(qv_tokenizer_open(path, &tok), QV_ERR_FORMAT);
    free(text);
}

Test(tokenizer, reads_special_tokens_of_a_model_directory)
{
    qv_tokenizer *tok;
    const char *dir = qv_temp_dir();
    char *text = small_text();
    qv_write_text(qv_path(dir, "tokenizer.json"), text);
    free(text);
    cr_assert_eq(qv_tokenizer_open(dir, &tok), QV_OK, "%s", qv_error());
    cr_assert_eq(qv_tokenizer_eos(tok), -1);
    qv_tokenizer_close(tok);

    const char *config = qv_path(dir, "tokenizer_config.json");
    qv_write_text(config, "{\"bos_token\": null, \"eos_token\": {\"content\": \"<s>\"}, "
                          "\"pad_token\": \"<think>\"}");
    cr_assert_eq(qv_tokenizer_open(dir, &tok), QV_OK, "%s", qv_error());
    cr_assert_eq(qv_tokenizer_bos(tok), -1);
    cr_assert_eq(qv_tokenizer_eos(tok), 270);
    cr_assert_eq(qv_tokenizer_pad(tok), 271);
    qv_tokenizer_close(tok);

    qv_write_text(config, "{\"eos_token\": \"<nope>\"}");
    cr_assert_eq(qv_tokenizer_open(dir, &tok), QV_ERR_FORMAT);
    cr_assert(strstr(qv_error(), "<nope>"), "%s", qv_error());
}

/* ---- Encoding and decoding ------------------------------------------------------------------- */

Test(tokenizer, names_the_byte_where_a_text_is_not_utf8)
{
    static const struct {
        const char *text;
        size_t len, at;
    } rows[] = {
        {"\xFF", 1, 0},
        {"abc\x80", 4, 3},
        {"0123456789\xC3", 11, 10},
        {"0123456789\xC3(", 12, 10},
        {"a\xED\xA0\x80", 4, 1},
        {"\xC0\xAF", 2, 0},
        {"\xE2\x82\xAC\xF4\x90\x80\x80", 7, 3},
        {"a\0b\xFE", 4, 3},
    };
    qv_tokenizer *tok = open_small("{}");
    for (size_t i = 0; i < COUNT(rows); i++) {
        qv_tokens ids = {0};
        char at[32];
        snprintf(at, sizeof at, "at byte %zu", rows[i].at);
        cr_expect_eq(qv_tokenizer_encode(tok, rows[i].text, rows[i].len, 0, SIZE_MAX, &ids),
                     QV_ERR_FORMAT);
        cr_expect(strstr(qv_error(), at), "row %zu: %s", i, qv_error());
        cr_expect_eq(ids.count, 0);
        qv_tokens_deinit(&ids);
    }
    qv_tokenizer_close(tok);
}

Test(tokenizer, stops_at_the_limit_of_tokens)
{
    qv_tokenizer *tok = open_small("{}");
    qv_tokens ids = {0};
    cr_assert_eq(qv_tokenizer_encode(tok, "xyz", 3, 0, 3, &ids), QV_OK);
    cr_assert_eq(ids.count, 3);
    cr_assert_eq(qv_tokenizer_encode(tok, "xyz", 3, 0, 2, &ids), QV_ERR_LIMIT);
    cr_assert(strstr(qv_error(), "2 tokens"), "%s", qv_error());
    cr_assert_eq(ids.count, 0);
    cr_assert_eq(qv_tokenizer_encode(tok, "", 0, 0, 0, &ids), QV_OK);
    qv_tokens_deinit(&ids);
    qv_tokenizer_close(tok);
}

Test(tokenizer, merges_long_pieces_like_short_ones)
{
    /* One piece of n copies of "hello12", cut with and without the table of short pieces. */
    qv_tokenizer *tok = open_small("{'pre_tokenizer':" BYTE_LEVEL "}");
    for (size_t n = 1; n <= 200000; n = n * 3 + 1) {
        char *text = malloc(7 * n + 1);
        for (size_t i = 0; i < n; i++)
            memcpy(text + 7 * i, "hello12", 8);
        qv_tokens ids = {0};
        cr_assert_eq(qv_tokenizer_encode(tok, text, 7 * n, 0, SIZE_MAX, &ids), QV_OK);
        cr_assert_eq(ids.count, 2 * n);
        for (size_t i = 0; i < ids.count; i++)
            cr_assert_eq(ids.data[i],
                         qv_tokenizer_find(tok, i % 2 ? "12" : "hello", i % 2 ? 2 : 5));
        qv_tokens_deinit(&ids);
        free(text);
    }
    qv_tokenizer_close(tok);
}

Test(tokenizer, takes_texts_of_a_megabyte_that_are_hard_to_split_or_normalize)
{
    static const char *const units[] = {
        " ",  "\n",     " \n",        "a", "A", "1", "!", "'s", "a\u0316\u0301", "\u0301\u0316",
        "<s", "\u4E2D", "\U00031350", " x"};
    const char *path = qv_golden_path("tiny-nemotron3-nano/tokenizer.json");
    QV_SKIP_WITHOUT(path);
    qv_tokenizer *toks[2];
    cr_assert_eq(qv_tokenizer_open(path, &toks[0]), QV_OK, "%s", qv_error());
    toks[1] = open_small("{'normalizer':{'type':'NFC'}}");
    for (size_t u = 0; u < COUNT(units); u++) {
        size_t unit = strlen(units[u]), n = (1 << 20) / unit;
        char *text = malloc(n * unit + 1), *back;
        for (size_t i = 0; i < n; i++)
            memcpy(text + i * unit, units[u], unit + 1);
        for (int t = 0; t < 2; t++) {
            qv_tokens ids = {0};
            size_t len;
            cr_assert_eq(qv_tokenizer_encode(toks[t], text, n * unit, 2, SIZE_MAX, &ids), QV_OK,
                         "%s", qv_error());
            cr_assert_eq(qv_tokenizer_decode(toks[t], ids.data, ids.count, false, &back, &len),
                         QV_OK);
            if (t == 0) {
                cr_assert_eq(len, n * unit);
                cr_assert_eq(memcmp(back, text, len), 0, "'%s'", units[u]);
            }
            free(back);
            qv_tokens_deinit(&ids);
        }
        free(text);
    }
    qv_tokenizer_close(toks[0]);
    qv_tokenizer_close(toks[1]);
}

Test(tokenizer, replaces_broken_sequences_by_their_maximal_parts)
{
    static const struct {
        const char *bytes, *want;
    } rows[] = {
        {"a\x80z", "a\uFFFDz"},
        {"\xC3", "\uFFFD"},
        {"\xC3\xA9", "\u00E9"},
        {"\xE2\x82", "\uFFFD"},
        {"\xE2\x82z", "\uFFFDz"},
        {"\xE0\x80\x80", "\uFFFD\uFFFD\uFFFD"},
        {"\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD"},
        {"\xF0\x9F\x98", "\uFFFD"},
        {"\xF0\x9F\x98\x80", "\U0001F600"},
        {"\xF0\x9F\xE2\x82\xAC", "\uFFFD\u20AC"},
        {"\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"},
        {"\xC0\xAF\xFE", "\uFFFD\uFFFD\uFFFD"},
    };
    qv_tokenizer *tok = open_small("{}"); /* whose ids below 256 are bytes */
    for (size_t i = 0; i < COUNT(rows); i++) {
        int32_t ids[8];
        size_t n = strlen(rows[i].bytes), len;
        char *text;
        for (size_t k = 0; k < n; k++)
            ids[k] = (uint8_t)rows[i].bytes[k];
        cr_assert_eq(qv_tokenizer_decode(tok, ids, n, false, &text, &len), QV_OK);
        cr_expect_str_eq(text, rows[i].want, "row %zu", i);
        check_detok(tok, ids, n, false);
        free(text);
    }
    qv_tokenizer_close(tok);
}

Test(tokenizer, skips_special_tokens_and_unknown_ids_when_decoding)
{
    qv_tokenizer *tok = open_small("{}");
    int32_t ids[] = {270, 'h', 271, 99999, -7, 'i', 270};
    static const char *const want[] = {"<s>h<think>i<s>", "h<think>i"};
    for (int skip = 0; skip < 2; skip++) {
        char *text;
        size_t len;
        cr_assert_eq(qv_tokenizer_decode(tok, ids, COUNT(ids), skip, &text, &len), QV_OK);
        cr_assert_str_eq(text, want[skip]);
        free(text);
        check_detok(tok, ids, COUNT(ids), skip);
    }
    qv_tokenizer_close(tok);
}

Test(tokenizer, tells_about_its_vocabulary)
{
    qv_tokenizer *tok = open_small("{'added_tokens':[" ADDED(300, "<s>", ",'lstrip':true") "]}");
    size_t len, n;
    cr_assert_eq(qv_tokenizer_vocab_size(tok), 301);
    cr_assert_eq(qv_tokenizer_find(tok, "Ġhello", strlen("Ġhello")), 260);
    cr_assert_eq(qv_tokenizer_find(tok, "<s>", 3), 300);
    cr_assert_eq(qv_tokenizer_find(tok, "nope", 4), -1);
    cr_assert_str_eq(qv_tokenizer_token(tok, 260, &len), "Ġhello");
    cr_assert_eq(len, strlen("Ġhello"));
    cr_assert_arr_eq(qv_tokenizer_bytes(tok, 260, &len), " hello", 6);
    cr_assert_eq(len, 6);
    cr_assert_null(qv_tokenizer_token(tok, 299, NULL), "between the model and the added token");
    cr_assert_null(qv_tokenizer_token(tok, 301, NULL));
    cr_assert_null(qv_tokenizer_bytes(tok, -1, &len));
    cr_assert(qv_tokenizer_is_special(tok, 300));
    cr_assert_not(qv_tokenizer_is_special(tok, 260));
    cr_assert_not(qv_tokenizer_is_special(tok, 100000));
    const qv_added_token *added = qv_tokenizer_added(tok, &n);
    cr_assert_eq(n, 1);
    cr_assert_str_eq(added[0].content, "<s>");
    cr_assert(added[0].special && added[0].lstrip && !added[0].rstrip && !added[0].normalized);
    qv_tokenizer_close(tok);
}

/* ---- Threads --------------------------------------------------------------------------------- */

static const char shared_text[] = "hello  hello123 <s> e\u0301\u00E9 \u4E2D\u6587 ing!";

static void *encode_often(void *user)
{
    const qv_tokenizer *tok = user;
    qv_tokens first = {0}, ids = {0};
    size_t different = 0;
    qv_tokenizer_encode(tok, shared_text, sizeof shared_text - 1, 2, SIZE_MAX, &first);
    for (int i = 0; i < 500; i++) {
        qv_tokenizer_encode(tok, shared_text, sizeof shared_text - 1, 2, SIZE_MAX, &ids);
        different += ids.count != first.count ||
                     memcmp(ids.data, first.data, ids.count * sizeof *ids.data) != 0;
    }
    different += first.count == 0;
    qv_tokens_deinit(&first);
    qv_tokens_deinit(&ids);
    return (void *)different;
}

Test(tokenizer, serves_threads_at_once)
{
    qv_tokenizer *tok = open_small("{'normalizer':{'type':'NFC'}}");
    pthread_t threads[4];
    for (size_t i = 0; i < COUNT(threads); i++)
        cr_assert_eq(pthread_create(&threads[i], NULL, encode_often, tok), 0);
    for (size_t i = 0; i < COUNT(threads); i++) {
        void *different;
        pthread_join(threads[i], &different);
        cr_assert_null(different);
    }
    qv_tokenizer_close(tok);
}
