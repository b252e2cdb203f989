/* Causal depthwise convolution over time with SiLU: tokens one after the other, channels beside
 * each other. The window of earlier inputs is copied out of the state first, so that y may be x. */
#include "ops/cpu/cpu.h"
#include "ops/cpu/simd.h"

#define CHANNELS 128 /* channels of one item */
#define MAX_TAPS 16

typedef struct {
    const qv_batch *batch;
    qv_tensor x, y, state;
    const float *w, *bias;
    int64_t n_taps, n_chunks;
} conv_ctx;

/* out[j][ch] = in[ch][j] for n channels, which lie n_rows apart in `in`. */
QV_INLINE void to_rows(const float *in, int64_t n_rows, int64_t n, float (*out)[CHANNELS])
{
    int64_t ch = 0;
    for (; n_rows == 4 && ch + 16 <= n; ch += 16)
        v_transpose_16x4(in + 4 * ch, 4, out[0] + ch, CHANNELS);
    for (; ch < n; ch++)
        for (int64_t j = 0; j < n_rows; j++)
            out[j][ch] = in[ch * n_rows + j];
}

/* One token: y[ch] from the inputs before it, past[0] being the oldest, and x, which then takes the
 * place of the oldest. */
QV_INLINE void conv_token(int64_t n_taps, const float (*tap)[CHANNELS], float **past,
                          const float *bias, const float *x, float *y, int64_t n)
{
    QV_FOR_LANES(ch, lanes, n)
    {
        v16 sum = bias ? v_load_lanes(bias + ch, lanes) : v_zero();
        for (int64_t j = 0; j < n_taps - 1; j++)
            sum = v_fma(v_load_lanes(tap[j] + ch, lanes), v_load_lanes(past[j] + ch, lanes), sum);
        v16 now = v_load_lanes(x + ch, lanes);
        sum = v_fma(v_load_lanes(tap[n_taps - 1] + ch, lanes), now, sum);
        if (n_taps > 1)
            v_store_lanes(past[0] + ch, now, lanes);
        v_store_lanes(y + ch, v_silu(sum), lanes);
    }
}

/* Channels [first, first + n) of a sequence. n_taps is a constant where it is the usual one. */
QV_INLINE void conv_channels(const conv_ctx *c, int64_t n_taps, int32_t seq, int64_t first,
                             int64_t n)
{
    int64_t n_past = n_taps - 1;
    int32_t start = c->batch->seq_start[seq], end = c->batch->seq_start[seq + 1];
    float tap[MAX_TAPS][CHANNELS], window[MAX_TAPS][CHANNELS], *past[MAX_TAPS];
    float *state =
        (float *)c->state.data + (c->batch->state_slot[seq] * c->state.shape[1] + first) * n_past;
    to_rows(c->w + first * n_taps, n_taps, n, tap);
    if (c->batch->pos[start] == 0)
        memset(window, 0, (size_t)n_past * sizeof *window);
    else
        to_rows(state, n_past, n, window);
    for (int64_t j = 0; j < n_past; j++)
        past[j] = window[j];

    const float *bias = c->bias ? c->bias + first : NULL;
    for (int32_t t = start; t < end; t++) {
        conv_token(n_taps, (const float(*)[CHANNELS])tap, past, bias, qv_row2(c->x, t) + first,
                   qv_row2(c->y, t) + first, n);
        float *newest = past[0];
        for (int64_t j = 0; j + 1 < n_past; j++)
            past[j] = past[j + 1];
        if (n_past > 0)
            past[n_past - 1] = newest;
    }

    for (int64_t ch = 0; ch < n; ch++)
        for (int64_t j = 0; j < n_past; j++)
            state[ch * n_past + j] = past[j][ch];
}

static void conv_sequence(const conv_ctx *c, int32_t seq, int64_t first, int64_t n)
{
    if (c->n_taps == 4)
        conv_channels(c, 4, seq, first, n);
    else
        conv_channels(c, c->n_taps, seq, first, n);
}

/* Items: sequences, in each chunks of channels. */
static void conv_items(void *ctx, int64_t begin, int64_t end, int thread)
{
    (void)thread;
    const conv_ctx *c = ctx;
    for (int64_t item = begin; item < end; item++) {
        int32_t seq = (int32_t)(item / c->n_chunks);
        int64_t first = item % c->n_chunks * CHANNELS, left = c->x.shape[1] - first;
        if (c->batch->seq_start[seq + 1] > c->batch->seq_start[seq])
            conv_sequence(c, seq, first, left < CHANNELS ? left : CHANNELS);
    }
}

qv_status QV_ISA(qv_cpu_conv1d)(qv_backend *be, const qv_batch *batch, qv_tensor x, qv_tensor w,
                                qv_tensor bias, qv_tensor state, qv_tensor y)
{
    conv_ctx c = {
        .batch = batch,
        .x = x,
        .y = y,
        .state = state,
        .w = w.data,
        .bias = bias.data,
        .n_taps = w.shape[1],
        .n_chunks = (x.shape[1] + CHANNELS - 1) / CHANNELS,
    };
    if (c.n_taps > MAX_TAPS)
        return qv_fail(QV_ERR_LIMIT, "conv1d: %lld taps, but %d are possible", (long long)c.n_taps,
                       MAX_TAPS);
    int64_t n_items = batch->n_seqs * c.n_chunks;
    int64_t ns = batch->n_tokens * x.shape[1] * (c.n_taps + 4) / 12;
    qv_pool_run(qv_cpu(be)->pool, n_items, n_items ? ns / n_items : 0, conv_items, &c);
    return QV_OK;
}
