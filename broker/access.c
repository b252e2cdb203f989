/* ZAP (ZeroMQ RFC 27): libzmq asks over inproc, once per connection that says hello. */
#include "broker/access.h"

#include "common/log.h"

#include <czmq.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define ZAP_ENDPOINT "inproc://zeromq.zap.01"
#define LIST_MAX     ((size_t)16 << 20)

struct qv_access {
    zloop_t *loop;
    char *path;
    struct timespec changed; /* of the file that was read */
    zsock_t *zap;
    qv_map *by_key; /* public key -> row of `rows` */
    qv_key_rights *rows;
    qv_identity *identities; /* [n] of the rows */
    size_t n;
    qv_access_stats stats;
};

static const qv_identity nobody = {.tenant = ""};

/* --- The list ---------------------------------------------------------------------------------*/

static qv_status read_list(const char *path, char **text, size_t *size, struct stat *st)
{
    FILE *file = fopen(path, "re");
    if (file == NULL || fstat(fileno(file), st) != 0) {
        qv_status status =
            qv_fail(QV_ERR_IO, "cannot read the list of keys %s: %s", path, strerror(errno));
        if (file != NULL)
            fclose(file);
        return status;
    }
    if ((size_t)st->st_size > LIST_MAX) {
        fclose(file);
        return qv_fail(QV_ERR_LIMIT, "the list of keys %s is larger than %zu bytes", path,
                       LIST_MAX);
    }
    *text = malloc((size_t)st->st_size + 1);
    *size = *text != NULL ? fread(*text, 1, (size_t)st->st_size, file) : 0;
    fclose(file);
    return *text != NULL ? QV_OK : qv_fail(QV_ERR_NOMEM, "no memory for the list of keys");
}

static qv_status load(qv_access *access)
{
    char *text = NULL;
    size_t size, n = 0;
    struct stat st;
    qv_key_rights *rows = NULL;
    QV_TRY(read_list(access->path, &text, &size, &st));
    access->changed = st.st_mtim;
    qv_status status = qv_key_list_parse(text, size, &rows, &n);
    free(text);
    if (status != QV_OK)
        return qv_fail_prefix(status, "%s", access->path);
    qv_map *by_key = qv_map_new(n);
    qv_identity *identities = calloc(n + 1, sizeof *identities);
    bool ok = by_key != NULL && identities != NULL;
    for (size_t i = 0; ok && i < n; i++) {
        identities[i] = (qv_identity){
            .tenant = rows[i].tenant, .submit = rows[i].submit, .operate = rows[i].operate};
        ok = qv_map_set_str(by_key, rows[i].key, &rows[i]) == QV_OK;
    }
    if (!ok) {
        qv_map_free(by_key, NULL);
        free(identities);
        free(rows);
        return qv_fail(QV_ERR_NOMEM, "no memory for %zu keys", n);
    }
    qv_map_free(access->by_key, NULL);
    free(access->identities);
    free(access->rows);
    access->by_key = by_key;
    access->identities = identities;
    access->rows = rows;
    access->n = n;
    return QV_OK;
}

void qv_access_check(qv_access *access)
{
    struct stat st;
    if (stat(access->path, &st) != 0 || (st.st_mtim.tv_sec == access->changed.tv_sec &&
                                         st.st_mtim.tv_nsec == access->changed.tv_nsec))
        return;
    if (load(access) == QV_OK)
        qv_info("the list of keys %s was read again: %zu keys", access->path, access->n);
    else
        qv_err("the list of keys is not used: %s", qv_error());
}

static const qv_key_rights *find(const qv_access *access, const char *user)
{
    return user != NULL ? qv_map_get_str(access->by_key, user) : NULL;
}

const qv_identity *qv_access_identity(const qv_access *access, const char *user)
{
    const qv_key_rights *row = find(access, user);
    return row != NULL ? &access->identities[row - access->rows] : &nobody;
}

