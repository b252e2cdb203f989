/* quiver cancel: stop a request by its id, from any connection. */
#include "clients/cli.h"

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

static bool show(const cli_common *common, const char *id, const qv_message *message)
{
    (void)message;
    if (common->json)
        printf("{\"id\": \"%s\", \"cancelled\": true}\n", id);
    else
        printf("%s cancelled\n", id);
    return true;
}

int cli_cancel(int argc, char **argv)
{
    static const cli_id_command command = {"cancel", qv_client_cancel, show};
    settings set;
    qv_options *options;
    if (qv_options_parse(table, sizeof table / sizeof table[0], &program, argc, argv, &set,
                         &options) != QV_OK)
        return cli_fail(CLI_USAGE);
    int code = qv_options_printed(options) ? CLI_OK : cli_each_id(&command, options, &set.common);
    qv_options_free(options);
    return code;
}
