/* quiver explain: why a request went where it went. */
#include "clients/cli.h"

#include "common/clock.h"

#include <stdio.h>

typedef struct {
    cli_common common;
} settings;

static const qv_option table[] = {CLI_COMMON_OPTIONS(settings)};

static const qv_program program = {
    .name = "quiver explain",
    .summary = "Tell of a recent request which workers were considered with which scores, what it "
               "waited for, and where it went. The broker remembers the latest ones.",
    .args = "ID...",
    .max_args = 1024,
};

#define TEXT(s) (int)(s).size, (s).data

static void print_decision(const qv_msg_explain_decision *d)
{
    printf("  %10.1f ms  %.*s%s%.*s\n", d->at_ms, TEXT(d->verdict), d->worker.size ? " " : "",
           TEXT(d->worker));
    for (uint32_t i = 0; i < d->candidates.count; i++) {
        const qv_msg_explain_candidate *c = &d->candidates.data[i];
        printf("      %-20.*s %9.1f ms = queue %.1f + load %.1f + prompt %.1f%s\n", TEXT(c->worker),
               c->score_ms, c->queue_ms, c->load_ms, c->prefill_ms, c->credit ? "" : "  (full)");
    }
}

static void print_explain(const qv_msg_explain *x)
{
    printf("%.*s: %.*s", TEXT(x->id), TEXT(x->state));
    printf("  adapter %.*s", x->adapter.size ? (int)x->adapter.size : 6,
           x->adapter.size ? x->adapter.data : "(base)");
    if (x->asked.size != x->adapter.size)
        printf(" (asked for %.*s)", TEXT(x->asked));
    printf("  tenant '%.*s'  priority %lld  received %.1f s ago\n", TEXT(x->tenant),
           (long long)x->priority, x->age_ms / 1000);
    if (x->error.size > 0)
        printf("  %.*s\n", TEXT(x->error));
    for (uint32_t i = 0; i < x->waits.count; i++)
        printf("waited %.1f ms for %.*s\n", x->waits.data[i].ms, TEXT(x->waits.data[i].reason));
    if (qv_has(x, explain, first_token_ms))
        printf("first token after %.1f ms\n", x->first_token_ms);
    printf("looked for a worker %lld times%s\n", (long long)x->n_decisions,
           x->n_decisions > 2 ? ", the first and the latest:" : "");
    for (uint32_t i = 0; i < x->decisions.count; i++)
        print_decision(&x->decisions.data[i]);
    printf("ran %lld times\n", (long long)x->n_attempts);
    for (uint32_t i = 0; i < x->attempts.count; i++) {
        const qv_msg_explain_attempt *a = &x->attempts.data[i];
        printf("  %10.1f ms  %.*s for %.1f ms: %.*s\n", a->at_ms, TEXT(a->worker), a->ms,
               TEXT(a->end));
    }
}

static bool print_json(const qv_message *message)
{
    json_t *json;
    if (qv_message_to_json(message, &json) != QV_OK) {
        cli_fail(CLI_FAILED);
        return false;
    }
    json_dumpf(json, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(json);
    return true;
}

static bool show(const cli_common *common, const char *id, const qv_message *message)
{
    (void)id;
    if (common->json)
        return print_json(message);
    print_explain(&message->explain);
    return true;
}

int cli_explain(int argc, char **argv)
{
    static const cli_id_command command = {"explain", qv_client_request_explain, show};
    settings set;
    qv_options *options;
    if (qv_options_parse(table, sizeof table / sizeof table[0], &program, argc, argv, &set,
                         &options) != QV_OK)
        return cli_fail(CLI_USAGE);
    int code = qv_options_printed(options) ? CLI_OK : cli_each_id(&command, options, &set.common);
    qv_options_free(options);
    return code;
}
