#include "common/mq.h"
#include "tests/support.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

/* --- helpers --------------------------------------------------------------------------------- */

#define DEADLINE_MS 10000

static qv_mq *open_mq(qv_mq_options options)
{
    qv_mq *mq = NULL;
    cr_assert_eq(qv_mq_open(&options, &mq), QV_OK, "%s", qv_error());
    return mq;
}

static qv_mq *open_router(void)
{
    return open_mq(qv_mq_default_options(QV_MQ_ROUTER, "tcp://127.0.0.1:*"));
}

static qv_mq *open_dealer(const char *endpoint)
{
    return open_mq(qv_mq_default_options(QV_MQ_DEALER, endpoint));
}

/* A plain libzmq socket, as other languages have it, connected to the router. */
static zsock_t *open_plain(int type, const char *endpoint)
{
    zsock_t *socket = zsock_new(type);
    cr_assert_not_null(socket);
    zsock_set_linger(socket, 0);
    cr_assert_eq(zmq_connect(zsock_resolve(socket), endpoint), 0);
    return socket;
}

static bool wait_for(zsock_t *socket, short events, long timeout_ms)
{
    zmq_pollitem_t item = {.socket = zsock_resolve(socket), .events = events};
    return zmq_poll(&item, 1, timeout_ms) == 1;
}

/* The next message; the caller releases it. */
static qv_status receive(qv_mq *mq, qv_mq_message *out)
{
    qv_status status;
    while ((status = qv_mq_recv(mq, out)) == QV_ERR_BUSY)
        cr_assert(wait_for(qv_mq_socket(mq), ZMQ_POLLIN, DEADLINE_MS), "nothing came");
    return status;
}

/* Receive one message and check its body; returns where it came from. */
static qv_mq_peer expect(qv_mq *mq, const char *body)
{
    qv_mq_message m;
    cr_assert_eq(receive(mq, &m), QV_OK, "%s", qv_error());
    cr_assert_eq(m.size, strlen(body), "%zu bytes, not \"%s\"", m.size, body);
    cr_assert_arr_eq(m.data, body, m.size, "not \"%s\"", body);
    qv_mq_peer peer = m.peer;
    qv_mq_message_release(&m);
    return peer;
}

/* Send as soon as there is room or a connection. */
static void deliver(qv_mq *mq, const qv_mq_peer *peer, const char *body)
{
    qv_status status;
    while ((status = qv_mq_send(mq, peer, body, strlen(body))) == QV_ERR_BUSY)
        cr_assert(wait_for(qv_mq_socket(mq), ZMQ_POLLOUT, DEADLINE_MS), "never writable");
    cr_assert_eq(status, QV_OK, "%s", qv_error());
}

static void send_frames(zsock_t *socket, const char *const *frames, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        int flags = i + 1 < n ? ZMQ_SNDMORE : 0;
        cr_assert_neq(zmq_send(zsock_resolve(socket), frames[i], strlen(frames[i]), flags), -1);
    }
}

/* --- exchange -------------------------------------------------------------------------------- */

Test(mq, carries_messages_both_ways)
{
    qv_mq *router = open_router();
    qv_mq *a = open_dealer(qv_mq_endpoint(router)), *b = open_dealer(qv_mq_endpoint(router));
    deliver(a, NULL, "from a");
    qv_mq_peer peer_a = expect(router, "from a");
    deliver(b, NULL, "from b");
    qv_mq_peer peer_b = expect(router, "from b");
    cr_assert_not(qv_mq_peer_equal(&peer_a, &peer_b));
    cr_assert_not(peer_a.delimiter);

    deliver(router, &peer_b, "to b");
    deliver(router, &peer_a, "to a, 1");
    deliver(router, &peer_a, "to a, 2");
    expect(a, "to a, 1");
    expect(a, "to a, 2");
    qv_mq_peer none = expect(b, "to b");
    cr_assert_eq(none.size, 0);

    const qv_mq_stats *stats = qv_mq_get_stats(router);
    cr_assert(stats->received == 2 && stats->received_bytes == 12);
    cr_assert(stats->sent == 3 && stats->sent_bytes == 18);
    cr_assert(stats->malformed == 0 && stats->gone == 0);
    qv_mq_message m;
    cr_assert_eq(qv_mq_recv(router, &m), QV_ERR_BUSY);
    qv_mq_close(a);
    qv_mq_close(b);
    qv_mq_close(router);
}

