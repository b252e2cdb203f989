#include "models/lora_config.h"

#include "common/json.h"
#include "models/config_read.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <inttypes.h>
#include <math.h>
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define MAX_RANK         4096
#define MAX_PATTERNS     4096
#define MAX_PATTERN_SIZE 1000

/* --- Patterns --------------------------------------------------------------------------------- */

struct qv_lora_pattern {
    qv_lora_pattern *next;
    char *key;
    pcre2_code *code;
    double value;
};

static void free_patterns(qv_lora_pattern *list)
{
    while (list != NULL) {
        qv_lora_pattern *next = list->next;
        pcre2_code_free(list->code);
        free(list->key);
        free(list);
        list = next;
    }
}

/* A key matches a module name, or the end of one after a dot. */
static qv_status new_pattern(const char *key, double value, const char *where,
                             qv_lora_pattern **out)
{
    char text[MAX_PATTERN_SIZE + 32];
    if (strlen(key) > MAX_PATTERN_SIZE)
        return qv_fail(QV_ERR_LIMIT, "%s: the pattern %.60s... is longer than %d bytes", where, key,
                       MAX_PATTERN_SIZE);
    snprintf(text, sizeof text, "(.*\\.)?(%s)$", key);
    int error;
    PCRE2_SIZE offset;
    qv_lora_pattern *pattern = calloc(1, sizeof *pattern);
    if (pattern == NULL || (pattern->key = strdup(key)) == NULL) {
        free(pattern);
        return qv_fail(QV_ERR_NOMEM, "%s: no memory for a pattern", where);
    }
    pattern->value = value;
    pattern->code = pcre2_compile((PCRE2_SPTR)text, PCRE2_ZERO_TERMINATED,
                                  PCRE2_ANCHORED | PCRE2_DOLLAR_ENDONLY | PCRE2_NEVER_BACKSLASH_C,
                                  &error, &offset, NULL);
    if (pattern->code == NULL) {
        free_patterns(pattern);
        return qv_fail(QV_ERR_FORMAT, "%s: \"%.200s\" is not a pattern", where, key);
    }
    *out = pattern;
    return QV_OK;
}

static qv_status read_patterns(const json_t *root, const char *name, const char *where,
                               qv_lora_pattern **out)
{
    const json_t *object = json_object_get(root, name);
    if (object == NULL || json_is_null(object))
        return QV_OK;
    if (!json_is_object(object))
        return qv_fail(QV_ERR_FORMAT, "%s: %s is not an object", where, name);
    if (json_object_size(object) > MAX_PATTERNS)
        return qv_fail(QV_ERR_LIMIT, "%s: %s has more than %d entries", where, name, MAX_PATTERNS);
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object, key, value)
    {
        double number = json_number_value(value);
        if (!json_is_number(value) || !isfinite(number))
            return qv_fail(QV_ERR_FORMAT, "%s: %s: \"%.200s\" is not a number", where, name, key);
        QV_TRY(new_pattern(key, number, where, out));
        out = &(*out)->next;
    }
    return QV_OK;
}

/* The value of the first pattern that matches, or `fallback`. Patterns come from the adapter, so
 * the work of a match is bounded. */
static qv_status match_patterns(const qv_lora_pattern *list, const char *module, const char *where,
                                double fallback, double *out)
{
    *out = fallback;
    if (list == NULL)
        return QV_OK;
    pcre2_match_context *context = pcre2_match_context_create(NULL);
    qv_status status = context ? QV_OK : qv_fail(QV_ERR_NOMEM, "%s: no memory to match", where);
    if (context != NULL) {
        pcre2_set_match_limit(context, 100000);
        pcre2_set_depth_limit(context, 1000);
    }
    for (; list != NULL && status == QV_OK; list = list->next) {
        pcre2_match_data *match = pcre2_match_data_create(1, NULL);
        int found = match == NULL ? PCRE2_ERROR_NOMEMORY
                                  : pcre2_match(list->code, (PCRE2_SPTR)module, strlen(module), 0,
                                                0, match, context);
        pcre2_match_data_free(match);
        if (found >= 0) {
            *out = list->value;
            break;
        }
        if (found != PCRE2_ERROR_NOMATCH)
            status = qv_fail(QV_ERR_LIMIT, "%s: matching the pattern \"%.200s\" takes too much",
                             where, list->key);
    }
    pcre2_match_context_free(context);
    return status;
}

