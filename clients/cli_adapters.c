/* quiver adapters: what the pool holds, and what it should hold.
 *
 * `list` asks the broker. `add` and `remove` write the desired state (quiver:want:<name>) into
 * Redis, as an operator would with redis-cli, and then watch the broker until the pool is as
 * wanted.
 */
#include "clients/cli.h"

#include "common/clock.h"
#include "common/registry.h"

#include <czmq.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    cli_common common;
    const char *redis;
    int64_t replicas, max_replicas;
    bool pin;
    qv_string_list workers, tenants;
    int64_t wait_ms;
} settings;

static const qv_option table[] = {
    CLI_COMMON_OPTIONS(settings),
    QV_OPTION(settings, redis, STRING, "redis", "URLS", "redis://127.0.0.1:6379",
              "The Redis that the broker watches (for add and remove).", .section = "Connection",
              .secret = true),
    QV_OPTION(settings, replicas, INT, "replicas", "N", "1",
              "On how many workers the adapter should be at least.", .section = "Placement",
              .min = 0, .max = 1024),
    QV_OPTION(settings, max_replicas, INT, "max-replicas", "N", "0",
              "On how many it may be when demand asks for more; 0 leaves what is set, at first any "
              "number.",
              .section = "Placement", .min = 0, .max = 1024),
    QV_OPTION(settings, tenants, LIST, "tenant", "NAME", NULL,
              "Only these tenants may use it (repeat the option); without one what is set stays.",
              .section = "Placement"),
    QV_OPTION(settings, pin, FLAG, "pin", NULL, NULL, "Never evict it from a worker.",
              .section = "Placement"),
    QV_OPTION(settings, workers, LIST, "worker", "ID", NULL,
              "Only on these workers (repeat the option).", .section = "Placement"),
    QV_OPTION(settings, wait_ms, DURATION, "wait", "TIME", "30s",
              "How long to wait until the pool is as wanted; 0 does not wait.",
              .section = "Placement", .min = 0, .max = 86400000),
};

static const qv_program program = {
    .name = "quiver adapters",
    .summary = "List the adapters of the pool, or change what it should hold.",
    .args = "list | add NAME DIR | remove NAME",
    .max_args = 3,
    .epilog = "Examples:\n"
              "  quiver adapters list\n"
              "  quiver adapters add french demo/tiny-qwen3.5/adapters/french --replicas 2\n"
              "  quiver adapters remove french\n",
};

/* --- writing to Redis
 * -----------------------------------------------------------------------------*/

typedef struct {
    const char *name;
    const qv_want *want; /* NULL deletes */
    qv_registry *registry;
    zloop_t *loop;
    qv_status status;
    bool existed, answered;
    char reason[QV_ERROR_MAX];
} edit;

static void on_written(qv_status status, bool existed, void *user)
{
    edit *e = user;
    e->status = status;
    e->existed = existed;
    e->answered = true;
    snprintf(e->reason, sizeof e->reason, "%s", status == QV_OK ? "" : qv_error());
}

static void on_up(void *user)
{
    edit *e = user;
    qv_status status = qv_registry_set_want(e->registry, e->name, e->want, on_written, e);
    if (status != QV_OK)
        on_written(status, false, e);
}

static int check_done(zloop_t *loop, int timer, void *user)
{
    (void)loop, (void)timer;
    edit *e = user;
    return e->answered || cli_interrupts ? -1 : 0;
}

static int give_up(zloop_t *loop, int timer, void *user)
{
    (void)loop, (void)timer;
    edit *e = user;
    if (!e->answered)
        snprintf(e->reason, sizeof e->reason, "Redis does not answer");
    return -1;
}

/* Write or delete quiver:want:<name>. Errors: of the registry; TIMEOUT. */
static qv_status write_want(const settings *set, const char *name, const qv_want *want,
                            bool *existed)
{
    edit e = {.name = name, .want = want, .status = QV_ERR_TIMEOUT};
    e.loop = zloop_new();
    qv_registry_options options = {.url = set->redis, .who = "quiver-cli", .up = on_up, .user = &e};
    qv_status status = qv_registry_new(e.loop, &options, &e.registry);
    if (status == QV_OK) {
        zloop_timer(e.loop, 10, 0, check_done, &e);
        zloop_timer(e.loop, 5000, 1, give_up, &e);
        zloop_start(e.loop);
        qv_registry_free(e.registry);
        status = e.answered || e.status == QV_OK ? e.status : QV_ERR_TIMEOUT;
        if (status != QV_OK)
            qv_fail(status, "cannot write quiver:want:%s: %s", name, e.reason);
    }
    zloop_destroy(&e.loop);
    *existed = e.existed;
    return status;
}

/* --- watching the broker
 * ----------------------------------------------------------------------------*/

static const qv_msg_adapter_status *find_adapter(const qv_msg_status *status, const char *name)
{
    for (uint32_t i = 0; i < status->adapters.count; i++)
        if (qv_str_equal(status->adapters.data[i].name, name))
            return &status->adapters.data[i];
    return NULL;
}

typedef enum { WAITING, AS_WANTED, REFUSED } outcome;

static outcome judge(const qv_msg_adapter_status *a, const settings *set, bool added)
{
    if (!added)
        return a ? WAITING : AS_WANTED;
    if (!a)
        return WAITING;
    if (qv_str_equal(a->state, "failed") || qv_str_equal(a->state, "invalid"))
        return REFUSED;
    return qv_str_equal(a->state, "ready") && a->workers.count >= set->replicas ? AS_WANTED
                                                                                : WAITING;
}

