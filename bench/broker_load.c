/* The client of bench_broker. */
#include "bench/broker_bench.h"

#include "common/clock.h"

#include <math.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <unistd.h>

#define SLOTS     65536 /* ids of the open loop, used in turns */
#define ANSWER_MS 10000
#define N_CLIENTS 100 /* of many streams */
#define POLL_MS   100

/* When the request with an id was sent, or was due. */
static uint64_t started_us[SLOTS];

/* --- Samples ----------------------------------------------------------------------------------*/

void bench_samples_init(bench_samples *samples)
{
    *samples = (bench_samples){.us = malloc(BENCH_SAMPLES_MAX * sizeof *samples->us)};
    if (samples->us == NULL)
        bench_die("no memory for samples");
}

void bench_samples_free(bench_samples *samples)
{
    free(samples->us);
    *samples = (bench_samples){0};
}

static int compare_u32(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

void bench_samples_sort(bench_samples *samples)
{
    qsort(samples->us, samples->n, sizeof *samples->us, compare_u32);
}

double bench_percentile(const bench_samples *sorted, double p)
{
    return sorted->n > 0 ? sorted->us[(size_t)(p * (double)(sorted->n - 1))] : 0;
}

static void add_sample(bench_samples *samples, uint64_t from_us, uint64_t to_us)
{
    if (samples->n < BENCH_SAMPLES_MAX)
        samples->us[samples->n++] = to_us > from_us ? (uint32_t)(to_us - from_us) : 0;
}

/* --- One client, one token a request ----------------------------------------------------------*/

static void set_id(const bench_template *submit, uint32_t id)
{
    for (int i = BENCH_ID_DIGITS - 1; i >= 0; i--, id /= 10)
        submit->data[submit->patch + (size_t)i] = (unsigned char)('0' + id % 10);
}

static void submit_one(bench_variant *v, uint32_t slot, uint64_t at_us)
{
    set_id(&v->submit, slot);
    started_us[slot] = at_us;
    while (qv_mq_send(v->mq, NULL, v->submit.data, v->submit.size) == QV_ERR_BUSY)
        ;
}

static bool is_type(const qv_mq_message *message, const char *name, size_t size)
{
    return memmem(message->data, message->size < 40 ? message->size : 40, name, size) != NULL;
}

/* Whether a message of the broker ends its request. */
static bool is_done(const qv_mq_message *message)
{
    if (is_type(message,
                "\xa4"
                "done",
                5))
        return true;
    if (is_type(message,
                "\xa5"
                "error",
                6))
        bench_die("the broker answered with an error");
    return false;
}

/* The slot of the request that this message ends, or -1. */
static int32_t ended_slot(const bench_variant *v, const qv_mq_message *message)
{
    if (!v->is_bare && !is_done(message))
        return -1;
    size_t head = message->size < 40 ? message->size : 40;
    const char *id = memmem(message->data, head, "\xa2id\xa8", 4);
    return id != NULL ? (int32_t)strtoul(id + 4, NULL, 10) % SLOTS : -1;
}

void bench_closed_loop(bench_variant *v, uint32_t window, int64_t ms, bench_samples *out)
{
    uint64_t begin = qv_now_us(), end = begin + (uint64_t)ms * 1000, now = begin;
    uint32_t in_flight = 0;
    double cpu_begin_us = bench_cpu_us(v->broker);
    for (uint32_t slot = 0; slot < window; slot++, in_flight++)
        submit_one(v, slot, qv_now_us());
    while (in_flight > 0) {
        if (!bench_wait(v->mq, ANSWER_MS))
            bench_die("no answer within 10 s");
        qv_mq_message message;
        while (qv_mq_recv(v->mq, &message) == QV_OK) {
            int32_t slot = ended_slot(v, &message);
            qv_mq_message_release(&message);
            if (slot < 0)
                continue;
            now = qv_now_us();
            if (out != NULL) {
                add_sample(out, started_us[slot], now);
                out->done++;
            }
            if (now < end)
                submit_one(v, (uint32_t)slot, now);
            else
                in_flight--;
        }
    }
    if (out == NULL)
        return;
    out->seconds += (double)(now - begin) * 1e-6;
    out->cpu_us += bench_cpu_us(v->broker) - cpu_begin_us;
}

/* --- The open loop ----------------------------------------------------------------------------*/

/* xorshift64* (Vigna 2016); a double of (0, 1]. */
static double draw(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (double)(((*state * UINT64_C(0x2545f4914f6cdd1d)) >> 11) + 1) * 0x1p-53;
}

/* Wait until something can be read or it is `until_us`, to some microseconds: zmq_poll counts in
 * milliseconds. What the socket's descriptor tells are changes, so it is asked before. */
static void wait_until(qv_mq *mq, uint64_t until_us)
{
    int fd, events;
    size_t size = sizeof fd;
    zmq_getsockopt(zsock_resolve(qv_mq_socket(mq)), ZMQ_FD, &fd, &size);
    size = sizeof events;
    zmq_getsockopt(zsock_resolve(qv_mq_socket(mq)), ZMQ_EVENTS, &events, &size);
    uint64_t now_us = qv_now_us();
    if ((events & ZMQ_POLLIN) != 0 || until_us <= now_us)
        return;
    struct pollfd item = {.fd = fd, .events = POLLIN};
    uint64_t left_us = until_us - now_us;
    struct timespec time = {(time_t)(left_us / 1000000), (long)(left_us % 1000000) * 1000};
    ppoll(&item, 1, &time, NULL);
}

/* Returns how many requests ended. */
static uint32_t drain(bench_variant *v, bench_samples *out)
{
    uint32_t n = 0;
    qv_mq_message message;
    while (qv_mq_recv(v->mq, &message) == QV_OK) {
        int32_t slot = ended_slot(v, &message);
        qv_mq_message_release(&message);
        if (slot < 0)
            continue;
        n++;
        if (out != NULL)
            add_sample(out, started_us[slot], qv_now_us());
    }
    if (out != NULL)
        out->done += n;
    return n;
}

void bench_open_loop(bench_variant *v, double per_second, int64_t ms, bench_samples *out)
{
    static uint64_t random = UINT64_C(0x9e3779b97f4a7c15);
    static uint32_t slot;
    prctl(PR_SET_TIMERSLACK, 1000); /* ns; the default is 50 us */
    uint64_t begin = qv_now_us(), end = begin + (uint64_t)ms * 1000;
    double due = (double)begin;
    uint32_t in_flight = 0;
    double cpu_begin_us = bench_cpu_us(v->broker);
    while (due < (double)end || in_flight > 0) {
        uint64_t now = qv_now_us();
        if (now > end + ANSWER_MS * 1000) {
            qv_fail(QV_ERR_TIMEOUT, "%s: %u requests are without an answer 10 s after the last",
                    v->name, in_flight);
            bench_die("open loop");
        }
        /* A few at a time, so that answers are read when they come. */
        for (int i = 0; i < 16 && due < (double)end && due <= (double)now; i++) {
            if (in_flight == BENCH_MAX_OPEN)
                break;
            slot = (slot + 1) % SLOTS;
            submit_one(v, slot, (uint64_t)due);
            in_flight++;
            due += -log(draw(&random)) * 1e6 / per_second;
        }
        in_flight -= drain(v, out);
        bool may_send = due < (double)end && in_flight < BENCH_MAX_OPEN;
        if (may_send || in_flight > 0)
            wait_until(v->mq, may_send ? (uint64_t)due : now + 100000);
    }
    if (out == NULL)
        return;
    out->seconds += (double)(qv_now_us() - begin) * 1e-6;
    out->cpu_us += bench_cpu_us(v->broker) - cpu_begin_us;
}

/* --- Many streams -----------------------------------------------------------------------------*/

/* Take one message of a stream; the text of a token is when it was made. */
static void take_piece(const qv_mq_message *message, bench_streams *out)
{
    if (is_type(message,
                "\xa6"
                "tokens",
                7)) {
        const char *text = memmem(message->data, message->size, "\xa4text\xb0", 6);
        if (text == NULL) /* pieces that were joined for us as a slow reader */
            text = memmem(message->data, message->size, "\xa4text\xd9", 6);
        else
            add_sample(&out->pieces, strtoull(text + 6, NULL, 10), qv_now_us());
        if (text == NULL)
            bench_die("a piece without a text");
        out->n_tokens += (unsigned char)text[5] == 0xb0 ? 1 : (unsigned char)text[6] / 16;
    } else if (is_done(message)) {
        out->n_done++;
    }
}

/* Have epoll tell of a client's messages: zmq_poll asks each of a hundred sockets at each call,
 * which takes longer than to read what came. Its descriptor tells of changes, so whoever is told
 * reads until nothing is left. */
static void watch(int poll_fd, qv_mq *mq, uint32_t number)
{
    int fd;
    size_t size = sizeof fd;
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = number};
    zmq_getsockopt(zsock_resolve(qv_mq_socket(mq)), ZMQ_FD, &fd, &size);
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event) != 0)
        bench_die("epoll");
}

