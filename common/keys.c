#include "common/keys.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

#define MAX_KEYS 65536
#define FILE_MAX 4096 /* bytes of a key file */

bool qv_key_is_valid(const char *text, size_t size)
{
    static const char digits[] = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                 ".-:+=^!/*?&<>()[]{}@%$#";
    if (size != QV_KEY_SIZE - 1)
        return false;
    char terminated[QV_KEY_SIZE];
    memcpy(terminated, text, size);
    terminated[size] = '\0';
    unsigned char raw[32];
    return strspn(terminated, digits) == size && zmq_z85_decode(raw, terminated) != NULL;
}

/* --- Files ------------------------------------------------------------------------------------ */

qv_status qv_key_pair_make(qv_key_pair *out)
{
    if (zmq_curve_keypair(out->public_key, out->secret_key) != 0)
        return qv_fail(QV_ERR_UNSUPPORTED, "cannot make keys: %s", zmq_strerror(errno));
    return QV_OK;
}

static qv_status write_file(const char *path, mode_t mode, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (fd < 0)
        return qv_fail(errno == EEXIST ? QV_ERR_EXISTS : QV_ERR_IO, "cannot write %s: %s", path,
                       strerror(errno));
    size_t size = strlen(text);
    bool ok = write(fd, text, size) == (ssize_t)size;
    ok = close(fd) == 0 && ok;
    return ok ? QV_OK : qv_fail(QV_ERR_IO, "cannot write %s: %s", path, strerror(errno));
}

qv_status qv_key_pair_write(const qv_key_pair *pair, const char *path)
{
    char text[256], name[4096];
    if (snprintf(name, sizeof name, "%s.pub", path) >= (int)sizeof name)
        return qv_fail(QV_ERR_ARG, "the path of a key file is too long");
    snprintf(text, sizeof text, "public %s\nsecret %s\n", pair->public_key, pair->secret_key);
    QV_TRY(write_file(path, 0600, text));
    snprintf(text, sizeof text, "public %s\n", pair->public_key);
    return write_file(name, 0644, text);
}

/* Read a small file, terminated. */
static qv_status read_file(const char *path, char text[FILE_MAX], struct stat *st)
{
    FILE *file = fopen(path, "re");
    if (file == NULL || fstat(fileno(file), st) != 0) {
        qv_status status = qv_fail(errno == ENOENT ? QV_ERR_NOT_FOUND : QV_ERR_IO,
                                   "cannot read the key file %s: %s", path, strerror(errno));
        if (file != NULL)
            fclose(file);
        return status;
    }
    size_t n = fread(text, 1, FILE_MAX - 1, file);
    text[n] = '\0';
    bool failed = ferror(file) != 0 || !feof(file) || strlen(text) != n;
    fclose(file);
    return failed ? qv_fail(QV_ERR_FORMAT, "%s is no key file", path) : QV_OK;
}

/* The word after `name` at the start of a line. */
static bool find_key(const char *text, const char *name, char out[QV_KEY_SIZE])
{
    size_t size = strlen(name);
    for (const char *line = text; line != NULL; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, name, size) != 0 || line[size] != ' ')
            continue;
        const char *key = line + size + strspn(line + size, " ");
        if (!qv_key_is_valid(key, strcspn(key, " \t\r\n")))
            return false;
        memcpy(out, key, QV_KEY_SIZE - 1);
        out[QV_KEY_SIZE - 1] = '\0';
        return true;
    }
    return false;
}

qv_status qv_key_pair_read(const char *path, qv_key_pair *out)
{
    char text[FILE_MAX];
    struct stat st;
    qv_status status = read_file(path, text, &st);
    if (status == QV_OK && (st.st_mode & 077) != 0)
        status = qv_fail(QV_ERR_ARG, "others can read the secret in %s: chmod 600 it", path);
    if (status == QV_OK &&
        (!find_key(text, "public", out->public_key) || !find_key(text, "secret", out->secret_key)))
        status = qv_fail(QV_ERR_FORMAT, "%s has no lines `public KEY` and `secret KEY`", path);
    explicit_bzero(text, sizeof text);
    return status;
}

qv_status qv_public_key_get(const char *text_or_path, char out[QV_KEY_SIZE])
{
    char text[FILE_MAX];
    struct stat st;
    /* A path may look like a key: what is there is a path. */
    qv_status status = read_file(text_or_path, text, &st);
    if (status == QV_ERR_NOT_FOUND && qv_key_is_valid(text_or_path, strlen(text_or_path))) {
        memcpy(out, text_or_path, QV_KEY_SIZE);
        return QV_OK;
    }
    if (status == QV_ERR_NOT_FOUND)
        return qv_fail(QV_ERR_ARG, "'%s' is neither a public key of 40 characters nor a file",
                       text_or_path);
    if (status == QV_OK && !find_key(text, "public", out))
        status = qv_fail(QV_ERR_FORMAT, "%s has no line `public KEY`", text_or_path);
    explicit_bzero(text, sizeof text);
    return status;
}

/* --- Lists ------------------------------------------------------------------------------------ */

typedef struct {
    const char *data;
    size_t size;
} word;

/* The next word of a line; size 0: none is left. */
static word next_word(const char **at, const char *end)
{
    while (*at < end && (**at == ' ' || **at == '\t' || **at == '\r'))
        ++*at;
    word w = {*at, 0};
    while (*at < end && **at != ' ' && **at != '\t' && **at != '\r')
        ++*at;
    w.size = (size_t)(*at - w.data);
    return w;
}

