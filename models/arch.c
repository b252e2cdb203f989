#include "models/arch.h"

#include <stdio.h>
#include <string.h>

static const qv_arch *const archs[] = {&qv_arch_qwen3_5, &qv_arch_nemotron3};

const qv_arch *const *qv_arch_list(size_t *n)
{
    *n = sizeof archs / sizeof *archs;
    return archs;
}

/* "qwen3_5, qwen3_5_text": every model_type there is. */
static void list_model_types(char *buf, size_t size)
{
    size_t used = 0;
    buf[0] = '\0';
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++) {
        for (const char *const *type = archs[i]->model_types; *type != NULL && used < size; type++)
            used += (size_t)snprintf(buf + used, size - used, "%s%s", used ? ", " : "", *type);
    }
}

qv_status qv_arch_find(const char *model_type, const char *where, const qv_arch **out)
{
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++) {
        for (const char *const *type = archs[i]->model_types; *type != NULL; type++) {
            if (strcmp(*type, model_type) == 0) {
                *out = archs[i];
                return QV_OK;
            }
        }
    }
    char known[256];
    list_model_types(known, sizeof known);
    return qv_fail(QV_ERR_UNSUPPORTED, "%s: model_type \"%.60s\" is not supported; there are: %s",
                   where, model_type, known);
}
