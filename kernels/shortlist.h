/* How a shortlist lies in memory, for the CPU and the kernels that write and merge it: words of 32
 * bits, floats by their bits. A head, then k tokens in the order of ids (logit after penalties, id,
 * logit before), then n_top alternatives, most likely first (logit, id). */
#ifndef QV_KERNELS_SHORTLIST_H
#define QV_KERNELS_SHORTLIST_H

#include <stdint.h>

enum {
    QV_SHORT_MAX,        /* float: the highest logit of the part, over all its columns */
    QV_SHORT_SUM,        /* float: sum of exp(logit - max), rounded */
    QV_SHORT_SUM_REST,   /* float: what rounding took from it */
    QV_SHORT_BAD,        /* not 0: some logit is not finite */
    QV_SHORT_N,          /* tokens there are */
    QV_SHORT_N_TOP,      /* alternatives there are */
    QV_SHORT_HAS_TARGET, /* not 0: the row's target is in this part */
    QV_SHORT_TARGET,     /* float: its logit */
    QV_SHORT_HEAD
};

/* Word offsets in a list with room for k tokens. */
#define QV_SHORT_LOGIT(k)        (QV_SHORT_HEAD)
#define QV_SHORT_ID(k)           (QV_SHORT_HEAD + (k))
#define QV_SHORT_RAW(k)          (QV_SHORT_HEAD + 2 * (k))
#define QV_SHORT_TOP(k)          (QV_SHORT_HEAD + 3 * (k))
#define QV_SHORT_TOP_ID(k, n)    (QV_SHORT_HEAD + 3 * (k) + (n))
#define QV_SHORT_WORDS(k, n_top) (QV_SHORT_HEAD + 3 * (k) + 2 * (n_top))

#endif
