/* The CPU backend's object: options, memory, scratch, and the choice of the instruction set. */
#include "common/clock.h"
#include "ops/cpu/cpu.h"

#include <cblas.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* --- Memory ------------------------------------------------------------------------------- */

/* Large blocks are mapped by themselves: they come zeroed without being touched, and in huge pages,
 * which a stream over gigabytes of weights needs. 64 bytes in front of a block hold its size. */
#define LARGE_BYTES ((size_t)1 << 21)
#define HEADER      64

static qv_status cpu_alloc(qv_backend *be, size_t bytes, void **out)
{
    (void)be;
    char *block = NULL;
    size_t whole = bytes + HEADER;
    if (whole > bytes && whole < SIZE_MAX - HEADER) /* cpu_free tells by the size too */
        whole = (whole + HEADER - 1) / HEADER * HEADER;
    if (whole > bytes && whole < SIZE_MAX - HEADER && whole >= LARGE_BYTES) {
        block = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (block == MAP_FAILED)
            block = NULL;
        else
            madvise(block, whole, MADV_HUGEPAGE);
    } else if (whole > bytes && whole < LARGE_BYTES) {
        block = aligned_alloc(HEADER, whole);
        if (block)
            memset(block, 0, whole);
    }
    if (!block)
        return qv_fail(QV_ERR_NOMEM, "cpu: no memory for %zu bytes", bytes);
    memcpy(block, &whole, sizeof whole);
    *out = block + HEADER;
    return QV_OK;
}

static void cpu_free(qv_backend *be, void *ptr)
{
    (void)be;
    char *block = (char *)ptr - HEADER;
    size_t whole;
    memcpy(&whole, block, sizeof whole);
    if (whole >= LARGE_BYTES)
        munmap(block, whole);
    else
        free(block);
}

static qv_status cpu_copy(qv_backend *be, void *dst, const void *src, size_t bytes)
{
    (void)be;
    memcpy(dst, src, bytes);
    return QV_OK;
}

static qv_status cpu_zero(qv_backend *be, void *dst, size_t bytes)
{
    (void)be;
    memset(dst, 0, bytes);
    return QV_OK;
}

static qv_status cpu_sync(qv_backend *be)
{
    (void)be;
    return QV_OK;
}

/* The tokens of a batch, with ids for those that the host does not know. */
static qv_status fill_tokens(qv_cpu_backend *cpu, qv_batch *batch)
{
    const qv_cpu_sampling *last = qv_cpu_last_sampling(cpu);
    if (batch->n_tokens > cpu->token_room)
        return qv_fail(QV_ERR_LIMIT, "cpu: a step of %d tokens, but %d are reserved",
                       batch->n_tokens, cpu->token_room);
    for (int32_t i = 0; i < batch->n_tokens; i++) {
        if (batch->token[i] < 0 && QV_ROW_OF_TOKEN(batch->token[i]) >= last->n_rows)
            return qv_fail(QV_ERR_ARG,
                           "cpu: token %d is what row %d chose, of a sampling of %lld rows", i,
                           QV_ROW_OF_TOKEN(batch->token[i]), (long long)last->n_rows);
        cpu->token[i] = qv_cpu_token_id(last, batch->token[i]);
    }
    batch->token = cpu->token;
    return QV_OK;
}

static qv_status cpu_put_batch(qv_backend *be, const qv_batch *host, qv_batch *out)
{
    *out = *host;
    qv_cpu(be)->began_ns = qv_now_ns();
    for (int32_t i = 0; host->token && i < host->n_tokens; i++)
        if (host->token[i] < 0)
            return fill_tokens(qv_cpu(be), out);
    return QV_OK;
}

/* --- Scratch ------------------------------------------------------------------------------ */

/* Cut `n` elements of `size` bytes off *memory, keeping it aligned; with NULL just count. */
static void *take(char **memory, size_t *used, size_t n, size_t size)
{
    void *p = *memory ? *memory + *used : NULL;
    *used += (n * size + 63) / 64 * 64;
    return p;
}