/* --- Fields ----------------------------------------------------------------------------------- */

/* Read here or elsewhere, or without effect on inference. */
static const char *const harmless[] = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "target_modules",
    "target_parameters",
    "expert_layout",
    "expert_b_packing",
    "init_lora_weights",
    "ensure_weight_tying",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
};

/* Change the forward pass, or carry weights that are not pairs; fine while null, false or empty. */
static const char *const refused[] = {
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "lora_ga_config",
    "modules_to_save",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
};

static bool is_listed(const char *const *list, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++) {
        if (strcmp(list[i], name) == 0)
            return true;
    }
    return false;
}

#define LISTED(list, name) is_listed(list, sizeof(list) / sizeof *(list), name)

static qv_status check_fields(const json_t *root, const char *where, FILE *notes)
{
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)root, name, value)
    {
        if (LISTED(refused, name))
            QV_TRY(qv_config_expect_unset(root, name, where));
        else if (!LISTED(harmless, name) && !json_is_null(value))
            fprintf(notes, "%s: the field %.60s is not known and was ignored\n", where, name);
    }
    return QV_OK;
}

/* Some ways to initialise an adapter also change the base model, which a pair alone does not carry.
 */
static qv_status check_init(const json_t *root, const char *where)
{
    static const char *const neutral[] = {"gaussian", "eva", "orthogonal", "mica"};
    const json_t *init = json_object_get(root, "init_lora_weights");
    if (init == NULL || json_is_null(init) || json_is_boolean(init))
        return QV_OK;
    const char *name = json_string_value(init);
    if (name != NULL && LISTED(neutral, name))
        return QV_OK;
    return qv_fail(
        QV_ERR_UNSUPPORTED,
        "%s: init_lora_weights is \"%.60s\", which changes the base weights: convert the "
        "adapter to a plain LoRA first",
        where, name ? name : "(not a string)");
}

static qv_status check_target_modules(const json_t *root, const char *where)
{
    const json_t *targets = json_object_get(root, "target_modules");
    if (targets == NULL || json_is_null(targets) || json_is_string(targets) ||
        json_is_array(targets))
        return QV_OK;
    return qv_fail(QV_ERR_FORMAT, "%s: target_modules is neither a list nor a string", where);
}

/* --- Experts ---------------------------------------------------------------------------------- */

static qv_status read_target_parameters(const json_t *root, const char *where, qv_lora_config *out)
{
    const json_t *list = json_object_get(root, "target_parameters");
    if (list == NULL || json_is_null(list))
        return QV_OK;
    for (size_t i = 0; i < json_array_size(list); i++) {
        if (!json_is_string(json_array_get(list, i)))
            return qv_fail(QV_ERR_FORMAT, "%s: target_parameters[%zu] is not a string", where, i);
    }
    if (!json_is_array(list))
        return qv_fail(QV_ERR_FORMAT, "%s: target_parameters is not a list", where);
    out->target_parameters = json_array_size(list) > 0 ? list : NULL;
    return QV_OK;
}

/* PEFT 0.19.1 settled on the standard layout. Older versions wrote either. */
static bool is_standard_version(const char *version)
{
    int major = 0, minor = 0, patch = 0;
    if (sscanf(version, "%3d.%3d.%3d", &major, &minor, &patch) < 2)
        return false;
    return major > 0 || minor > 19 || (minor == 19 && patch >= 1);
}

