#include "broker/peers.h"

#include "broker/core_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_ROWS   128 /* adapters that are shown */
#define MIN_DEMAND 0.05
#define MAX_DEMAND 1e6

static int compare_demand(const void *a, const void *b)
{
    const qv_group *x = *(qv_group *const *)a, *y = *(qv_group *const *)b;
    return x->demand > y->demand ? -1 : x->demand < y->demand;
}

const char *qv_peers_show(const qv_core *core, char *out, size_t size)
{
    qv_group *rows[MAX_ROWS];
    size_t n = 0, used = 0;
    QV_LIST_EACH(&core->pool.groups, qv_group, link, group)
    {
        if (group == core->pool.base || group->demand < MIN_DEMAND)
            continue;
        if (n < MAX_ROWS) {
            rows[n++] = group;
            continue;
        }
        size_t least = 0;
        for (size_t i = 1; i < n; i++)
            least = rows[i]->demand < rows[least]->demand ? i : least;
        if (group->demand > rows[least]->demand)
            rows[least] = group;
    }
    if (n > 0)
        qsort(rows, n, sizeof rows[0], compare_demand);
    out[0] = '\0';
    for (size_t i = 0; i < n; i++) {
        int more = snprintf(out + used, size - used, "%s%s=%.1f", i > 0 ? " " : "", rows[i]->name,
                            rows[i]->demand);
        if (more < 0 || used + (size_t)more >= size) {
            out[used] = '\0';
            break;
        }
        used += (size_t)more;
    }
    return out;
}

/* Add what one broker shows. Adapters that we do not know are nobody's business here. */
static void add_demand(qv_core *core, const char *text)
{
    for (const char *item = text; *item != '\0';) {
        size_t size = strcspn(item, " ");
        const char *equals = memchr(item, '=', size);
        char *end = NULL;
        double demand = equals != NULL ? strtod(equals + 1, &end) : 0;
        bool is_number = equals != NULL && end == item + size && demand > 0 && demand < MAX_DEMAND;
        qv_group *group =
            is_number ? qv_pool_find_group(&core->pool, item, (size_t)(equals - item)) : NULL;
        if (group != NULL && group != core->pool.base)
            group->others_demand += demand;
        item += size + (item[size] == ' ');
    }
}

void qv_peers_update(qv_core *core, const qv_peer_broker *brokers, size_t n)
{
    bool follows = false;
    QV_LIST_EACH(&core->pool.groups, qv_group, link, group)
    group->others_demand = 0;
    for (size_t i = 0; i < n; i++) {
        int order = strcmp(brokers[i].id, core->options.id);
        follows = follows || (order < 0 &&
                              brokers[i].workers >= (int64_t)core->pool.n_members[QV_MEMBER_READY]);
        if (order != 0 && brokers[i].demand != NULL)
            add_demand(core, brokers[i].demand);
    }
    if (follows != core->placement.follows)
        qv_core_event(core, follows ? "placement_follows" : "placement_leads", NULL, NULL,
                      follows ? "a broker with a lesser id is there" : NULL);
    core->placement.follows = follows;
}
