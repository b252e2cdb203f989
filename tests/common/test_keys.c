/* Key files, lists of keys, and folders that adapters may come from. */
#include "common/confine.h"
#include "common/keys.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define KEY  "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
#define HASH "uyMQ#9Q*3/hl#eC<P43f(i-cJUQC&X.zl]Ew52X%"

Test(keys, a_pair_is_written_for_its_owner_and_read_again)
{
    char dir[] = "/tmp/quiver-keys-XXXXXX", path[64], public_path[80], key[QV_KEY_SIZE];
    cr_assert_not_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/k", dir);
    snprintf(public_path, sizeof public_path, "%s.pub", path);
    qv_key_pair pair, read;
    cr_assert_eq(qv_key_pair_make(&pair), QV_OK, "%s", qv_error());
    cr_assert_eq(qv_key_pair_write(&pair, path), QV_OK, "%s", qv_error());
    cr_assert_eq(qv_key_pair_write(&pair, path), QV_ERR_EXISTS);
    struct stat st;
    cr_assert_eq(stat(path, &st), 0);
    cr_assert_eq(st.st_mode & 0777, 0600);
    cr_assert_eq(qv_key_pair_read(path, &read), QV_OK, "%s", qv_error());
    cr_assert_str_eq(read.secret_key, pair.secret_key);
    cr_assert_eq(qv_public_key_get(public_path, key), QV_OK, "%s", qv_error());
    cr_assert_str_eq(key, pair.public_key);
    cr_assert_eq(qv_public_key_get(pair.public_key, key), QV_OK);
    cr_assert_eq(qv_public_key_get("no such thing", key), QV_ERR_ARG);
    cr_assert_eq(qv_key_pair_read(public_path, &read), QV_ERR_ARG, "others can read it");
    chmod(path, 0640);
    cr_assert_eq(qv_key_pair_read(path, &read), QV_ERR_ARG);
    cr_assert_null(strstr(qv_error(), pair.secret_key));
    unlink(path);
    unlink(public_path);
    rmdir(dir);
}

/* A path of 40 characters, all of them digits of Z85, was once taken for a key. */
Test(keys, a_file_whose_path_looks_like_a_key_is_a_file)
{
    char path[] = "/tmp/quiver-0123456789-0123456789-012345", key[QV_KEY_SIZE];
    cr_assert(qv_key_is_valid(path, strlen(path)));
    FILE *file = fopen(path, "w");
    cr_assert_not_null(file);
    fprintf(file, "public %s\n", KEY);
    fclose(file);
    cr_assert_eq(qv_public_key_get(path, key), QV_OK, "%s", qv_error());
    cr_assert_str_eq(key, KEY);
    unlink(path);
}

Test(keys, a_list_says_what_each_key_may_do)
{
    static const char text[] =
        "# who may connect\n\n" KEY " tenant=acme rights=submit,operate # a\n"
        "  " HASH "\trights=worker\r\n";
    qv_key_rights *rows;
    size_t n;
    cr_assert_eq(qv_key_list_parse(text, strlen(text), &rows, &n), QV_OK, "%s", qv_error());
    cr_assert_eq(n, 2);
    const qv_key_rights *acme = strcmp(rows[0].key, KEY) == 0 ? &rows[0] : &rows[1];
    const qv_key_rights *other = acme == &rows[0] ? &rows[1] : &rows[0];
    cr_assert_str_eq(acme->tenant, "acme");
    cr_assert(acme->submit && acme->operate && !acme->worker);
    cr_assert_str_eq(other->key, HASH);
    cr_assert(other->worker && !other->submit && other->tenant[0] == '\0');
    free(rows);
}

Test(keys, a_list_that_makes_no_sense_names_the_line)
{
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"\nshort rights=submit", "line 2"},
        {KEY, "no rights"},
        {KEY " rights=", "not ''"},
        {KEY " rights=submit,fly", "'fly'"},
        {KEY " rights=submit more", "'more'"},
        {KEY " rights=submit tenant=\x01", "printable"},
        {KEY " rights=submit\n" KEY " rights=worker", "twice"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        qv_key_rights *rows;
        size_t n;
        cr_assert_neq(qv_key_list_parse(cases[i].text, strlen(cases[i].text), &rows, &n), QV_OK,
                      "%zu", i);
        cr_assert_not_null(strstr(qv_error(), cases[i].says), "%zu: %s", i, qv_error());
    }
}

Test(confine, only_what_lies_below_a_root_is_allowed)
{
    char dir[] = "/tmp/quiver-roots-XXXXXX", path[128], root[64];
    cr_assert_not_null(mkdtemp(dir));
    snprintf(root, sizeof root, "%s/in", dir);
    mkdir(root, 0700);
    snprintf(path, sizeof path, "%s/in-side", dir); /* begins like the root, is not below it */
    mkdir(path, 0700);
    snprintf(path, sizeof path, "%s/in/a", dir);
    mkdir(path, 0700);
    snprintf(path, sizeof path, "%s/in/out", dir);
    cr_assert_eq(symlink("/etc", path), 0);
    snprintf(path, sizeof path, "%s/in/b", dir);
    mkdir(path, 0700);
    snprintf(path, sizeof path, "%s/in/b/file", dir);
    cr_assert_eq(symlink("/etc/passwd", path), 0);
    static const struct {
        const char *path;
        qv_status want;
    } cases[] = {
        {"in/a", QV_OK},
        {"in", QV_ERR_ARG}, /* it holds a link that leads out */
        {"in-side", QV_ERR_ARG},
        {"in/a/../../in-side", QV_ERR_ARG},
        {"in/out", QV_ERR_ARG},
        {"in/b", QV_ERR_ARG},
        {"in/no", QV_ERR_NOT_FOUND},
    };
    const char *roots[] = {"/nonexistent", root};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, cases[i].path);
        cr_expect_eq(qv_confine(path, roots, 2), cases[i].want, "%s: %s", cases[i].path,
                     qv_error());
        cr_expect_eq(qv_confine(path, roots, 0), QV_OK, "without roots everything is allowed");
    }
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", dir);
    cr_assert_eq(system(command), 0);
}
