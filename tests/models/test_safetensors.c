/* Safetensors files: what is read, and a table of corrupt ones. */
#include "models/safetensors.h"
#include "tests/models/fixtures.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* A file of this header, then `n_data` bytes. The caller frees. */
static uint8_t *with_header(const char *header, size_t n_data, size_t *size)
{
    uint64_t length = strlen(header);
    *size = 8 + length + n_data;
    uint8_t *bytes = calloc(1, *size);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, header, length);
    return bytes;
}

static const char *shard(const char *dir, const char *name, const char *tensor, float value)
{
    fx_file file = {.n = 0};
    fx_add(&file, tensor, QV_F32, 1, (int64_t[]){1}, &value);
    const char *path = qv_path(dir, "%s", name);
    fx_write(&file, path);
    fx_free(&file);
    return path;
}

Test(safetensors, reads_back_what_was_written)
{
    fx_file file = {.n = 0};
    qv_rng rng = qv_rng_seed(1);
    static const struct {
        const char *name;
        qv_dtype dtype;
        int n_dims;
        int64_t shape[3];
    } rows[] = {{"odd", QV_BF16, 1, {3}},       {"matrix", QV_F32, 2, {5, 7}},
                {"half", QV_F16, 1, {1}},       {"empty", QV_F32, 2, {0, 7}},
                {"scalar", QV_F32, 0, {0}},     {"ints", QV_I32, 1, {4}},
                {"cube", QV_BF16, 3, {2, 3, 4}}};
    for (size_t i = 0; i < 7; i++)
        fx_add_random(&file, rows[i].name, rows[i].dtype, rows[i].n_dims, rows[i].shape, &rng, 1);
    size_t size;
    uint8_t *bytes = fx_bytes(&file, &size);
    qv_safetensors *st;
    cr_assert_eq(qv_safetensors_open_memory(bytes, size, "memory", &st), QV_OK, "%s", qv_error());
    cr_expect_eq(qv_safetensors_count(st), 7);
    for (size_t i = 0; i < 7; i++) {
        const qv_stored_tensor *t = qv_safetensors_find(st, rows[i].name);
        cr_assert_not_null(t, "%s", rows[i].name);
        cr_expect_eq(t->dtype, rows[i].dtype);
        cr_expect_eq(t->n_dims, rows[i].n_dims);
        cr_expect_arr_eq(t->data, fx_find(&file, rows[i].name)->data, t->bytes, "%s", rows[i].name);
    }
    cr_expect_null(qv_safetensors_find(st, "absent"));
    float values[35], want[35];
    const qv_stored_tensor *matrix = qv_safetensors_find(st, "matrix"); /* not aligned to 4 */
    memcpy(want, matrix->data, sizeof want);
    cr_assert_eq(qv_stored_tensor_f32(matrix, 0, 35, values), QV_OK);
    cr_expect_arr_eq(values, want, sizeof want);
    cr_expect_eq(qv_stored_tensor_f32(qv_safetensors_find(st, "ints"), 0, 1, values),
                 QV_ERR_UNSUPPORTED);
    qv_safetensors_close(st);
    free(bytes);
    fx_free(&file);
}