Test(mq, mirrors_the_delimiter_of_a_req_client)
{
    qv_mq *router = open_router();
    zsock_t *req = open_plain(ZMQ_REQ, qv_mq_endpoint(router));
    for (int round = 0; round < 2; round++) {
        char body[16];
        const char *question[] = {"question"};
        send_frames(req, question, 1);
        qv_mq_peer peer = expect(router, "question");
        cr_assert(peer.delimiter);
        deliver(router, &peer, "answer");
        cr_assert_eq(zmq_recv(zsock_resolve(req), body, sizeof(body), 0), 6);
        cr_assert_arr_eq(body, "answer", 6);
    }
    zsock_destroy(&req);
    qv_mq_close(router);
}

Test(mq, reports_malformed_messages_and_goes_on)
{
    static const struct {
        const char *frames[4];
        size_t n;
    } cases[] = {
        {{""}, 1},           {{"", ""}, 2},           {{"a", "b"}, 2},
        {{"", "a", "b"}, 3}, {{"a", "", "b", ""}, 4}, {{"", "", "", "a"}, 4},
    };
    qv_mq *router = open_router();
    zsock_t *plain = open_plain(ZMQ_DEALER, qv_mq_endpoint(router));
    const char *fine[] = {"fine"};
    qv_mq_message m;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        send_frames(plain, cases[i].frames, cases[i].n);
        send_frames(plain, fine, 1);
        cr_assert_eq(receive(router, &m), QV_ERR_FORMAT, "case %zu", i);
        qv_mq_peer bad = m.peer;
        qv_mq_peer good = expect(router, "fine");
        cr_assert(qv_mq_peer_equal(&bad, &good), "case %zu", i);
        cr_assert_eq(qv_mq_get_stats(router)->malformed, i + 1);
    }
    zsock_destroy(&plain);
    qv_mq_close(router);
}

Test(mq, takes_routing_ids_of_any_length)
{
    qv_mq *router = open_router();
    char id[QV_MQ_ID_MAX], text[2 * QV_MQ_ID_MAX + 1], body[8];
    memset(id, 0xab, sizeof(id));
    zsock_t *plain = zsock_new(ZMQ_DEALER);
    zsock_set_linger(plain, 0);
    zmq_setsockopt(zsock_resolve(plain), ZMQ_ROUTING_ID, id, sizeof(id));
    cr_assert_eq(zmq_connect(zsock_resolve(plain), qv_mq_endpoint(router)), 0);
    const char *hello[] = {"hello"};
    send_frames(plain, hello, 1);
    qv_mq_peer peer = expect(router, "hello");
    cr_assert_eq(peer.size, QV_MQ_ID_MAX);
    qv_mq_peer_text(&peer, text);
    cr_assert_eq(strlen(text), 2 * QV_MQ_ID_MAX);
    cr_assert_eq(strncmp(text, "abab", 4), 0);
    deliver(router, &peer, "back");
    cr_assert_eq(zmq_recv(zsock_resolve(plain), body, sizeof(body), 0), 4);
    zsock_destroy(&plain);
    qv_mq_close(router);
}

Test(mq, carries_bodies_of_any_size_and_content)
{
    qv_mq *router = open_router(), *dealer = open_dealer(qv_mq_endpoint(router));
    static const size_t sizes[] = {1, 32, 33, 34, 255, 256, 8191, 8192, 8193, 5 << 20};
    char *body = malloc(5 << 20);
    qv_rng rng = qv_rng_seed(1);
    for (size_t i = 0; i < 5 << 20; i++)
        body[i] = (char)qv_rng_u64(&rng);
    deliver(dealer, NULL, "x");
    qv_mq_peer peer = expect(router, "x");
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        qv_mq_message m;
        cr_assert_eq(qv_mq_send(dealer, NULL, body, sizes[i]), QV_OK);
        cr_assert_eq(receive(router, &m), QV_OK);
        cr_assert_eq(m.size, sizes[i]);
        cr_assert_eq(memcmp(m.data, body, m.size), 0);
        cr_assert_eq(qv_mq_send(router, &peer, m.data, m.size), QV_OK);
        qv_mq_message_release(&m);
        cr_assert_eq(receive(dealer, &m), QV_OK);
        cr_assert_eq(m.size, sizes[i]);
        cr_assert_eq(memcmp(m.data, body, m.size), 0);
        qv_mq_message_release(&m);
    }
    free(body);
    qv_mq_close(dealer);
    qv_mq_close(router);
}

static int on_readable(zloop_t *loop, zsock_t *socket, void *user)
{
    (void)loop;
    (void)socket;
    expect(user, "hello");
    return -1; /* ends the loop */
}

Test(mq, wakes_a_zloop)
{
    qv_mq *router = open_router(), *dealer = open_dealer(qv_mq_endpoint(router));
    zloop_t *loop = zloop_new();
    zloop_reader(loop, qv_mq_socket(router), on_readable, router);
    deliver(dealer, NULL, "hello");
    zloop_start(loop);
    cr_assert_eq(qv_mq_get_stats(router)->received, 1);
    zloop_destroy(&loop);
    qv_mq_close(dealer);
    qv_mq_close(router);
}

