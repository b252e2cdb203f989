/* quiver keys: make key pairs for brokers, workers and clients. */
#include "clients/cli.h"

#include "common/keys.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *tenant, *rights;
} settings;

static const qv_option table[] = {
    QV_OPTION(
        settings, tenant, STRING, "tenant", "NAME", "",
        "On whose behalf the key's requests are, for the line to put into the broker's list."),
    QV_OPTION(
        settings, rights, STRING, "rights", "RIGHTS", "submit",
        "What the key may do: submit, operate (status, explain, cancel) and worker, parted by "
        "commas."),
};

static const qv_program program = {
    .name = "quiver keys new",
    .summary =
        "Make a key pair: FILE gets both keys and is for its owner only, FILE.pub the public one. "
        "Prints the line for the broker's list of keys (--access).",
    .args = "FILE",
    .max_args = 1,
    .epilog = "Examples:\n"
              "  quiver keys new broker.key\n"
              "  quiver keys new acme.key --tenant acme --rights submit >> access\n"
              "  quiver keys new workers.key --rights worker >> access\n"
              "  quiver-broker --key broker.key --access access --frontend tcp://0.0.0.0:5555\n"
              "  quiver submit --key acme.key --broker-key broker.key.pub \"Hello\"\n",
};

/* Check the line by reading it as the broker will. */
static qv_status print_line(const qv_key_pair *pair, const settings *set)
{
    char line[512];
    qv_key_rights *rows;
    size_t n;
    int size = snprintf(line, sizeof line, "%s%s%s rights=%s", pair->public_key,
                        set->tenant[0] != '\0' ? " tenant=" : "", set->tenant, set->rights);
    if (size < 0 || (size_t)size >= sizeof line)
        return qv_fail(QV_ERR_ARG, "tenant or rights are too long");
    QV_TRY(qv_key_list_parse(line, (size_t)size, &rows, &n));
    free(rows);
    puts(line);
    return QV_OK;
}

int cli_keys(int argc, char **argv)
{
    settings set;
    qv_options *options;
    bool is_new = argc > 1 && strcmp(argv[1], "new") == 0;
    if (argc > 1 && !is_new && argv[1][0] != '-') {
        fprintf(stderr, "quiver keys: '%s' is not new\n", argv[1]);
        return CLI_USAGE;
    }
    if (qv_options_parse(table, sizeof table / sizeof table[0], &program, argc - is_new,
                         argv + is_new, &set, &options) != QV_OK)
        return cli_fail(CLI_USAGE);
    int code = CLI_OK;
    if (!qv_options_printed(options)) {
        const qv_string_list *args = qv_options_args(options);
        qv_key_pair pair = {0};
        if (args->n != 1 || !is_new) {
            fprintf(stderr, "quiver keys: say `quiver keys new FILE`\n");
            code = CLI_USAGE;
        } else if (qv_key_pair_make(&pair) != QV_OK || print_line(&pair, &set) != QV_OK ||
                   qv_key_pair_write(&pair, args->items[0]) != QV_OK) {
            code = cli_fail(CLI_FAILED);
        }
        explicit_bzero(&pair, sizeof pair);
    }
    qv_options_free(options);
    return code;
}