Test(safetensors, refuses_corrupt_headers_and_says_what_is_wrong)
{
#define T(name, dtype, shape, offsets)                                                             \
    "\"" name "\": {\"dtype\": \"" dtype "\", \"shape\": " shape ", \"data_offsets\": " offsets "}"
    static const struct {
        const char *header;
        size_t n_data;
        qv_status status;
        const char *says;
    } rows[] = {
        {"", 0, QV_ERR_FORMAT, ""},
        {"[]", 0, QV_ERR_FORMAT, "not a JSON object"},
        {"{\"a\": ", 0, QV_ERR_FORMAT, ""},
        {"{\"a\": 7}", 0, QV_ERR_FORMAT, "a: no dtype"},
        {"{\"__metadata__\": 7}", 0, QV_ERR_FORMAT, "__metadata__"},
        {"{" T("a", "F32", "[1]", "[0, 4]") "}", 3, QV_ERR_FORMAT, "outside of the 3 bytes"},
        {"{" T("a", "F32", "[1]", "[0, 4]") "}", 5, QV_ERR_FORMAT, "1 bytes at the end"},
        {"{" T("a", "F32", "[2]", "[0, 4]") "}", 4, QV_ERR_FORMAT, "F32[2] does not fill"},
        {"{" T("a", "F32", "[1]", "[4, 0]") "}", 4, QV_ERR_FORMAT, "outside"},
        {"{" T("a", "F32", "[1]", "[-4, 0]") "}", 4, QV_ERR_FORMAT, "outside"},
        {"{" T("a", "F32", "[1]", "[0]") "}", 4, QV_ERR_FORMAT, "data_offsets"},
        {"{" T("a", "F32", "[1]", "[0, 4.0]") "}", 4, QV_ERR_FORMAT, "data_offsets"},
        {"{" T("a", "F32", "[1]", "7") "}", 4, QV_ERR_FORMAT, "data_offsets"},
        {"{" T("a", "F32", "[1]", "[0, 9223372036854775807]") "}", 4, QV_ERR_FORMAT, "outside"},
        {"{" T("a", "F32", "[1]", "[0, 99999999999999999999]") "}", 4, QV_ERR_FORMAT, ""},
        {"{" T("a", "F32", "7", "[0, 4]") "}", 4, QV_ERR_FORMAT, "shape is not a list"},
        {"{" T("a", "F32", "[-1]", "[0, 4]") "}", 4, QV_ERR_FORMAT, "shape[0]"},
        {"{" T("a", "F32", "[1.5]", "[0, 4]") "}", 4, QV_ERR_FORMAT, "shape[0]"},
        {"{" T("a", "F32", "[4294967296, 4294967296]", "[0, 4]") "}", 4, QV_ERR_FORMAT,
         "overflows"},
        {"{" T("a", "F64", "[4611686018427387904]", "[0, 0]") "}", 0, QV_ERR_FORMAT, "fill"},
        {"{" T("a", "F32", "[1,1,1,1,1,1,1,1,1]", "[0, 4]") "}", 4, QV_ERR_LIMIT, "9 dimensions"},
        {"{" T("a", "F7", "[1]", "[0, 4]") "}", 4, QV_ERR_UNSUPPORTED, "F7"},
        {"{" T("a", "F32", "[1]", "[0, 4]") ", " T("a", "F32", "[1]", "[4, 8]") "}", 8,
         QV_ERR_FORMAT, ""},
        {"{" T("a", "F32", "[2]", "[0, 8]") ", " T("b", "F32", "[1]", "[4, 8]") "}", 8,
         QV_ERR_FORMAT, "b overlaps a"},
        {"{" T("a", "F32", "[1]", "[0, 4]") ", " T("b", "F32", "[1]", "[0, 4]") "}", 4,
         QV_ERR_FORMAT, "overlaps"},
        {"{" T("a", "F32", "[1]", "[0, 4]") ", " T("b", "F32", "[1]", "[8, 12]") "}", 12,
         QV_ERR_FORMAT, "4 bytes in front of b"},
        {"{\"a\\u0000b\": {}}", 0, QV_ERR_FORMAT, ""},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        size_t size;
        uint8_t *bytes = with_header(rows[i].header, rows[i].n_data, &size);
        qv_safetensors *st;
        cr_expect_eq(qv_safetensors_open_memory(bytes, size, "file", &st), rows[i].status, "%s",
                     rows[i].header);
        cr_expect_not_null(strstr(qv_error(), rows[i].says), "%s says: %s", rows[i].header,
                           qv_error());
        free(bytes);
    }
}