static bool take_pieces(qv_mq *mq, bench_streams *out)
{
    bool got = false;
    qv_mq_message message;
    for (; qv_mq_recv(mq, &message) == QV_OK; got = true) {
        take_piece(&message, out);
        qv_mq_message_release(&message);
    }
    return got;
}

void bench_many_streams(const bench_settings *set, const bench_broker *broker, uint32_t n,
                        bench_streams *out)
{
    bench_template submit = bench_make_submit(set, true, set->stream_tokens);
    qv_mq *clients[N_CLIENTS];
    int poll_fd = epoll_create1(EPOLL_CLOEXEC);
    for (uint32_t i = 0; i < N_CLIENTS; i++) {
        clients[i] = bench_connect(broker);
        watch(poll_fd, clients[i], i);
    }
    zclock_sleep(300); /* connections */
    *out = (bench_streams){.rss_before = bench_rss_bytes(broker->pid)};
    bench_samples_init(&out->pieces);
    double cpu_us = bench_cpu_us(broker->pid);
    uint64_t begin = qv_now_us(), heard = begin;
    for (uint32_t i = 0; i < n; i++) {
        set_id(&submit, i);
        while (qv_mq_send(clients[i % N_CLIENTS], NULL, submit.data, submit.size) == QV_ERR_BUSY)
            ;
    }
    bool is_first = true;
    uint64_t n_half = (uint64_t)n * (uint64_t)set->stream_tokens / 2;
    while (out->n_done < n) {
        if (qv_now_us() - heard > ANSWER_MS * 1000)
            bench_die("no token within 10 s");
        struct epoll_event events[N_CLIENTS];
        int n_events = is_first ? 0 : epoll_wait(poll_fd, events, N_CLIENTS, POLL_MS);
        is_first = false;
        bool got = false;
        for (int i = 0; i < n_events; i++)
            got = take_pieces(clients[events[i].data.u32], out) || got;
        for (uint32_t i = 0; n_events == 0 && i < N_CLIENTS; i++) /* what sending swallowed */
            got = take_pieces(clients[i], out) || got;
        heard = got ? qv_now_us() : heard;
        if (out->rss_open == 0 && out->n_tokens >= n) /* about one each */
            out->rss_open = bench_rss_bytes(broker->pid);
        if (out->n_done == 0 && out->n_tokens >= n_half)
            out->rss_end = bench_rss_bytes(broker->pid);
    }
    out->seconds = (double)(heard - begin) * 1e-6;
    out->cpu_us = bench_cpu_us(broker->pid) - cpu_us;
    for (uint32_t i = 0; i < N_CLIENTS; i++)
        qv_mq_close(clients[i]);
    close(poll_fd);
    free(submit.data);
}
