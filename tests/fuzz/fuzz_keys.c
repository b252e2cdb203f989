/* Any bytes, as a broker's list of keys. */
#include "common/keys.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    qv_key_rights *rows;
    size_t n;
    if (qv_key_list_parse((const char *)data, size, &rows, &n) != QV_OK)
        return 0;
    for (size_t i = 0; i < n; i++) {
        QV_ASSERT(qv_key_is_valid(rows[i].key, strlen(rows[i].key)));
        QV_ASSERT(rows[i].submit || rows[i].operate || rows[i].worker);
        QV_ASSERT(i == 0 || strcmp(rows[i - 1].key, rows[i].key) < 0);
    }
    free(rows);
    return 0;
}
