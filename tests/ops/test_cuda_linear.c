/* qv_op_linear on the device: every path of it against the CPU. */
#include "tests/ops/cuda_test.h"

/* Beyond the shared table: rows of whole vectors, and some layers of released models, cut down. */
static const qv_linear_shape more_shapes[] = {
    {"skinny, one block", 16, 32}, {"rows end in a tile", 41, 64},
    {"k ends in a step", 64, 160}, {"in_proj", 1024, 2560},
    {"down", 320, 9216},           {"router", 256, 2048},
    {"k in eights", 48, 200},
};

static const int64_t counts[] = {1, 3, 8, 9, 16, 17, 33, 64, 65, 130};

static qv_weight *new_weight(duo *d, qv_backend *be, const float *values, const qv_linear_shape *s,
                             qv_dtype dtype)
{
    (void)d;
    qv_weight *w;
    PASS(qv_weight_new(be, s->n_out, s->n_in, dtype, &w));
    PASS(qv_weight_load(be, w, 0, s->n_out, values, QV_F32, s->n_in));
    return w;
}

static void check_shape(duo *d, const qv_linear_shape *s, qv_dtype dtype)
{
    float *values = random_floats(&d->rng, s->n_out * s->n_in, 1);
    if (dtype == QV_BF16)
        round_to_bf16(values, s->n_out * s->n_in);
    qv_weight *cpu = new_weight(d, d->cpu, values, s, dtype);
    qv_weight *dev = new_weight(d, d->dev, values, s, dtype);
    for (size_t i = 0; i < QV_ROWS(counts); i++)
        for (int64_t pad = 0; pad <= 8; pad += 8) {
            char what[128];
            snprintf(what, sizeof what, "%s, %s weights, %lld tokens, rows %lld apart", s->name,
                     qv_dtype_name(dtype), (long long)counts[i], (long long)(2 * pad));
            twin xw = wide_twin(d, counts[i], s->n_in, pad, 1), x = cols_of(xw, pad, s->n_in);
            twin yw = wide_twin(d, counts[i], s->n_out, pad, 1), y = cols_of(yw, pad, s->n_out);
            PASS(qv_op_linear(d->cpu, cpu, x.cpu, y.cpu));
            PASS(qv_op_linear(d->dev, dev, x.dev, y.dev));
            check_twin(d, what, &yw, CLOSE_RELATIVE, CLOSE_ULPS, CLOSE_NOISE);
            twin logits = NEW_TWIN(d, QV_F32, counts[i], s->n_out);
            poison_twin(d, &logits);
            twin rw = wide_twin(d, counts[i], s->n_in, pad, 1.0f / 512);
            twin rest = cols_of(rw, pad, s->n_in), none = {.n = 0};
            for (int with = 0; with < 2; with++) { /* the rest, which is used up */
                twin r = with ? rest : none;
                PASS(qv_op_linear_f32(d->cpu, cpu, x.cpu, r.cpu, logits.cpu));
                PASS(qv_op_linear_f32(d->dev, dev, x.dev, r.dev, logits.dev));
                check_twin(d, what, &logits, 1e-5, 0.01, 1e-5);
            }
            free_twin(d, &rw);
            free_twin(d, &xw);
            free_twin(d, &yw);
            free_twin(d, &logits);
        }
    qv_weight_free(d->cpu, cpu);
    qv_weight_free(d->dev, dev);
    free(values);
}

Test(cuda_linear, agrees_with_the_cpu_on_every_shape)
{
    duo d = open_duo(1);
    for (size_t i = 0; i < QV_ROWS(qv_linear_shapes); i++)
        check_shape(&d, &qv_linear_shapes[i], QV_BF16);
    for (size_t i = 0; i < QV_ROWS(more_shapes); i++)
        check_shape(&d, &more_shapes[i], QV_BF16);
    check_shape(&d, &more_shapes[5], QV_F32);
    close_duo(&d);
}

Test(cuda_linear, gives_a_token_the_same_bits_whatever_is_beside_it_while_few)
{
    duo d = open_duo(2);
    const qv_linear_shape s = {"in_proj", 1024, 2560};
    float *values = random_floats(&d.rng, s.n_out * s.n_in, 1);
    qv_weight *w = new_weight(&d, d.dev, values, &s, QV_BF16);
    twin x = NEW_TWIN(&d, QV_BF16, 8, s.n_in), y = NEW_TWIN(&d, QV_BF16, 8, s.n_out);
    fill_twin(&d, &x, 1);
    PASS(qv_op_linear(d.dev, w, x.dev, y.dev));
    float *all = fetch(&d, &y.dev);
    for (int64_t i = 0; i < 8; i += 3) {
        PASS(qv_op_linear(d.dev, w, qv_tensor_rows(x.dev, i, 1), qv_tensor_rows(y.dev, 0, 1)));
        qv_tensor first = qv_tensor_rows(y.dev, 0, 1);
        float *alone = fetch(&d, &first);
        check_same("linear", alone, all + i * s.n_out, s.n_out);
        free(alone);
    }
    free(all);
    free(values);
    qv_weight_free(d.dev, w);
    free_twin(&d, &x);
    free_twin(&d, &y);
    close_duo(&d);
}