static bool starts_with(word w, const char *text)
{
    size_t n = strlen(text);
    return w.size >= n && memcmp(w.data, text, n) == 0;
}

static qv_status parse_rights(word w, size_t line, qv_key_rights *out)
{
    const struct {
        const char *name;
        bool *right;
    } rows[] = {{"submit", &out->submit}, {"operate", &out->operate}, {"worker", &out->worker}};
    for (const char *at = w.data, *end = w.data + w.size; at <= end;) {
        const char *comma = memchr(at, ',', (size_t)(end - at));
        size_t size = (size_t)((comma != NULL ? comma : end) - at);
        bool known = false;
        for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
            if (strlen(rows[i].name) == size && memcmp(rows[i].name, at, size) == 0)
                known = *rows[i].right = true;
        if (!known)
            return qv_fail(QV_ERR_FORMAT,
                           "line %zu: a right is submit, operate or worker, not '%.*s'", line,
                           (int)(size < 32 ? size : 32), at);
        at += size + 1;
    }
    return QV_OK;
}

static qv_status parse_tenant(word w, size_t line, qv_key_rights *out)
{
    if (w.size > QV_KEY_TENANT_MAX)
        return qv_fail(QV_ERR_FORMAT, "line %zu: a tenant has at most %d bytes", line,
                       QV_KEY_TENANT_MAX);
    for (size_t i = 0; i < w.size; i++)
        if (w.data[i] <= ' ' || w.data[i] > '~')
            return qv_fail(QV_ERR_FORMAT, "line %zu: a tenant has printable ASCII only", line);
    memcpy(out->tenant, w.data, w.size);
    out->tenant[w.size] = '\0';
    return QV_OK;
}

/* One line without its comment. *found says whether there was a key. */
static qv_status parse_line(const char *at, const char *end, size_t line, qv_key_rights *out,
                            bool *found)
{
    word key = next_word(&at, end);
    *found = key.size > 0;
    if (!*found)
        return QV_OK;
    *out = (qv_key_rights){0};
    if (!qv_key_is_valid(key.data, key.size))
        return qv_fail(QV_ERR_FORMAT, "line %zu does not begin with a public key of 40 characters",
                       line);
    memcpy(out->key, key.data, key.size);
    for (word w; (w = next_word(&at, end)).size > 0;) {
        if (starts_with(w, "tenant="))
            QV_TRY(parse_tenant((word){w.data + 7, w.size - 7}, line, out));
        else if (starts_with(w, "rights="))
            QV_TRY(parse_rights((word){w.data + 7, w.size - 7}, line, out));
        else
            return qv_fail(QV_ERR_FORMAT, "line %zu: tenant=… or rights=… was expected, not '%.*s'",
                           line, (int)(w.size < 32 ? w.size : 32), w.data);
    }
    if (!out->submit && !out->operate && !out->worker)
        return qv_fail(QV_ERR_FORMAT, "line %zu gives the key no rights", line);
    return QV_OK;
}

/* Z85 has a # of its own, which no key can begin with: a comment begins a line or follows a blank.
 */
static const char *find_comment(const char *at, const char *end)
{
    for (const char *p = at; p < end; p++)
        if (*p == '#' && (p == at || p[-1] == ' ' || p[-1] == '\t'))
            return p;
    return end;
}

static int by_key(const void *a, const void *b)
{
    return strcmp(((const qv_key_rights *)a)->key, ((const qv_key_rights *)b)->key);
}

static qv_status parse_lines(const char *text, size_t size, qv_key_rights **rows, size_t *n)
{
    size_t capacity = 0, line = 0;
    for (const char *at = text, *end = text + size; at < end;) {
        const char *stop = memchr(at, '\n', (size_t)(end - at));
        stop = stop != NULL ? stop : end;
        bool found;
        qv_key_rights row;
        const char *comment = find_comment(at, stop);
        QV_TRY(parse_line(at, comment, ++line, &row, &found));
        at = stop + 1;
        if (!found)
            continue;
        if (*n == MAX_KEYS)
            return qv_fail(QV_ERR_LIMIT, "more than %d keys", MAX_KEYS);
        if (*n == capacity) {
            capacity = capacity > 0 ? 2 * capacity : 16;
            qv_key_rights *grown = realloc(*rows, capacity * sizeof *grown);
            if (grown == NULL)
                return qv_fail(QV_ERR_NOMEM, "no memory for %zu keys", capacity);
            *rows = grown;
        }
        (*rows)[(*n)++] = row;
    }
    return QV_OK;
}

qv_status qv_key_list_parse(const char *text, size_t size, qv_key_rights **out, size_t *n)
{
    qv_key_rights *rows = NULL;
    size_t count = 0;
    char *copy = malloc(size + 1); /* terminated, for strcspn */
    if (copy == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for a list of keys");
    memcpy(copy, text, size);
    copy[size] = '\0';
    qv_status status = parse_lines(copy, size, &rows, &count);
    free(copy);
    if (status == QV_OK && count > 0)
        qsort(rows, count, sizeof *rows, by_key);
    for (size_t i = 1; status == QV_OK && i < count; i++)
        if (strcmp(rows[i - 1].key, rows[i].key) == 0)
            status = qv_fail(QV_ERR_FORMAT, "the key %s is there twice", rows[i].key);
    if (status != QV_OK) {
        free(rows);
        return status;
    }
    *out = rows;
    *n = count;
    return QV_OK;
}
