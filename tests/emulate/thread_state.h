/* What one thread of a kernel has under way: its asynchronous copies and its products. Made when it
 * is first asked for; actions that outlive the thread share it.
 */
#ifndef QV_EMULATE_THREAD_STATE_H
#define QV_EMULATE_THREAD_STATE_H

#include "tests/emulate/wgmma.h"

#include <deque>
#include <functional>
#include <memory>
#include <stdint.h>
#include <vector>

namespace emu
{

/* In the order of the instructions: 16 bytes from `src`, or zeros, to `dst`; the end of a group; an
 * arrival at `barrier`. */
struct queued_copy {
    enum { COPY, END_OF_GROUP, ARRIVAL } kind;
    void *dst;
    const void *src;
    uint64_t *barrier;
};

struct thread_state {
    std::shared_ptr<thread_state> self; /* until the thread ends */

    /* cp.async: what has not landed, its first is number `n_landed` of the thread's. */
    std::deque<queued_copy> copies;
    uint64_t n_landed = 0;
    int n_groups = 0; /* ends of groups in `copies` */

    /* Boxes on their way out of shared memory; an empty one ends a group. */
    std::deque<std::function<void()>> stores;
    int n_store_groups = 0; /* ends of groups in `stores` */

    /* wgmma: the products that have not been made, and how many of them each group has. */
    struct pending : product {
        std::vector<float> sums; /* what d held before; empty: d is that of an earlier product */
    };
    std::vector<pending> products;
    std::deque<size_t> groups;
    bool fenced = false;
};

/* Of the thread that runs. */
thread_state &own_state();

} // namespace emu

#endif