bool qv_access_is_worker(const qv_access *access, const char *user)
{
    const qv_key_rights *row = find(access, user);
    return row != NULL && row->worker;
}

const qv_access_stats *qv_access_get_stats(const qv_access *access)
{
    return &access->stats;
}

/* --- ZAP --------------------------------------------------------------------------------------*/

/* Whether a connection is let in; NULL, or why not. */
static const char *judge(qv_access *access, const char *domain, const char *mechanism,
                         zframe_t *credentials, char key[QV_KEY_SIZE])
{
    if (strcmp(mechanism, "CURVE") != 0 || credentials == NULL || zframe_size(credentials) != 32 ||
        zmq_z85_encode(key, zframe_data(credentials), 32) == NULL) {
        access->stats.refused_other++;
        return "a CURVE key is needed";
    }
    const qv_key_rights *row = find(access, key);
    if (row == NULL) {
        access->stats.refused_unknown++;
        return "the key is not known";
    }
    bool for_workers = strcmp(domain, QV_ACCESS_WORKERS) == 0;
    if (for_workers ? row->worker : row->submit || row->operate)
        return NULL;
    access->stats.refused_rights++;
    return "the key has no right to this";
}

static int on_zap(zloop_t *loop, zsock_t *socket, void *user)
{
    (void)loop;
    qv_access *access = user;
    zmsg_t *request = zmsg_recv(socket);
    if (request == NULL)
        return 0;
    char *version = zmsg_popstr(request), *sequence = zmsg_popstr(request);
    char *domain = zmsg_popstr(request), *address = zmsg_popstr(request);
    char *identity = zmsg_popstr(request), *mechanism = zmsg_popstr(request);
    zframe_t *credentials = zmsg_pop(request);
    char key[QV_KEY_SIZE] = "";
    const char *why = mechanism != NULL ? judge(access, domain, mechanism, credentials, key)
                                        : "the question makes no sense";
    if (why != NULL)
        QV_LOG_EVERY(1000, 10, QV_LOG_WARN, NULL, "refused a connection of %s to the %s: %s%s%s",
                     address != NULL ? address : "?", domain != NULL ? domain : "?", why,
                     key[0] != '\0' ? ": " : "", key);
    zstr_sendx(socket, "1.0", sequence != NULL ? sequence : "", why == NULL ? "200" : "400",
               why == NULL ? "OK" : why, why == NULL ? key : "", "", NULL);
    zframe_destroy(&credentials);
    free(version);
    free(sequence);
    free(domain);
    free(address);
    free(identity);
    free(mechanism);
    zmsg_destroy(&request);
    return 0;
}

qv_status qv_access_open(zloop_t *loop, const char *path, qv_access **out)
{
    qv_access *access = calloc(1, sizeof *access);
    if (access == NULL)
        return qv_fail(QV_ERR_NOMEM, "no memory for access control");
    access->loop = loop;
    access->path = strdup(path);
    qv_status status =
        access->path != NULL ? load(access) : qv_fail(QV_ERR_NOMEM, "no memory for a path");
    if (status == QV_OK) {
        access->zap = zsock_new(ZMQ_REP);
        if (access->zap == NULL || zsock_bind(access->zap, ZAP_ENDPOINT) < 0)
            status = qv_fail(QV_ERR_STATE, "cannot answer questions about keys: %s",
                             zmq_strerror(errno));
        else if (zloop_reader(loop, access->zap, on_zap, access) != 0)
            status = qv_fail(QV_ERR_NOMEM, "no memory for the event loop");
    }
    if (status != QV_OK) {
        qv_access_close(access);
        return status;
    }
    *out = access;
    return QV_OK;
}

void qv_access_close(qv_access *access)
{
    if (access == NULL)
        return;
    if (access->zap != NULL)
        zloop_reader_end(access->loop, access->zap);
    zsock_destroy(&access->zap);
    qv_map_free(access->by_key, NULL);
    free(access->identities);
    free(access->rows);
    free(access->path);
    free(access);
}