Test(safetensors, refuses_every_truncation)
{
    fx_file file = {.n = 0};
    qv_rng rng = qv_rng_seed(2);
    fx_add_random(&file, "a", QV_F32, 2, (int64_t[]){2, 3}, &rng, 1);
    fx_add_random(&file, "b", QV_BF16, 1, (int64_t[]){5}, &rng, 1);
    size_t size;
    uint8_t *bytes = fx_bytes(&file, &size);
    for (size_t n = 0; n < size; n++) {
        uint8_t *cut = malloc(n + 1); /* a block of its own, so that reading on is noticed */
        memcpy(cut, bytes, n);
        qv_safetensors *st;
        cr_expect_eq(qv_safetensors_open_memory(cut, n, "cut", &st), QV_ERR_FORMAT, "%zu bytes", n);
        free(cut);
    }
    for (int bit = 8; bit < 64; bit++) { /* header lengths up to 2^63 */
        uint64_t length = UINT64_C(1) << bit;
        memcpy(bytes, &length, 8);
        qv_safetensors *st;
        cr_expect_neq(qv_safetensors_open_memory(bytes, size, "long", &st), QV_OK);
    }
    free(bytes);
    fx_free(&file);
}

Test(safetensors, takes_empty_files_of_no_tensors)
{
    size_t size;
    uint8_t *bytes = with_header("{\"__metadata__\": {\"format\": \"pt\"}}  ", 0, &size);
    qv_safetensors *st;
    cr_assert_eq(qv_safetensors_open_memory(bytes, size, "empty", &st), QV_OK, "%s", qv_error());
    cr_expect_eq(qv_safetensors_count(st), 0);
    qv_safetensors_close(st);
    free(bytes);
}

Test(safetensors, finds_numbers_that_are_not_finite)
{
    static const qv_dtype dtypes[] = {QV_F32, QV_BF16, QV_F16, QV_F64};
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t d = 0; d < 4; d++) {
        for (size_t b = 0; b < 3; b++) {
            float values[2000] = {0};
            values[1900] = bad[b];
            fx_file file = {.n = 0};
            fx_add(&file, "x", dtypes[d], 1, (int64_t[]){1900}, values);
            fx_add(&file, "y", dtypes[d], 1, (int64_t[]){2000}, values);
            size_t size;
            uint8_t *bytes = fx_bytes(&file, &size);
            qv_safetensors *st;
            cr_assert_eq(qv_safetensors_open_memory(bytes, size, "file", &st), QV_OK);
            cr_expect_eq(qv_stored_tensor_require_finite(qv_safetensors_find(st, "x"), 0, 1900),
                         QV_OK);
            cr_expect_eq(qv_stored_tensor_require_finite(qv_safetensors_find(st, "y"), 0, 2000),
                         QV_ERR_FORMAT);
            cr_expect_not_null(strstr(qv_error(), "y: element 1900"), "%s", qv_error());
            cr_expect_eq(qv_stored_tensor_require_finite(qv_safetensors_find(st, "y"), 1901, 99),
                         QV_OK);
            qv_safetensors_close(st);
            free(bytes);
            fx_free(&file);
        }
    }
}

Test(safetensors, reads_shards_through_their_index)
{
    const char *dir = qv_temp_dir();
    shard(dir, "one.safetensors", "a", 1);
    shard(dir, "two.safetensors", "b", 2);
    qv_write_text(qv_path(dir, "model.safetensors.index.json"),
                  "{\"metadata\": {\"total_size\": 8}, \"weight_map\":"
                  " {\"a\": \"one.safetensors\", \"b\": \"two.safetensors\"}}");
    qv_safetensors *st;
    cr_assert_eq(qv_safetensors_open_dir(dir, &st), QV_OK, "%s", qv_error());
    cr_expect_eq(qv_safetensors_count(st), 2);
    float value;
    cr_expect_eq(qv_stored_tensor_f32(qv_safetensors_find(st, "b"), 0, 1, &value), QV_OK);
    cr_expect_eq(value, 2);
    qv_safetensors_close(st);
}

