#include "common/redis_url.h"

#include "common/log.h"

#include <stdlib.h>
#include <string.h>

static void url_deinit(qv_redis_url *url)
{
    free(url->host);
    free(url->user);
    if (url->password != NULL)
        explicit_bzero(url->password, strlen(url->password));
    free(url->password);
    *url = (qv_redis_url){0};
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* A terminated copy of text[size] with %XX decoded. NULL for a bad escape, %00 or no memory. */
static char *percent_decode(const char *text, size_t size)
{
    char *out = malloc(size + 1), *p = out;
    if (out == NULL)
        return NULL;
    for (size_t i = 0; i < size; i++) {
        if (text[i] != '%') {
            *p++ = text[i];
            continue;
        }
        int high = i + 2 < size ? hex_digit(text[i + 1]) : -1;
        int low = i + 2 < size ? hex_digit(text[i + 2]) : -1;
        if (high < 0 || low < 0 || high * 16 + low == 0) {
            free(out);
            return NULL;
        }
        *p++ = (char)(high * 16 + low);
        i += 2;
    }
    *p = 0;
    return out;
}

/* All of text[size] as a number from 0 to max; -1 if it is none. */
static int parse_number(const char *text, size_t size, int max)
{
    int64_t value = 0;
    if (size == 0 || size > 9)
        return -1;
    for (size_t i = 0; i < size; i++) {
        if (text[i] < '0' || text[i] > '9')
            return -1;
        value = value * 10 + (text[i] - '0');
    }
    return value <= max ? (int)value : -1;
}

/* "user:password@" at the start of *text, which moves behind it. */
static qv_status parse_credentials(const char **text, const char *end, const char *shown,
                                   qv_redis_url *url)
{
    const char *at = memrchr(*text, '@', (size_t)(end - *text));
    if (at == NULL)
        return QV_OK;
    const char *colon = memchr(*text, ':', (size_t)(at - *text));
    if (colon == NULL)
        return qv_fail(QV_ERR_ARG, "%s: a user without a password (user:password@ or :password@)",
                       shown);
    url->user = colon > *text ? percent_decode(*text, (size_t)(colon - *text)) : NULL;
    url->password = percent_decode(colon + 1, (size_t)(at - colon - 1));
    if (url->password == NULL || (colon > *text && url->user == NULL))
        return qv_fail(QV_ERR_ARG, "%s: user or password is not percent-encoded properly", shown);
    *text = at + 1;
    return QV_OK;
}

static qv_status parse_tcp(const char *rest, const char *shown, qv_redis_url *url)
{
    const char *slash = rest + strcspn(rest, "/"), *db = slash + (*slash == '/');
    QV_TRY(parse_credentials(&rest, slash, shown, url));

    const char *host = rest, *host_end;
    if (*host == '[') { /* an IPv6 address */
        host++;
        host_end = memchr(host, ']', (size_t)(slash - host));
        rest = host_end != NULL ? host_end + 1 : slash;
    } else {
        host_end = memchr(host, ':', (size_t)(slash - host));
        rest = host_end = host_end != NULL ? host_end : slash;
    }
    if (host_end == NULL || host_end == host || (rest < slash && *rest != ':'))
        return qv_fail(QV_ERR_ARG, "%s: no host where it should be (redis://host:port/db)", shown);
    if (memchr(host, ',', (size_t)(host_end - host)) != NULL)
        return qv_fail(QV_ERR_ARG, "%s: a host with a comma; of several urls each has its redis://",
                       shown);
    url->port = rest < slash ? parse_number(rest + 1, (size_t)(slash - rest - 1), 65535) : 6379;
    if (url->port <= 0)
        return qv_fail(QV_ERR_ARG, "%s: the port is not a number from 1 to 65535", shown);
    url->db = *db == 0 ? 0 : parse_number(db, strlen(db), 1000000);
    if (url->db < 0)
        return qv_fail(QV_ERR_ARG, "%s: the database '%s' is not a number", shown, db);
    url->host = strndup(host, (size_t)(host_end - host));
    return url->host != NULL ? QV_OK : qv_fail(QV_ERR_NOMEM, "%s: out of memory", shown);
}

static qv_status parse_unix(const char *rest, const char *shown, qv_redis_url *url)
{
    const char *path = strchr(rest, '/');
    if (path == NULL)
        return qv_fail(QV_ERR_ARG, "%s: the path of the socket is not absolute (unix:///path)",
                       shown);
    QV_TRY(parse_credentials(&rest, path, shown, url));
    if (rest != path)
        return qv_fail(QV_ERR_ARG, "%s: a host before the path of a socket (unix:///path)", shown);
    const char *query = path + strcspn(path, "?");
    if (*query == '?') {
        url->db = strncmp(query, "?db=", 4) == 0
                      ? parse_number(query + 4, strlen(query + 4), 1000000)
                      : -1;
        if (url->db < 0)
            return qv_fail(QV_ERR_ARG, "%s: '%s' where only ?db=NUMBER may stand", shown, query);
    }
    if (query - path < 2 || query - path > 107)
        return qv_fail(QV_ERR_ARG, "%s: the path of a socket has 1 to 107 bytes", shown);
    url->host = strndup(path, (size_t)(query - path));
    return url->host != NULL ? QV_OK : qv_fail(QV_ERR_NOMEM, "%s: out of memory", shown);
}

/* On failure `url` is empty. */
static qv_status url_parse(const char *text, qv_redis_url *url)
{
    qv_status status;
    *url = (qv_redis_url){0};
    qv_log_mask_url(text, url->shown, sizeof url->shown);
    const char *shown = url->shown;
    if (strncmp(text, "redis://", 8) == 0)
        status = parse_tcp(text + 8, shown, url);
    else if (strncmp(text, "unix://", 7) == 0)
        status = parse_unix(text + 7, shown, url);
    else if (strncmp(text, "rediss://", 9) == 0)
        status = qv_fail(QV_ERR_ARG, "%s: TLS to Redis is not supported, use redis://", shown);
    else
        status = qv_fail(QV_ERR_ARG, "'%s' is no Redis url (redis://host:port/db or unix:///path)",
                         shown);
    if (status != QV_OK)
        url_deinit(url);
    return status;
}

/* The comma before the next url of a list, which is one before a scheme, or the end of the text. */
static const char *url_end(const char *text)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    const char *comma = strchr(text, ',');
    while (comma != NULL) {
        size_t scheme = strspn(comma + 1, letters);
        if (scheme > 0 && strncmp(comma + 1 + scheme, "://", 3) == 0)
            return comma;
        comma = strchr(comma + 1, ',');
    }
    return text + strlen(text);
}