/* --- peers that go, stall or do not come ------------------------------------------------------ */

typedef struct {
    qv_mq *mq;
    qv_mq_peer peer;
    qv_status wanted;
} attempt;

static bool sending_gives(void *user)
{
    attempt *a = user;
    return qv_mq_send(a->mq, &a->peer, "x", 1) == a->wanted;
}

Test(mq, says_that_a_peer_is_gone)
{
    qv_mq *router = open_router(), *dealer = open_dealer(qv_mq_endpoint(router));
    qv_mq_peer stranger = {.size = 5, .id = "q1234"};
    cr_assert_eq(qv_mq_send(router, &stranger, "x", 1), QV_ERR_NOT_FOUND);
    deliver(dealer, NULL, "hello");
    attempt to_dealer = {router, expect(router, "hello"), QV_ERR_NOT_FOUND};
    qv_mq_close(dealer);
    cr_assert(qv_wait_until(sending_gives, &to_dealer, DEADLINE_MS));
    cr_assert_geq(qv_mq_get_stats(router)->gone, 2);
    qv_mq_close(router);
}

Test(mq, reopening_is_a_new_session)
{
    qv_mq *router = open_router(), *dealer = open_dealer(qv_mq_endpoint(router));
    deliver(dealer, NULL, "one");
    attempt to_old = {router, expect(router, "one"), QV_ERR_NOT_FOUND};
    cr_assert_eq(qv_mq_reopen(dealer), QV_OK, "%s", qv_error());
    deliver(dealer, NULL, "two");
    qv_mq_peer now = expect(router, "two");
    cr_assert_not(qv_mq_peer_equal(&to_old.peer, &now));
    cr_assert(qv_wait_until(sending_gives, &to_old, DEADLINE_MS));
    deliver(router, &now, "welcome");
    expect(dealer, "welcome");
    cr_assert_eq(qv_mq_reopen(router), QV_ERR_STATE);
    qv_mq_close(dealer);
    qv_mq_close(router);
}

Test(mq, a_dealer_without_a_connection_is_busy_and_queues_nothing)
{
    qv_mq *dealer = open_dealer(qv_tcp_endpoint());
    cr_assert_eq(qv_mq_send(dealer, NULL, "lost", 4), QV_ERR_BUSY);
    cr_assert_eq(qv_mq_get_stats(dealer)->busy, 1);
    qv_mq_options options = qv_mq_default_options(QV_MQ_ROUTER, qv_mq_endpoint(dealer));
    qv_mq *router = open_mq(options); /* the other side comes up later */
    deliver(dealer, NULL, "first");
    expect(router, "first");
    qv_mq_close(dealer);
    qv_mq_close(router);
}

Test(mq, a_peer_that_does_not_read_stalls_nobody_else)
{
    qv_mq_options options = qv_mq_default_options(QV_MQ_ROUTER, "tcp://127.0.0.1:*");
    options.high_water_mark = 4;
    qv_mq *router = open_mq(options);
    options = qv_mq_default_options(QV_MQ_DEALER, qv_mq_endpoint(router));
    options.high_water_mark = 4;
    qv_mq *slow = open_mq(options), *quick = open_mq(options);
    deliver(slow, NULL, "slow");
    attempt to_slow = {router, expect(router, "slow"), QV_OK};
    deliver(quick, NULL, "quick");
    qv_mq_peer to_quick = expect(router, "quick");

    static char body[1 << 18];
    int sent = 0;
    qv_status status;
    while ((status = qv_mq_send(router, &to_slow.peer, body, sizeof(body))) == QV_OK)
        cr_assert_lt(++sent, 10000, "the queue has no bound");
    cr_assert_eq(status, QV_ERR_BUSY, "%s", qv_error());
    cr_assert_eq(qv_mq_get_stats(router)->busy, 1);
    deliver(router, &to_quick, "still here");
    expect(quick, "still here");

    for (int i = 0; i < sent; i++) { /* nothing that was taken is lost */
        qv_mq_message m;
        cr_assert_eq(receive(slow, &m), QV_OK);
        cr_assert_eq(m.size, sizeof(body));
        qv_mq_message_release(&m);
    }
    cr_assert(qv_wait_until(sending_gives, &to_slow, DEADLINE_MS));
    expect(slow, "x");
    qv_mq_close(slow);
    qv_mq_close(quick);
    qv_mq_close(router);
}