static void print_adapter(const qv_msg_adapter_status *a, const char *name)
{
    if (!a) {
        printf("%s removed\n", name);
        return;
    }
    printf("%s %.*s  rank %lld  on", name, (int)a->state.size, a->state.data, (long long)a->rank);
    for (uint32_t i = 0; i < a->workers.count; i++)
        printf(" %.*s", (int)a->workers.data[i].size, a->workers.data[i].data);
    printf(a->workers.count ? "\n" : " no worker\n");
}

/* Ask the broker until the adapter is as wanted, refused, or time is up. */
static int watch(const settings *set, const char *name, bool added)
{
    qv_client *client;
    if (cli_connect(&set->common, &client) != QV_OK)
        return cli_fail(CLI_FAILED);
    uint64_t deadline = qv_now_ms() + (uint64_t)set->wait_ms;
    int code = CLI_FAILED;
    for (;;) {
        const qv_msg_status *status;
        if (cli_get_status(client, set->common.timeout_ms, &status) != QV_OK) {
            cli_fail(CLI_FAILED);
            break;
        }
        const qv_msg_adapter_status *a = find_adapter(status, name);
        outcome result = judge(a, set, added);
        if (result == AS_WANTED) {
            print_adapter(a, name);
            code = CLI_OK;
            break;
        }
        if (result == REFUSED) {
            fprintf(stderr, "quiver: adapter %s: %.*s\n", name, (int)a->reason.size,
                    a->reason.data);
            break;
        }
        if (cli_interrupts || qv_now_ms() >= deadline) {
            fprintf(
                stderr, "quiver: %s is %s after %lld ms; the pool goes on trying (quiver status)\n",
                name, added ? "not on all wanted workers" : "still there", (long long)set->wait_ms);
            break;
        }
        usleep(50 * 1000); /* between two questions to the broker */
    }
    qv_client_close(client);
    return code;
}

/* --- commands
 * ---------------------------------------------------------------------------------------*/

static int add(const settings *set, const char *name, const char *dir)
{
    char path[PATH_MAX];
    if (!realpath(dir, path)) /* not on this machine: the workers may see it all the same */
        snprintf(path, sizeof path, "%s", dir);
    qv_want want = {.path = path,
                    .replicas = set->replicas,
                    .pin = set->pin,
                    .max_replicas = set->max_replicas,
                    .tenants = set->tenants.items,
                    .n_tenants = set->tenants.n,
                    .workers = set->workers.items,
                    .n_workers = set->workers.n};
    bool existed;
    if (write_want(set, name, &want, &existed) != QV_OK)
        return cli_fail(CLI_FAILED);
    if (set->wait_ms == 0) {
        printf("%s wanted on %lld worker%s\n", name, (long long)set->replicas,
               set->replicas == 1 ? "" : "s");
        return CLI_OK;
    }
    return watch(set, name, true);
}

static int remove_adapter(const settings *set, const char *name)
{
    bool existed;
    if (write_want(set, name, NULL, &existed) != QV_OK)
        return cli_fail(CLI_FAILED);
    if (!existed) {
        fprintf(stderr, "quiver: no adapter %s is wanted (quiver:want:%s does not exist)\n", name,
                name);
        return CLI_FAILED;
    }
    return set->wait_ms == 0 ? CLI_OK : watch(set, name, false);
}

static int list(const settings *set)
{
    qv_client *client;
    const qv_msg_status *status;
    if (cli_connect(&set->common, &client) != QV_OK)
        return cli_fail(CLI_FAILED);
    int code = CLI_OK;
    if (cli_get_status(client, set->common.timeout_ms, &status) != QV_OK) {
        code = cli_fail(CLI_FAILED);
    } else if (set->common.json) {
        qv_message message = {.type = QV_MSG_STATUS, .status = *status};
        json_t *json;
        if (qv_message_to_json(&message, &json) == QV_OK) {
            json_dumpf(json_object_get(json, "adapters"), stdout, JSON_INDENT(2));
            putchar('\n');
            json_decref(json);
        } else {
            code = cli_fail(CLI_FAILED);
        }
    } else {
        cli_print_adapters(status);
    }
    qv_client_close(client);
    return code;
}

int cli_adapters(int argc, char **argv)
{
    settings set;
    qv_options *options;
    if (qv_options_parse(table, sizeof table / sizeof table[0], &program, argc, argv, &set,
                         &options) != QV_OK)
        return cli_fail(CLI_USAGE);
    int code = CLI_OK;
    const qv_string_list *args = qv_options_args(options);
    if (qv_options_printed(options)) {
        /* nothing left to do */
    } else if (args->n == 0 || (args->n == 1 && strcmp(args->items[0], "list") == 0)) {
        code = list(&set);
    } else if (args->n == 3 && strcmp(args->items[0], "add") == 0) {
        cli_catch_signals();
        code = add(&set, args->items[1], args->items[2]);
    } else if (args->n == 2 && strcmp(args->items[0], "remove") == 0) {
        cli_catch_signals();
        code = remove_adapter(&set, args->items[1]);
    } else {
        fprintf(stderr, "quiver adapters: give 'list', 'add NAME DIR' or 'remove NAME'\n");
        code = CLI_USAGE;
    }
    qv_options_free(options);
    return code;
}
