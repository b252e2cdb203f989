/* quiver cancel: stop a request by its id, from any connection. */
#include "clients/cli.h"

#include "common/clock.h"

#include <stdio.h>

typedef struct {
    cli_common common;
} settings;

static const qv_option table[] = {CLI_COMMON_OPTIONS(settings)};

static const qv_program program = {
    .name = "quiver cancel",
    .summary =
        "Stop requests by id. A request that runs ends with finish_reason \"cancelled\" at its own "
        "client; one that waits never starts.",
    .args = "ID...",
    .max_args = 1024,
};

/* Send one cancel and wait for what the broker says of it. */
static bool cancel_one(qv_client *client, const char *id, const settings *set)
{
    const qv_message *message;
    qv_status status = qv_client_cancel(client, id);
    if (status == QV_OK)
        status = qv_client_poll(client, set->common.timeout_ms, &message);
    if (status != QV_OK) {
        cli_fail(CLI_FAILED);
        return false;
    }
    if (message->type == QV_MSG_ERROR) {
        fprintf(stderr, "quiver: %s: %.*s\n", id, (int)message->error.message.size,
                message->error.message.data);
        return false;
    }
    if (set->common.json)
        printf("{\"id\": \"%s\", \"cancelled\": true}\n", id);
    else
        printf("%s cancelled\n", id);
    return true;
}

int cli_cancel(int argc, char **argv)
{
    settings set;
    qv_options *options;
    if (qv_options_parse(table, sizeof table / sizeof table[0], &program, argc, argv, &set,
                         &options) != QV_OK)
        return cli_fail(CLI_USAGE);
    int code = CLI_OK;
    const qv_string_list *ids = qv_options_args(options);
    qv_client *client = NULL;
    if (qv_options_printed(options))
        goto end;
    if (ids->n == 0) {
        fprintf(stderr, "quiver cancel: name at least one request id\n");
        code = CLI_USAGE;
        goto end;
    }
    if (qv_client_open(&(qv_client_options){.endpoint = set.common.broker,
                                            .key = set.common.key,
                                            .broker_key = set.common.broker_key},
                       &client) != QV_OK) {
        code = cli_fail(CLI_FAILED);
        goto end;
    }
    for (size_t i = 0; i < ids->n; i++)
        if (!cancel_one(client, ids->items[i], &set))
            code = CLI_FAILED;
end:
    qv_client_close(client);
    qv_options_free(options);
    return code;
}
