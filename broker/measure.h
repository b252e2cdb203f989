/* Measure: how fast workers are and how much requests need, learnt from what passes through. Costs
 * are those of broker/fair.h: tokens of a prompt count once, tokens of an answer twice. All of it
 * are estimates, kept in members, groups and the pool; where one has none of its own yet, the
 * pool's holds. Pure; the broker's thread.
 */
#ifndef QV_BROKER_MEASURE_H
#define QV_BROKER_MEASURE_H

#include "broker/pool.h"

/* --- What happened ----------------------------------------------------------------------------*/

void qv_measure_load(qv_group *group, double ms);                     /* a load took so long */
void qv_measure_prefill(qv_member *member, double tokens, double us); /* computed, to first token */
void qv_measure_answer(qv_group *group, double tokens);               /* an answer had so many */
void qv_measure_served(qv_member *member, double cost);               /* delivered */

/* Once a second or more often: rates. */
void qv_measure_tick(qv_pool *pool, uint64_t now_us);

/* --- What to expect; 0 = not known ------------------------------------------------------------*/

double qv_expect_load_ms(const qv_group *group);
double qv_expect_rate(const qv_member *member);         /* cost a second */
double qv_expect_full_rate(const qv_member *member);    /* the same, with all its capacity used */
double qv_expect_prefill_rate(const qv_member *member); /* tokens a second */

/* Tokens of an answer that may have up to `most`. */
double qv_expect_answer(const qv_group *group, double most);

/* Tokens of so many bytes of text; of packed token ids too, with four bytes each. */
double qv_expect_tokens(double bytes);

#endif