static qv_status read_expert_fields(const json_t *root, const char *where, qv_lora_config *out)
{
    const char *layout = NULL, *packing = "peft", *version = "";
    QV_TRY(qv_json_opt_str(root, "expert_layout", where, &layout));
    if (layout != NULL && strcmp(layout, "standard") == 0)
        out->expert_layout = QV_EXPERT_LAYOUT_STANDARD;
    else if (layout != NULL && strcmp(layout, "swapped") == 0)
        out->expert_layout = QV_EXPERT_LAYOUT_SWAPPED;
    else if (layout != NULL)
        return qv_fail(QV_ERR_FORMAT, "%s: expert_layout is \"%.60s\", not standard or swapped",
                       where, layout);
    QV_TRY(qv_json_opt_str(root, "expert_b_packing", where, &packing));
    out->grouped_b = strcmp(packing, "grouped") == 0;
    if (!out->grouped_b && strcmp(packing, "peft") != 0)
        return qv_fail(QV_ERR_FORMAT, "%s: expert_b_packing is \"%.60s\", not peft or grouped",
                       where, packing);
    QV_TRY(qv_json_opt_str(root, "peft_version", where, &version));
    out->knows_standard = is_standard_version(version);
    return read_target_parameters(root, where, out);
}

bool qv_lora_config_targets(const qv_lora_config *config, const char *parameter)
{
    size_t n = strlen(parameter);
    for (size_t i = 0; i < json_array_size(config->target_parameters); i++) {
        const char *target = json_string_value(json_array_get(config->target_parameters, i));
        size_t size = strlen(target);
        if (size <= n && strcmp(parameter + n - size, target) == 0 &&
            (size == n || parameter[n - size - 1] == '.'))
            return true;
    }
    return false;
}

/* --- The whole of it -------------------------------------------------------------------------- */

qv_status qv_lora_config_parse(const json_t *root, const char *where, FILE *notes,
                               qv_lora_config *out)
{
    *out = (qv_lora_config){.rank = 0};
    if (!json_is_object(root))
        return qv_fail(QV_ERR_FORMAT, "%s: not a JSON object", where);
    const char *type, *bias = "none";
    QV_TRY(qv_json_get_str(root, "peft_type", where, &type));
    if (strcasecmp(type, "LORA") != 0)
        return qv_fail(QV_ERR_UNSUPPORTED, "%s: peft_type is \"%.60s\": only LORA is implemented",
                       where, type);
    QV_TRY(qv_json_opt_str(root, "bias", where, &bias));
    if (strcmp(bias, "none") != 0)
        return qv_fail(QV_ERR_UNSUPPORTED,
                       "%s: bias is \"%.60s\": trained biases are not supported", where, bias);
    QV_TRY(check_fields(root, where, notes));
    QV_TRY(check_init(root, where));
    QV_TRY(check_target_modules(root, where));

    QV_TRY(qv_config_int(root, "r", where, QV_CONFIG_REQUIRED, 1, MAX_RANK, &out->rank));
    QV_TRY(qv_json_get_double(root, "lora_alpha", where, &out->alpha));
    if (!isfinite(out->alpha))
        return qv_fail(QV_ERR_FORMAT, "%s: lora_alpha is not finite", where);
    QV_TRY(qv_json_opt_bool(root, "use_rslora", where, &out->rslora));
    QV_TRY(qv_json_opt_bool(root, "ensure_weight_tying", where, &out->weight_tying));
    QV_TRY(read_expert_fields(root, where, out));
    QV_TRY(read_patterns(root, "rank_pattern", where, &out->rank_patterns));
    return read_patterns(root, "alpha_pattern", where, &out->alpha_patterns);
}

void qv_lora_config_deinit(qv_lora_config *config)
{
    free_patterns(config->rank_patterns);
    free_patterns(config->alpha_patterns);
    *config = (qv_lora_config){.rank = 0};
}

/* --- Scale ------------------------------------------------------------------------------------ */

qv_status qv_lora_config_scale(const qv_lora_config *config, const char *where, const char *module,
                               int32_t rank, float *out)
{
    double expected, alpha;
    QV_TRY(match_patterns(config->rank_patterns, module, where, (double)config->rank, &expected));
    QV_TRY(match_patterns(config->alpha_patterns, module, where, config->alpha, &alpha));
    if (expected != rank)
        return qv_fail(QV_ERR_FORMAT, "%s: %.200s has rank %d, but the file says rank %g", where,
                       module, rank, expected);
    *out = (float)(config->rslora ? alpha / sqrt(rank) : alpha / rank);
    return QV_OK;
}
