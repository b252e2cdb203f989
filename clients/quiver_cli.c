/* quiver: publish jobs, follow the answers, look at the pool, place adapters. */
#include "clients/cli.h"

#include "common/clock.h"
#include "common/log.h"

#include <czmq.h>
#include <locale.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *summary;
} commands[] = {
    {"submit", cli_submit, "publish one or many jobs and print the answers as they arrive"},
    {"cancel", cli_cancel, "stop a request by its id"},
    {"status", cli_status, "show workers, adapters and queues"},
    {"explain", cli_explain, "why a request went where it went"},
    {"keys", cli_keys, "make keys for brokers, workers and clients"},
    {"adapters", cli_adapters, "list, add and remove adapters"},
};
#define N_COMMANDS (sizeof commands / sizeof commands[0])

volatile sig_atomic_t cli_interrupts;

static void on_signal(int signal_number)
{
    (void)signal_number;
    cli_interrupts++;
}

void cli_catch_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal}; /* no SA_RESTART: waiting calls return */
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

int cli_fail(int code)
{
    fprintf(stderr, "quiver: %s\n", qv_error());
    return code;
}

qv_status cli_connect(const cli_common *common, qv_client **out)
{
    return qv_client_open(&(qv_client_options){.endpoint = common->broker,
                                               .key = common->key,
                                               .broker_key = common->broker_key},
                          out);
}

static bool ask_of_id(const cli_id_command *command, qv_client *client, const char *id,
                      const cli_common *common)
{
    const qv_message *message;
    qv_status status = command->send(client, id);
    if (status == QV_OK)
        status = qv_client_poll(client, common->timeout_ms, &message);
    if (status != QV_OK) {
        cli_fail(CLI_FAILED);
        return false;
    }
    if (message->type == QV_MSG_ERROR) {
        fprintf(stderr, "quiver: %s: %.*s\n", id, (int)message->error.message.size,
                message->error.message.data);
        return false;
    }
    return command->show(common, id, message);
}

int cli_each_id(const cli_id_command *command, const qv_options *options, const cli_common *common)
{
    const qv_string_list *ids = qv_options_args(options);
    if (ids->n == 0) {
        fprintf(stderr, "quiver %s: name at least one request id\n", command->name);
        return CLI_USAGE;
    }
    qv_client *client;
    if (cli_connect(common, &client) != QV_OK)
        return cli_fail(CLI_FAILED);
    int code = CLI_OK;
    for (size_t i = 0; i < ids->n; i++)
        if (!ask_of_id(command, client, ids->items[i], common))
            code = CLI_FAILED;
    qv_client_close(client);
    return code;
}

qv_status cli_get_status(qv_client *client, int64_t timeout_ms, const qv_msg_status **out)
{
    QV_TRY(qv_client_request_status(client));
    uint64_t deadline = qv_now_ms() + (uint64_t)timeout_ms;
    for (;;) {
        uint64_t now = qv_now_ms();
        const qv_message *message;
        QV_TRY(qv_client_poll(client, now < deadline ? (int64_t)(deadline - now) : 0, &message));
        if (message->type == QV_MSG_ERROR)
            return qv_fail(QV_ERR_STATE, "%.*s: %.*s", (int)message->error.code.size,
                           message->error.code.data, (int)message->error.message.size,
                           message->error.message.data);
        if (message->type == QV_MSG_STATUS) {
            *out = &message->status;
            return QV_OK;
        }
    }
}

static void print_usage(FILE *out)
{
    fprintf(out, "Usage: quiver COMMAND [OPTIONS] [ARGUMENTS]\n\n"
                 "The command line client of a Quiver pool.\n\nCommands:\n");
    for (size_t i = 0; i < N_COMMANDS; i++)
        fprintf(out, "  %-10s %s\n", commands[i].name, commands[i].summary);
    fprintf(out, "\n`quiver COMMAND --help` describes the options of a command.\n");
}

int main(int argc, char **argv)
{
    setlocale(LC_CTYPE, "");
    setenv("ZSYS_SIGHANDLER", "false", 1); /* signals are ours: a first Ctrl-C cancels politely */
    qv_log_init(&(qv_log_options){.level = QV_LOG_WARN, .program = "quiver"});
    if (argc < 2) {
        print_usage(stderr);
        return CLI_USAGE;
    }
    const char *name = argv[1];
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        print_usage(stdout);
        return CLI_OK;
    }
    if (strcmp(name, "--version") == 0) {
        printf("quiver %s\n", QV_VERSION);
        return CLI_OK;
    }
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (strcmp(name, commands[i].name) == 0)
            return commands[i].run(argc - 1, argv + 1);
    fprintf(stderr, "quiver: '%s' is no command\n\n", name);
    print_usage(stderr);
    return CLI_USAGE;
}
