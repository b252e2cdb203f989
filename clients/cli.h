/* The commands of `quiver` and what they share. Each command parses its own options and returns the
 * exit code of the process.
 */
#ifndef QV_CLIENTS_CLI_H
#define QV_CLIENTS_CLI_H

#include "clients/quiver_client.h"
#include "common/options.h"

#include <signal.h>

enum {
    CLI_OK = 0,
    CLI_FAILED = 1,       /* at least one request failed, or the broker does not answer */
    CLI_USAGE = 2,        /* the command line makes no sense */
    CLI_INTERRUPTED = 130 /* Ctrl-C */
};

int cli_submit(int argc, char **argv);
int cli_cancel(int argc, char **argv);
int cli_status(int argc, char **argv);
int cli_explain(int argc, char **argv);
int cli_adapters(int argc, char **argv);
int cli_keys(int argc, char **argv);

/* Print "quiver: <the thread's error sentence>" and return `code`. */
int cli_fail(int code);

/* Counts SIGINT and SIGTERM since cli_catch_signals(). */
extern volatile sig_atomic_t cli_interrupts;
void cli_catch_signals(void);

/* Ask the broker for its status. *out is borrowed from the client. */
qv_status cli_get_status(qv_client *client, int64_t timeout_ms, const qv_msg_status **out);

/* The adapters of a status as a table. */
void cli_print_adapters(const qv_msg_status *status);

/* Option rows that every command has; the settings struct starts with cli_common. */
typedef struct {
    const char *broker, *key, *broker_key;
    int64_t timeout_ms;
    bool json;
} cli_common;

#define CLI_COMMON_OPTIONS(settings)                                                               \
    QV_OPTION(settings, common.broker, STRING, "broker", "ENDPOINT", "tcp://127.0.0.1:5555",       \
              "The broker's client endpoint, or those of several brokers parted by commas.",       \
              .section = "Connection"),                                                            \
        QV_OPTION(settings, common.key, STRING, "key", "FILE", NULL,                               \
                  "Our key pair (`quiver keys new`), for brokers that ask for keys.",              \
                  .section = "Connection"),                                                        \
        QV_OPTION(settings, common.broker_key, STRING, "broker-key", "KEY", NULL,                  \
                  "The brokers' public key, or the file that has it.", .section = "Connection"),   \
        QV_OPTION(settings, common.timeout_ms, DURATION, "timeout", "TIME", "60s",                 \
                  "Give up after this long without any message from the broker.",                  \
                  .section = "Connection", .min = 1, .max = 86400000),                             \
        QV_OPTION(settings, common.json, FLAG, "json", NULL, NULL,                                 \
                  "Print JSON, one object a line, instead of text for people.",                    \
                  .section = "Output")

/* Connect as the options say. */
qv_status cli_connect(const cli_common *common, qv_client **out);

/* A command over request ids: `send` asks the broker about one, `show` prints what it says (false:
 * it could not). */
typedef struct {
    const char *name;
    qv_status (*send)(qv_client *client, const char *id);
    bool (*show)(const cli_common *common, const char *id, const qv_message *message);
} cli_id_command;

/* All ids of the command line, one after the other. Returns the program's exit code: CLI_OK only if
 * none was refused. */
int cli_each_id(const cli_id_command *command, const qv_options *options, const cli_common *common);

#endif
