/* quiver status: the pool as tables. */
#include "clients/cli.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <wchar.h>

typedef struct {
    cli_common common;
} settings;

static const qv_option table[] = {CLI_COMMON_OPTIONS(settings)};

static const qv_program program = {
    .name = "quiver status",
    .summary = "Show the workers, adapters and queues of a broker.",
};

#define MAX_COLUMNS 10
#define MAX_CELL    160

/* Columns the terminal needs for a UTF-8 text. */
static int display_width(const char *text)
{
    mbstate_t state = {0};
    int width = 0;
    while (*text) {
        wchar_t c;
        size_t n = mbrtowc(&c, text, MB_LEN_MAX, &state);
        if (n == (size_t)-1 || n == (size_t)-2 || n == 0)
            return width + (int)strlen(text);
        int w = wcwidth(c);
        width += w > 0 ? w : 0;
        text += n;
    }
    return width;
}

/* Print rows of cells with columns as wide as their widest cell; the first row is the heading. */
static void print_table(char (*cells)[MAX_COLUMNS][MAX_CELL], size_t n_rows, int n_columns)
{
    int width[MAX_COLUMNS] = {0};
    for (size_t r = 0; r < n_rows; r++)
        for (int c = 0; c < n_columns; c++) {
            int w = display_width(cells[r][c]);
            width[c] = w > width[c] ? w : width[c];
        }
    for (size_t r = 0; r < n_rows; r++) {
        for (int c = 0; c < n_columns; c++) {
            fputs(cells[r][c], stdout);
            if (c + 1 < n_columns)
                printf("%*s", width[c] - display_width(cells[r][c]) + 2, "");
        }
        putchar('\n');
    }
}

static void set_heading(char row[MAX_COLUMNS][MAX_CELL], const char *const *names, int n)
{
    for (int i = 0; i < n; i++)
        snprintf(row[i], MAX_CELL, "%s", names[i]);
}

static void join(char *out, size_t size, const qv_strs *list)
{
    size_t used = 0;
    out[0] = '\0';
    for (uint32_t i = 0; i < list->count && used + 1 < size; i++) {
        int n = snprintf(out + used, size - used, "%s%.*s", i ? " " : "", (int)list->data[i].size,
                         list->data[i].data);
        used += n > 0 ? (size_t)n : 0;
    }
    if (list->count == 0)
        snprintf(out, size, "-");
}

static void print_workers(const qv_msg_status *status)
{
    static const char *const names[] = {"WORKER",     "STATE", "BACKEND", "RUNNING", "WAITING",
                                        "FREE PAGES", "TOK/S", "SEEN",    "MODEL",   "ADAPTERS"};
    char(*cells)[MAX_COLUMNS][MAX_CELL] = calloc(status->workers.count + 1, sizeof *cells);
    if (!cells)
        return;
    set_heading(cells[0], names, 10);
    for (uint32_t i = 0; i < status->workers.count; i++) {
        const qv_msg_worker_status *w = &status->workers.data[i];
        char(*row)[MAX_CELL] = cells[i + 1];
        snprintf(row[0], MAX_CELL, "%.*s", (int)w->id.size, w->id.data);
        snprintf(row[1], MAX_CELL, "%.*s", (int)w->state.size, w->state.data);
        snprintf(row[2], MAX_CELL, "%.*s", (int)w->backend.size, w->backend.data);
        snprintf(row[3], MAX_CELL, "%lld/%lld", (long long)w->in_flight, (long long)w->capacity);
        snprintf(row[4], MAX_CELL, "%lld", (long long)w->waiting);
        snprintf(row[5], MAX_CELL, "%lld/%lld", (long long)w->free_pages,
                 (long long)w->total_pages);
        snprintf(row[6], MAX_CELL, "%.0f", w->tokens_per_second);
        snprintf(row[7], MAX_CELL, "%.1f s", (double)w->heartbeat_age_ms / 1000);
        snprintf(row[8], MAX_CELL, "%.*s", (int)w->model.size, w->model.data);
        join(row[9], MAX_CELL, &w->adapters);
    }
    print_table(cells, status->workers.count + 1, 10);
    free(cells);
}

void cli_print_adapters(const qv_msg_status *status)
{
    static const char *const names[] = {"ADAPTER", "STATE",  "RANK",    "REPLICAS",
                                        "PIN",     "QUEUED", "WORKERS", "REASON"};
    if (status->adapters.count == 0) {
        printf("no adapters\n");
        return;
    }
    char(*cells)[MAX_COLUMNS][MAX_CELL] = calloc(status->adapters.count + 1, sizeof *cells);
    if (!cells)
        return;
    set_heading(cells[0], names, 8);
    for (uint32_t i = 0; i < status->adapters.count; i++) {
        const qv_msg_adapter_status *a = &status->adapters.data[i];
        char(*row)[MAX_CELL] = cells[i + 1];
        snprintf(row[0], MAX_CELL, "%.*s", (int)a->name.size, a->name.data);
        snprintf(row[1], MAX_CELL, "%.*s", (int)a->state.size, a->state.data);
        snprintf(row[2], MAX_CELL, "%lld", (long long)a->rank);
        snprintf(row[3], MAX_CELL, "%u/%lld", a->workers.count, (long long)a->replicas_wanted);
        snprintf(row[4], MAX_CELL, "%s", a->pin ? "yes" : "no");
        snprintf(row[5], MAX_CELL, "%lld", (long long)a->queued);
        join(row[6], MAX_CELL, &a->workers);
        snprintf(row[7], MAX_CELL, "%.*s", a->reason.size ? (int)a->reason.size : 1,
                 a->reason.size ? a->reason.data : "-");
    }
    print_table(cells, status->adapters.count + 1, 8);
    free(cells);
}

static void print_status(const qv_msg_status *s)
{
    printf("broker %.*s  version %.*s  up %.0f s  redis %.*s  queued %lld/%lld  in flight %lld\n\n",
           (int)s->broker.size, s->broker.data, (int)s->version.size, s->version.data,
           (double)s->uptime_ms / 1000, (int)s->redis.size, s->redis.data, (long long)s->queued,
           (long long)s->queue_limit, (long long)s->in_flight);
    if (s->workers.count)
        print_workers(s);
    else
        printf("no workers\n");
    putchar('\n');
    cli_print_adapters(s);
}

int cli_status(int argc, char **argv)
{
    settings set;
    qv_options *options;
    if (qv_options_parse(table, sizeof table / sizeof table[0], &program, argc, argv, &set,
                         &options) != QV_OK)
        return cli_fail(CLI_USAGE);
    int code = CLI_OK;
    qv_client *client = NULL;
    const qv_msg_status *status;
    if (qv_options_printed(options))
        goto end;
    if (cli_connect(&set.common, &client) != QV_OK ||
        cli_get_status(client, set.common.timeout_ms, &status) != QV_OK) {
        code = cli_fail(CLI_FAILED);
        goto end;
    }
    if (set.common.json) {
        qv_message message = {.type = QV_MSG_STATUS, .status = *status};
        json_t *json;
        if (qv_message_to_json(&message, &json) != QV_OK) {
            code = cli_fail(CLI_FAILED);
            goto end;
        }
        json_dumpf(json, stdout, JSON_INDENT(2));
        putchar('\n');
        json_decref(json);
    } else {
        print_status(status);
    }
end:
    qv_client_close(client);
    qv_options_free(options);
    return code;
}