void qv_redis_urls_deinit(qv_redis_url *urls, size_t n)
{
    for (size_t i = 0; i < n; i++)
        url_deinit(&urls[i]);
}

qv_status qv_redis_urls_parse(const char *text, qv_redis_url urls[QV_REDIS_MAX_SERVERS], size_t *n)
{
    qv_status status = text != NULL ? QV_OK : qv_fail(QV_ERR_ARG, "no Redis url");
    for (*n = 0; status == QV_OK; text++) { /* behind the comma */
        const char *end = url_end(text);
        char *one = strndup(text, (size_t)(end - text));
        if (one == NULL)
            status = qv_fail(QV_ERR_NOMEM, "redis: out of memory");
        else if (*n == QV_REDIS_MAX_SERVERS)
            status = qv_fail(QV_ERR_ARG, "more than %d Redis urls", QV_REDIS_MAX_SERVERS);
        else if ((status = url_parse(one, &urls[*n])) == QV_OK && urls[(*n)++].db != urls[0].db)
            status =
                qv_fail(QV_ERR_ARG, "%s: another database than %s, and one is a copy of the other",
                        urls[*n - 1].shown, urls[0].shown);
        if (one != NULL)
            explicit_bzero(one, strlen(one));
        free(one);
        text = end;
        if (*end == 0)
            break;
    }
    if (status != QV_OK)
        qv_redis_urls_deinit(urls, *n);
    return status;
}

qv_status qv_redis_check_url(const char *url)
{
    qv_redis_url parsed[QV_REDIS_MAX_SERVERS];
    size_t n;
    QV_TRY(qv_redis_urls_parse(url, parsed, &n));
    qv_redis_urls_deinit(parsed, n);
    return QV_OK;
}
