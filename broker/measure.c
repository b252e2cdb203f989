/* Means are exponential. Rates are what a worker can do, not what it was asked for: the most that
 * was seen lately, forgotten slowly. */
#include "broker/measure.h"

#define NEW_SHARE       0.2  /* of a sample in a mean */
#define RATE_KEPT       0.97 /* of the rate a second, where less was seen */
#define WINDOW_US       1000000
#define BYTES_PER_TOKEN 4.0
#define FIRST_ANSWER    128.0 /* tokens, before any answer was seen */
#define MIN_PREFILL     32.0  /* shorter ones measure the latency of a step */

static void mean(double *value, double sample)
{
    *value = *value > 0 ? *value + NEW_SHARE * (sample - *value) : sample;
}

static void most(double *value, double sample, double kept)
{
    double old = *value * kept;
    *value = sample > old ? sample : old;
}

void qv_measure_load(qv_group *group, double ms)
{
    if (ms <= 0)
        ms = 0.1;
    mean(&group->load_ms, ms);
    mean(&group->pool->load_ms, ms);
}

void qv_measure_prefill(qv_member *member, double tokens, double us)
{
    if (tokens < MIN_PREFILL || us <= 0)
        return;
    double rate = tokens * 1e6 / us;
    most(&member->prefill_rate, rate, 0.99);
    mean(&member->pool->prefill_rate, rate);
}

void qv_measure_answer(qv_group *group, double tokens)
{
    mean(&group->answer_mean, tokens > 0 ? tokens : 0.5);
    mean(&group->pool->answer_mean, tokens > 0 ? tokens : 0.5);
}

void qv_measure_served(qv_member *member, double cost)
{
    member->served += cost;
}

void qv_measure_tick(qv_pool *pool, uint64_t now_us)
{
    QV_LIST_EACH(&pool->members, qv_member, link, member)
    {
        if (member->n_attempts == 0)
            member->was_idle = true;
        if (member->credit > 0)
            member->had_credit = true;
        uint64_t elapsed_us = now_us - member->window_us;
        if (member->window_us != 0 && elapsed_us < WINDOW_US)
            continue;
        if (member->window_us != 0) {
            double rate = member->served * 1e6 / (double)elapsed_us;
            most(&member->rate, rate, member->was_idle ? 1 : RATE_KEPT);
            if (member->rate > 0)
                mean(&pool->rate, member->rate);
            if (!member->had_credit && rate > 0) {
                mean(&member->full_rate, rate);
                mean(&pool->full_rate, rate);
            }
        }
        member->served = 0;
        member->was_idle = member->had_credit = false;
        member->window_us = now_us;
    }
}

double qv_expect_load_ms(const qv_group *group)
{
    return group->load_ms > 0 ? group->load_ms : group->pool->load_ms;
}

double qv_expect_rate(const qv_member *member)
{
    return member->rate > 0 ? member->rate : member->pool->rate;
}

double qv_expect_full_rate(const qv_member *member)
{
    return member->full_rate > 0 ? member->full_rate : member->pool->full_rate;
}

double qv_expect_prefill_rate(const qv_member *member)
{
    return member->prefill_rate > 0 ? member->prefill_rate : member->pool->prefill_rate;
}

double qv_expect_answer(const qv_group *group, double most_tokens)
{
    double tokens = group->answer_mean > 0         ? group->answer_mean
                    : group->pool->answer_mean > 0 ? group->pool->answer_mean
                                                   : FIRST_ANSWER;
    return tokens < most_tokens ? tokens : most_tokens;
}

double qv_expect_tokens(double bytes)
{
    return bytes / BYTES_PER_TOKEN;
}
