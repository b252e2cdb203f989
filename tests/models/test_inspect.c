/* inspect_model as a process: what it prints, and how it exits. */
#include "tests/models/fixtures_moe.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

/* Run with these arguments; the text of both streams, which the caller frees. */
static char *run(const char *args, int *status)
{
    char *command, *text = calloc(1, 1 << 20);
    cr_assert_gt(asprintf(&command, "%s/bin/inspect_model %s 2>&1", qv_build_dir(), args), 0);
    FILE *pipe = popen(command, "r");
    cr_assert_not_null(pipe);
    text[fread(text, 1, (1 << 20) - 1, pipe)] = '\0';
    int wait_status = pclose(pipe);
    *status = WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : -1;
    free(command);
    return text;
}

static void expect(const char *args, int want_status, const char *const *words)
{
    int status;
    char *text = run(args, &status);
    cr_expect_eq(status, want_status, "%s exits with %d:\n%s", args, status, text);
    for (; *words != NULL; words++)
        cr_expect_not_null(strstr(text, *words), "%s lacks \"%s\":\n%s", args, *words, text);
    free(text);
}

#define EXPECT(args, status, ...) expect(args, status, (const char *const[]){__VA_ARGS__, NULL})

Test(inspect_model, explains_its_options)
{
    EXPECT("--help", 0, "--adapter DIR", "--tensors", "--rank R", "Memory plan");
    EXPECT("", 2, "name one model directory");
    EXPECT("--no-such-option x", 2, "no-such-option");
    EXPECT("/nonexistent", 1, "/nonexistent/config.json");
}

Test(inspect_model, needs_no_weights)
{
    const char *configs = qv_path(qv_source_dir(), "bench/configs");
    EXPECT(qv_path(configs, "nemotron3-super-120b-a12b"), 0, "120668707840 parameters",
           "attention: 32 heads of 128, 2 KV heads, no positions",
           "Mamba-2: 128 heads of 64 in 8 groups, state of 128, convolution of 4 with bias",
           "experts: 22 of 512 for each token, 2688 wide, behind a projection to 1024, times 5; "
           "shared: 5376 wide",
           "attention        7, 16, 25, 36, 47, 58, 69, 78\n",
           "EXPERT_IN [2688, 1024] x 40 x 512 experts", "mixer.experts.*.up_proj",
           "Weights: none here");
    EXPECT(qv_path(configs, "qwen3.5-35b-a3b --tensors --context 1000 --running 2"), 0,
           "34660610688 parameters in 693 tensors", "Gated DeltaNet   0-2, 4-6,",
           "model.language_model.layers.39.mlp.experts.gate_up_proj [256, 1024, 2048]\n",
           "  lm_head.weight [248320, 2048]\n", "2 sequences of 1000 tokens, 40960 bytes a token");
    EXPECT(qv_path(configs, "nemotron3-nano-4b"), 0, "MLP: 12544 wide",
           "MLP              1, 3, 5, 8, 10, 13");
}

Test(inspect_model, checks_weights_where_there_are_some)
{
    for (int family = 0; family < FX_N_FAMILIES; family++)
        EXPECT(fx_family_write(family, 50, 3), 0, ": all are as config.json says");
    fx_file file = {.n = 0};
    fx_family_model(&file, FX_NANO, NULL, FX_ONE_BY_ONE, QV_BF16, 50, 3);
    fx_remove(&file, "backbone.layers.1.mixer.experts.3.up_proj.weight");
    char *config = fx_family_config(FX_NANO, 50);
    EXPECT(fx_write_model(config, &file), 1,
           "lacks backbone.layers.1.mixer.experts.3.up_proj.weight (1 missing tensor)");
    char *changed = fx_edit_json(config, "mlp_hidden_act", "\"gelu\"");
    EXPECT(fx_write_model(changed, &file), 1, "mlp_hidden_act is \"gelu\"");
    free(config), free(changed);
    fx_free(&file);
}

Test(inspect_model, says_whether_an_adapter_would_load_and_why_not)
{
    const char *demo = qv_demo_path("tiny-qwen3.5");
    QV_SKIP_WITHOUT(demo);
    char *args;
    cr_assert_gt(asprintf(&args, "%s --adapter %s/adapters/json", demo, demo), 0);
    EXPECT(args, 0, "adapters/json: loads", "self_attn.q_proj", "rank ", "scale ", "layers 3, 7");
    free(args);
    cr_assert_gt(asprintf(&args, "%s --rank 1 --adapter %s/adapters/json --adapter /nonexistent",
                          demo, demo),
                 0);
    EXPECT(args, 1, "adapters/json: would not load", "rank", "Adapter /nonexistent: would not load",
           "/nonexistent/adapter_config.json");
    free(args);
    /* An adapter of another model. */
    cr_assert_gt(
        asprintf(&args, "%s --adapter %s/adapters/json", fx_family_write(FX_NANO, 50, 3), demo), 0);
    EXPECT(args, 1, "all are as config.json says", "adapters/json: would not load");
    free(args);
}

Test(inspect_model, says_what_adapters_cover_of_experts)
{
    static const char *const models[] = {"tiny-qwen3.5-moe", "tiny-nemotron3-nano",
                                         "tiny-nemotron3-super"};
    static const char *const down[] = {"mlp.experts.down_proj", "mixer.experts.down_proj",
                                       "mixer.experts.down_proj"};
    for (int i = 0; i < 3; i++) {
        const char *dir = qv_golden_path(models[i]);
        QV_SKIP_WITHOUT(dir);
        char *args;
        cr_assert_gt(asprintf(&args,
                              "%s --adapter %s/adapters/french --adapter %s/adapters/shared-outer "
                              "--adapter %s/adapters/head",
                              dir, dir, dir, dir),
                     0);
        EXPECT(args, 0, "french: loads", down[i], "shared-outer: loads", "all experts share",
               "head: loads", "lm_head");
        free(args);
    }
}