Test(safetensors, refuses_an_index_that_does_not_fit_its_files)
{
    static const struct {
        const char *index;
        qv_status status;
        const char *says;
    } rows[] = {
        {"{}", QV_ERR_FORMAT, "weight_map"},
        {"[]", QV_ERR_FORMAT, "weight_map"},
        {"{\"weight_map\": {\"a\": \"one.safetensors\", \"c\": \"one.safetensors\"}}",
         QV_ERR_FORMAT, "c is not in one.safetensors"},
        {"{\"weight_map\": {\"a\": \"two.safetensors\", \"b\": \"one.safetensors\"}}",
         QV_ERR_FORMAT, "a is not in two.safetensors"},
        {"{\"weight_map\": {\"a\": \"gone.safetensors\"}}", QV_ERR_NOT_FOUND, "gone.safetensors"},
        {"{\"weight_map\": {\"a\": \"../one.safetensors\"}}", QV_ERR_FORMAT, "not a file name"},
        {"{\"weight_map\": {\"a\": \"/etc/passwd\"}}", QV_ERR_FORMAT, "not a file name"},
        {"{\"weight_map\": {\"a\": \"..\"}}", QV_ERR_FORMAT, "not a file name"},
        {"{\"weight_map\": {\"a\": 7}}", QV_ERR_FORMAT, "not a string"},
        {"{\"weight_map\": {\"a\": \"one.safetensors\", \"b\": \"both.safetensors\"}}",
         QV_ERR_FORMAT, "a is in"},
        {"{\"weight_map\": {\"b\": \"both.safetensors\"}}", QV_ERR_FORMAT, "is not listed"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const char *dir = qv_temp_dir();
        shard(dir, "one.safetensors", "a", 1);
        shard(dir, "two.safetensors", "b", 2);
        fx_file both = {.n = 0};
        fx_add(&both, "a", QV_F32, 1, (int64_t[]){1}, (float[]){1});
        fx_add(&both, "b", QV_F32, 1, (int64_t[]){1}, (float[]){1});
        fx_write(&both, qv_path(dir, "both.safetensors"));
        fx_free(&both);
        qv_write_text(qv_path(dir, "model.safetensors.index.json"), rows[i].index);
        qv_safetensors *st;
        cr_expect_eq(qv_safetensors_open_dir(dir, &st), rows[i].status, "%s", rows[i].index);
        cr_expect_not_null(strstr(qv_error(), rows[i].says), "%s says: %s", rows[i].index,
                           qv_error());
    }
}

Test(safetensors, a_file_that_was_read_may_change_on_disk)
{
    const char *path = shard(qv_temp_dir(), "file", "a", 1);
    qv_safetensors *st;
    cr_assert_eq(qv_safetensors_open_file(path, 1 << 20, &st), QV_OK, "%s", qv_error());
    const qv_stored_tensor *tensor = qv_safetensors_at(st, 0);
    uint8_t before = *(const uint8_t *)tensor->data;
    cr_assert_eq(truncate(path, 0), 0); /* a mapped file would now end the process */
    cr_expect_eq(*(const uint8_t *)tensor->data, before);
    qv_safetensors_close(st);
}

Test(safetensors, refuses_what_is_not_a_file_it_can_read)
{
    const char *dir = qv_temp_dir();
    qv_safetensors *st;
    cr_expect_eq(qv_safetensors_open_dir(dir, &st), QV_ERR_NOT_FOUND);
    cr_expect_not_null(strstr(qv_error(), "neither"), "%s", qv_error());
    cr_expect_eq(qv_safetensors_open_file(dir, 0, &st), QV_ERR_FORMAT);
    cr_expect_eq(mkfifo(qv_path(dir, "fifo"), 0600), 0);
    cr_expect_eq(qv_safetensors_open_file(qv_path(dir, "fifo"), 0, &st), QV_ERR_FORMAT);
    qv_write_text(qv_path(dir, "empty"), "");
    cr_expect_eq(qv_safetensors_open_file(qv_path(dir, "empty"), 0, &st), QV_ERR_FORMAT);
    const char *path = shard(dir, "large", "a", 1);
    cr_expect_eq(qv_safetensors_open_file(path, 20, &st), QV_ERR_LIMIT);
    cr_expect_not_null(strstr(qv_error(), "the limit is 20"), "%s", qv_error());
}