Test(mq, cuts_off_who_sends_too_much_and_serves_the_others)
{
    qv_mq_options options = qv_mq_default_options(QV_MQ_ROUTER, "tcp://127.0.0.1:*");
    options.max_message_bytes = 1000;
    qv_mq *router = open_mq(options);
    qv_mq *big = open_dealer(qv_mq_endpoint(router)), *small = open_dealer(qv_mq_endpoint(router));
    static char body[1001];
    deliver(big, NULL, "hello");
    attempt to_big = {router, expect(router, "hello"), QV_ERR_NOT_FOUND};
    cr_assert_eq(qv_mq_send(big, NULL, body, sizeof(body)), QV_OK);
    cr_assert(qv_wait_until(sending_gives, &to_big, DEADLINE_MS));
    deliver(small, NULL, "small");
    expect(router, "small");
    qv_mq_close(big);
    qv_mq_close(small);
    qv_mq_close(router);
}

/* --- opening --------------------------------------------------------------------------------- */

Test(mq, binds_several_endpoints_and_resolves_them)
{
    char list[256];
    const char *socket_file = qv_ipc_endpoint("router");
    snprintf(list, sizeof(list), "tcp://127.0.0.1:*,%s", socket_file);
    qv_mq *router = open_mq(qv_mq_default_options(QV_MQ_ROUTER, list));
    char *bound = strdup(qv_mq_endpoint(router)), *rest = bound;
    char *tcp = strsep(&rest, ","), *ipc = strsep(&rest, ",");
    cr_assert(strncmp(tcp, "tcp://127.0.0.1:", 16) == 0 && atoi(tcp + 16) > 0, "%s", tcp);
    cr_assert_str_eq(ipc, socket_file);
    qv_mq *a = open_dealer(tcp), *b = open_dealer(ipc);
    cr_assert_str_eq(qv_mq_endpoint(a), tcp);
    deliver(a, NULL, "over tcp");
    expect(router, "over tcp");
    deliver(b, NULL, "over ipc");
    expect(router, "over ipc");
    free(bound);
    qv_mq_close(a);
    qv_mq_close(b);
    qv_mq_close(router);
}

Test(mq, says_why_an_endpoint_cannot_be_opened)
{
    qv_mq *router = open_router(), *other = NULL;
    char list[256];
    snprintf(list, sizeof(list), "%s,%s", qv_tcp_endpoint(), qv_mq_endpoint(router));
    const struct {
        qv_mq_type type;
        const char *endpoint;
        qv_status status;
        const char *sentence;
    } cases[] = {
        {QV_MQ_ROUTER, qv_mq_endpoint(router), QV_ERR_IO, "Address already in use"},
        {QV_MQ_ROUTER, list, QV_ERR_IO, "Address already in use"},
        {QV_MQ_ROUTER, "ipc:///nonexistent/folder/socket", QV_ERR_IO, "cannot bind ipc:///nonex"},
        {QV_MQ_ROUTER, "127.0.0.1:5555", QV_ERR_ARG, "cannot bind 127.0.0.1:5555"},
        {QV_MQ_ROUTER, "tcp://127.0.0.1:port", QV_ERR_ARG, "cannot bind tcp://127.0.0.1:port"},
        {QV_MQ_ROUTER, "", QV_ERR_ARG, "an endpoint is empty"},
        {QV_MQ_ROUTER, NULL, QV_ERR_ARG, "an endpoint is empty"},
        {QV_MQ_DEALER, "tcp:/127.0.0.1", QV_ERR_ARG, "cannot connect to tcp:/127.0.0.1"},
        {QV_MQ_DEALER, "tcp://127.0.0.1:1,tcp://127.0.0.1:2", QV_ERR_ARG, "one endpoint"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        qv_mq_options options = qv_mq_default_options(cases[i].type, cases[i].endpoint);
        qv_status status = qv_mq_open(&options, &other);
        cr_assert_eq(status, cases[i].status, "case %zu: %s", i, qv_error());
        cr_assert_not_null(strstr(qv_error(), cases[i].sentence), "case %zu: %s", i, qv_error());
    }
    qv_mq_close(NULL);
    qv_mq_close(router);
}

static void on_signal(int number)
{
    (void)number;
}

Test(mq, leaves_signals_to_the_program)
{
    struct sigaction before = {.sa_handler = on_signal}, after;
    sigaction(SIGTERM, &before, NULL);
    qv_mq *router = open_router();
    sigaction(SIGTERM, NULL, &after);
    cr_assert_eq(after.sa_handler, on_signal);
    sigaction(SIGINT, &before, NULL);
    qv_mq *dealer = open_dealer(qv_mq_endpoint(router));
    sigaction(SIGINT, NULL, &after);
    cr_assert_eq(after.sa_handler, on_signal);
    qv_mq_close(dealer);
    qv_mq_close(router);
}