static size_t lay_out_sample(qv_cpu_backend *cpu, char *memory, int32_t n_vocab)
{
    size_t used = 0, n = (size_t)n_vocab;
    for (int i = 0; i < qv_pool_n_threads(cpu->pool); i++) {
        qv_cpu_sample_scratch s = {
            .prob = take(&memory, &used, n, sizeof(float)),
            .raw = take(&memory, &used, n, sizeof(float)),
            .mark = take(&memory, &used, n, sizeof(uint32_t)),
            .id = take(&memory, &used, n, sizeof(int32_t)),
            .id_prob = take(&memory, &used, n, sizeof(float)),
            .id_logit = take(&memory, &used, n, sizeof(float)),
            .block = take(&memory, &used, n / QV_SAMPLE_BLOCK + 1, sizeof(double)),
        };
        if (memory)
            cpu->sample[i] = s;
    }
    return used;
}

qv_status qv_cpu_sampling_require(qv_cpu_sampling *s, int64_t n_rows)
{
    if (n_rows <= s->room)
        return QV_OK;
    qv_sample_result *grown = realloc(s->results, (size_t)n_rows * sizeof *grown);
    if (!grown)
        return qv_fail(QV_ERR_NOMEM, "cpu: no memory for samples of %lld rows", (long long)n_rows);
    s->results = grown;
    s->room = n_rows;
    return QV_OK;
}

static qv_status reserve_tokens(qv_cpu_backend *cpu, int32_t n)
{
    if (n <= cpu->token_room)
        return QV_OK;
    int32_t *grown = realloc(cpu->token, (size_t)n * sizeof *grown);
    if (!grown)
        return qv_fail(QV_ERR_NOMEM, "cpu: no memory for %d tokens", n);
    cpu->token = grown;
    cpu->token_room = n;
    return QV_OK;
}

static qv_status cpu_reserve(qv_backend *be, const qv_backend_limits *limits)
{
    qv_cpu_backend *cpu = qv_cpu(be);
    QV_TRY(reserve_tokens(cpu, limits->max_tokens));
    for (int i = 0; i < QV_MAX_SAMPLINGS; i++)
        QV_TRY(qv_cpu_sampling_require(&cpu->samplings[i], limits->max_logits));
    if (limits->n_vocab <= cpu->n_vocab)
        return QV_OK;
    void *memory;
    QV_TRY(cpu_alloc(be, lay_out_sample(cpu, NULL, limits->n_vocab), &memory));
    qv_backend_free(be, cpu->sample_memory);
    cpu->sample_memory = memory;
    cpu->n_vocab = limits->n_vocab;
    lay_out_sample(cpu, memory, limits->n_vocab);
    return QV_OK;
}

/* --- Open and close ----------------------------------------------------------------------- */

/* The widest instruction set of this processor. */
static const qv_cpu_isa *choose_isa(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return &qv_cpu_isa_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &qv_cpu_isa_avx2;
#endif
    return &qv_cpu_isa_baseline;
}

/* By name, and only what the processor can run; NULL otherwise. */
static const qv_cpu_isa *find_isa(const char *name)
{
    const qv_cpu_isa *widest = choose_isa();
    if (!name)
        return widest;
#if defined(__x86_64__)
    if (strcmp(name, "avx2") == 0 && widest != &qv_cpu_isa_baseline)
        return &qv_cpu_isa_avx2;
#endif
    if (strcmp(name, "baseline") == 0)
        return &qv_cpu_isa_baseline;
    return strcmp(name, widest->name) == 0 ? widest : NULL;
}

static qv_status parse_gemm(const char *name, qv_cpu_gemm *out)
{
    if (!name || strcmp(name, "exact") == 0)
        *out = QV_CPU_GEMM_EXACT;
    else if (strcmp(name, "openblas") == 0)
        *out = QV_CPU_GEMM_OPENBLAS;
    else
        return qv_fail(QV_ERR_ARG, "cpu: gemm '%s' is neither 'exact' nor 'openblas'", name);
    return QV_OK;
}

static const qv_backend_table bf16_backend_table; /* below, with qv_cpu_backend_table */

