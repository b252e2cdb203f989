/* What goes on beside the threads of a block, for the CPU: copies to shared memory that land some
 * time between the instruction and the wait for them, and the barriers that count their bytes. A
 * copy lands at once or when somebody waits for it, as the seed has it, so that neither reading too
 * early nor overwriting too early goes unseen.
 */
#ifndef QV_EMULATE_ASYNC_H
#define QV_EMULATE_ASYNC_H

#include "tests/emulate/tensor_map.h"

#include <stdint.h>

namespace emu
{

/* `p`, in shared memory of this block, in that of block `rank` of the cluster. */
void *shared_of(int rank, const void *p);

/* cp.async of 16 bytes, zeros unless `valid`; groups; all but the last n groups have landed. */
void copy_async(void *dst, const void *src, bool valid);
void copies_commit();
void copies_wait(int n);

/* mbarrier: a phase ends when all arrivals and all expected bytes are there. Using one that is not
 * initialised, and more arrivals than a phase has, are errors of the kernel. */
void mbarrier_init(uint64_t *barrier, int arrivals);
void mbarrier_arrive(uint64_t *barrier, int expected_bytes);
void mbarrier_arrive_copies(uint64_t *barrier); /* when this thread's copies so far have landed */
void mbarrier_wait(uint64_t *barrier, int parity);

/* A box of a map made by cuTensorMapEncodeTiled(), to each block of the cluster with a bit in
 * `blocks`. `to` and `barrier` are this block's. */
/* Later: the number, and its bytes to the barrier. */
void send_int(int *to, int value, uint64_t *barrier);
void send_four(float *to, const float *value, uint64_t *barrier);

void copy_box(void *to, const void *map, box_position from, uint64_t *barrier, uint16_t blocks);

/* And from shared memory of this block: read some time until the wait for it, and with `add` added,
 * as float32. Groups of the thread; all but the last n groups have read what they store. */
void store_box(const void *map, box_position to, const void *from, bool add);
void stores_commit();
void stores_wait(int n);

} // namespace emu

#endif
