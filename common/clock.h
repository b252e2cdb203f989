/* Time: the monotonic clock for deadlines and durations, the wall clock for logs, and a clock
 * object that tests can set by hand.
 *
 * Schedulers and tables take the time as an argument; only loops read a clock. All functions may be
 * called from any thread; a fake clock belongs to the thread of its test.
 */
#ifndef QV_COMMON_CLOCK_H
#define QV_COMMON_CLOCK_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#ifdef __cplusplus
extern "C" {
#endif

static inline uint64_t qv_clock_read_ns(clockid_t id)
{
    struct timespec ts;
    clock_gettime(id, &ts);
    return (uint64_t)ts.tv_sec * UINT64_C(1000000000) + (uint64_t)ts.tv_nsec;
}

/* Monotonic time since an arbitrary start (CLOCK_MONOTONIC): never steps, not comparable between
 * machines. */
static inline uint64_t qv_now_ns(void)
{
    return qv_clock_read_ns(CLOCK_MONOTONIC);
}

static inline uint64_t qv_now_us(void)
{
    return qv_now_ns() / 1000;
}

static inline uint64_t qv_now_ms(void)
{
    return qv_now_ns() / 1000000;
}

/* Milliseconds since 1970-01-01 UTC. May step; for people and for records, never for deadlines. */
static inline uint64_t qv_wall_ms(void)
{
    return qv_clock_read_ns(CLOCK_REALTIME) / 1000000;
}

/* A source of monotonic time that its owner can choose: the real one, or one set by hand. */
typedef struct {
    uint64_t fake_ns; /* the time, when is_fake */
    int is_fake;
} qv_clock;

/* The real clock, and a fake one that stands at `start_ms` until it is moved. */
static inline qv_clock qv_clock_real(void)
{
    qv_clock clock = {0, 0};
    return clock;
}

static inline qv_clock qv_clock_fake(uint64_t start_ms)
{
    qv_clock clock = {start_ms * UINT64_C(1000000), 1};
    return clock;
}

/* The time of `clock`; NULL means the real clock. */
static inline uint64_t qv_clock_now_ns(const qv_clock *clock)
{
    return clock != NULL && clock->is_fake ? clock->fake_ns : qv_now_ns();
}

static inline uint64_t qv_clock_now_ms(const qv_clock *clock)
{
    return qv_clock_now_ns(clock) / 1000000;
}

/* Move a fake clock forward; the real clock ignores it. */
static inline void qv_clock_advance_ms(qv_clock *clock, uint64_t ms)
{
    clock->fake_ns += ms * UINT64_C(1000000);
}

#ifdef __cplusplus
}
#endif
#endif