/* Which of the two tables of ops, and of constants, a backend goes through. */
static qv_status choose_arithmetic(qv_cpu_backend *cpu, const char *name)
{
    bool bf16 = name && strcmp(name, "bf16") == 0;
    if (name && !bf16 && strcmp(name, "f32") != 0)
        return qv_fail(QV_ERR_ARG, "cpu: arithmetic '%s' is neither 'f32' nor 'bf16'", name);
    cpu->base.table = bf16 ? &bf16_backend_table : &qv_cpu_backend_table;
    cpu->base.ops = bf16 ? &qv_cpu_bf16_ops : cpu->f32;
    return QV_OK;
}

static void cpu_close(qv_backend *be)
{
    qv_cpu_backend *cpu = qv_cpu(be);
    qv_pool_free(cpu->pool);
    qv_backend_free(be, cpu->sample_memory);
    qv_backend_free(be, cpu->blas_tile);
    for (int i = 0; i < QV_MAX_SAMPLINGS; i++)
        free(cpu->samplings[i].results);
    free(cpu->token);
    free(cpu->sample);
    free(cpu);
}

static qv_status open_parts(qv_cpu_backend *cpu, const qv_backend_options *options)
{
    const qv_cpu_isa *isa = find_isa(options->isa);
    if (!isa)
        return qv_fail(QV_ERR_UNSUPPORTED, "cpu: instruction set '%s' is not available here",
                       options->isa);
    cpu->f32 = &isa->ops;
    QV_TRY(choose_arithmetic(cpu, options->arithmetic));
    QV_TRY(parse_gemm(options->gemm, &cpu->gemm));
    QV_TRY(qv_pool_new(options->n_threads, &cpu->pool));
    int n_threads = qv_pool_n_threads(cpu->pool);
    cpu->sample = calloc((size_t)n_threads, sizeof *cpu->sample);
    if (!cpu->sample)
        return qv_fail(QV_ERR_NOMEM, "cpu: no memory");
    if (cpu->gemm == QV_CPU_GEMM_OPENBLAS) {
        openblas_set_num_threads(1); /* the pool splits the work */
        void *tile;
        QV_TRY(cpu_alloc(&cpu->base, (size_t)n_threads * QV_BLAS_TILE * sizeof(float), &tile));
        cpu->blas_tile = tile;
    }
    snprintf(cpu->base.description, sizeof cpu->base.description, "cpu, %d thread%s, %s, %s gemm%s",
             n_threads, n_threads == 1 ? "" : "s", isa->name,
             cpu->gemm == QV_CPU_GEMM_EXACT ? "exact" : "openblas",
             cpu->base.ops == cpu->f32 ? "" : ", bf16");
    return QV_OK;
}

static qv_status cpu_open(const qv_backend_options *options, qv_backend **out)
{
    qv_cpu_backend *cpu = calloc(1, sizeof *cpu);
    if (!cpu)
        return qv_fail(QV_ERR_NOMEM, "cpu: no memory");
    cpu->base.table = &qv_cpu_backend_table;
    qv_status status = open_parts(cpu, options);
    if (status != QV_OK) {
        cpu_close(&cpu->base);
        return status;
    }
    *out = &cpu->base;
    return QV_OK;
}

/* The two differ in what adapters are stored as. */
#define CPU_TABLE(lora)                                                                            \
    {                                                                                              \
        .name = "cpu", .activation_dtype = QV_F32, .lora_dtype = lora, .kv_dtype = QV_F32,         \
        .open = cpu_open, .close = cpu_close, .reserve = cpu_reserve, .alloc = cpu_alloc,          \
        .free = cpu_free, .upload = cpu_copy, .download = cpu_copy, .zero = cpu_zero,              \
        .copy = cpu_copy, .sync = cpu_sync, .put_batch = cpu_put_batch,                            \
        .all_reduce = qv_cpu_all_reduce, .gather_cols = qv_cpu_gather_cols,                        \
        .weight_new = qv_cpu_weight_new, .weight_free = qv_cpu_weight_free,                        \
        .weight_load = qv_cpu_weight_load,                                                         \
    }

const qv_backend_table qv_cpu_backend_table = CPU_TABLE(QV_F32);
static const qv_backend_table bf16_backend_table = CPU_TABLE(QV_BF16);
