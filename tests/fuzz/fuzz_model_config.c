/* Any bytes, as config.json and, behind a zero byte, generation_config.json. What is taken has
 * sizes within their bounds, and the layout of its weights can be made, whole and cut into ranks.
 */
#include "models/model_config.h"
#include "models/proj.h"

#include <math.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *text = (const char *)data;
    const char *zero = size > 0 ? memchr(text, 0, size) : NULL;
    size_t first = zero != NULL ? (size_t)(zero - text) : size;
    const char *second = zero != NULL ? zero + 1 : NULL;
    qv_model_config config;
    if (qv_model_config_parse(text, first, second, zero != NULL ? size - first - 1 : 0, "fuzz",
                              &config) != QV_OK)
        return 0;
    QV_ASSERT(config.n_layers > 0 && config.n_layers <= QV_MAX_LAYERS);
    QV_ASSERT(config.hidden > 0 && config.vocab > 0 && config.max_positions > 0);
    QV_ASSERT(config.n_eos >= 0 && config.n_eos <= QV_MAX_EOS);
    QV_ASSERT(isfinite(config.norm_eps) && qv_model_config_arch_name(&config) != NULL);
    int64_t n_layers = 0;
    for (int64_t i = 0; i < config.n_layers; i++)
        n_layers += config.layer_parts[i] != 0;
    QV_ASSERT(n_layers == config.n_layers);
    for (int32_t n_ranks = 1; n_ranks <= 4; n_ranks *= 2) {
        static qv_layout layout;
        (void)qv_layout_init(&layout, &config, n_ranks - 1, n_ranks);
    }
    return 0;
}
