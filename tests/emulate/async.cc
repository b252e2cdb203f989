/* Copies of threads wait in a queue of their thread, those of the copy engine as actions of the
 * machine. Which wait at all is drawn.
 */
#include "tests/emulate/async.h"

#include "tests/emulate/device/cuda_device.h"
#include "tests/emulate/tensor_map.h"
#include "tests/emulate/thread_state.h"

#include <array>
#include <string.h>

namespace emu
{

void *shared_of(int rank, const void *p)
{
    if (rank < 0 || rank >= cluster_size())
        fail("block %d of a cluster of %d", rank, cluster_size());
    return shared_memory_of(rank) + __cvta_generic_to_shared(p);
}

/* --- Barriers ----------------------------------------------------------------------------- */

namespace
{

/* The 64 bits of a barrier, which programs only give to these functions. */
struct phases {
    uint64_t parity : 1; /* of the phase under way */
    uint64_t arrivals : 11, missing : 11;
    int64_t bytes : 25; /* expected, less those that have come: these may come first */
    uint64_t mark : 16;
};
static_assert(sizeof(phases) == sizeof(uint64_t), "a barrier");

constexpr unsigned MARK = 0xbaa7;

phases &at_barrier(uint64_t *barrier)
{
    phases &p = *(phases *)barrier;
    if (p.mark != MARK)
        fail("mbarrier %p is not initialised", (void *)barrier);
    return p;
}

void next_phase_if_complete(phases &p)
{
    if (p.missing != 0 || p.bytes != 0)
        return;
    p.parity ^= 1;
    p.missing = p.arrivals;
}

void arrive(uint64_t *barrier, int expected_bytes)
{
    phases &p = at_barrier(barrier);
    if (p.missing == 0)
        fail("mbarrier %p: more than %d arrivals in a phase", (void *)barrier, (int)p.arrivals);
    p.bytes += expected_bytes;
    p.missing--;
    next_phase_if_complete(p);
}

void bytes_came(uint64_t *barrier, int bytes)
{
    phases &p = at_barrier(barrier);
    p.bytes -= bytes;
    next_phase_if_complete(p);
}

struct awaited {
    uint64_t *barrier;
    unsigned parity;
};

bool has_passed(void *ctx)
{
    const awaited &a = *(const awaited *)ctx;
    return at_barrier(a.barrier).parity != a.parity;
}

} // namespace

void mbarrier_init(uint64_t *barrier, int arrivals)
{
    size_t at = __cvta_generic_to_shared(barrier);
    if (at % 8 != 0 || arrivals < 1 || arrivals >= 1 << 11)
        fail("an mbarrier for %d arrivals at %zu of shared memory", arrivals, at);
    phases p = {};
    p.arrivals = p.missing = (unsigned)arrivals;
    p.mark = MARK;
    memcpy(barrier, &p, sizeof p);
}

void mbarrier_arrive(uint64_t *barrier, int expected_bytes)
{
    arrive(barrier, expected_bytes);
}

void mbarrier_wait(uint64_t *barrier, int parity)
{
    awaited a = {barrier, (unsigned)parity};
    if (parity != 0 && parity != 1)
        fail("mbarrier %p: parity %d", (void *)barrier, parity);
    wait_until(has_passed, &a, "mbarrier");
}

/* --- Copies of a thread ------------------------------------------------------------------- */

namespace
{

void land(const queued_copy &c)
{
    if (c.src != nullptr)
        memcpy(c.dst, c.src, 16);
    else
        memset(c.dst, 0, 16);
}

void land_first(thread_state &s)
{
    queued_copy c = s.copies.front();
    s.copies.pop_front();
    s.n_landed++;
    switch (c.kind) {
    case queued_copy::COPY:
        land(c);
        break;
    case queued_copy::END_OF_GROUP:
        s.n_groups--;
        break;
    case queued_copy::ARRIVAL:
        arrive(c.barrier, 0);
        break;
    }
}

} // namespace

void copy_async(void *dst, const void *src, bool valid)
{
    size_t at = __cvta_generic_to_shared(dst);
    if (at % 16 != 0 || (valid && (uintptr_t)src % 16 != 0))
        fail("cp.async of 16 bytes from %p to %zu of shared memory", src, at);
    const queued_copy c = {queued_copy::COPY, dst, valid ? src : nullptr, nullptr};
    if (chance(2))
        land(c);
    else
        own_state().copies.push_back(c);
}

void copies_commit()
{
    thread_state &s = own_state();
    s.copies.push_back({queued_copy::END_OF_GROUP, nullptr, nullptr, nullptr});
    s.n_groups++;
}

void copies_wait(int n)
{
    thread_state &s = own_state();
    while (s.n_groups > n)
        land_first(s);
}

void mbarrier_arrive_copies(uint64_t *barrier)
{
    at_barrier(barrier);
    thread_state &s = own_state();
    s.copies.push_back({queued_copy::ARRIVAL, nullptr, nullptr, barrier});
    uint64_t number = s.n_landed + s.copies.size();
    later([state = s.self, number] {
        while (state->n_landed < number)
            land_first(*state);
    });
}

void send_int(int *to, int value, uint64_t *barrier)
{
    later([to, value, barrier] {
        *to = value;
        bytes_came(barrier, (int)sizeof value);
    });
}

void send_four(float *to, const float *value, uint64_t *barrier)
{
    later([to, v = std::array<float, 4>{value[0], value[1], value[2], value[3]}, barrier] {
        memcpy(to, v.data(), sizeof v);
        bytes_came(barrier, (int)sizeof v);
    });
}

/* --- Copies of the copy engine ------------------------------------------------------------ */

void copy_box(void *to, const void *map, box_position from, uint64_t *barrier, uint16_t blocks)
{
    const tensor_map m = read_tensor_map(map);
    for (int rank = 0; rank < 16; rank++)
        if (blocks >> rank & 1) {
            char *there = (char *)shared_of(rank, to);
            size_t offset = (size_t)(there - shared_memory_of(rank));
            if (offset + m.box_bytes() > shared_size())
                fail("a box of %zu bytes at %zu of shared memory, of which there are %zu",
                     m.box_bytes(), offset, shared_size());
            uint64_t *its_barrier = (uint64_t *)shared_of(rank, barrier);
            later([m, from, there, offset, its_barrier] {
                land_box(m, from, there, offset);
                bytes_came(its_barrier, (int)m.box_bytes());
            });
        }
}

void store_box(const void *map, box_position to, const void *from, bool add)
{
    const tensor_map m = read_tensor_map(map);
    const size_t offset = __cvta_generic_to_shared(from);
    if (offset + m.box_bytes() > shared_size())
        fail("a box of %zu bytes at %zu of shared memory, of which there are %zu", m.box_bytes(),
             offset, shared_size());
    auto run = [m, to, from, offset, add] { take_box(m, to, (const char *)from, offset, add); };
    if (chance(2))
        run();
    else
        own_state().stores.push_back(run);
}

void stores_commit()
{
    own_state().stores.push_back(nullptr);
    own_state().n_store_groups++;
}

void stores_wait(int n)
{
    thread_state &s = own_state();
    while (s.n_store_groups > n) {
        if (s.stores.front())
            s.stores.front()();
        else
            s.n_store_groups--;
        s.stores.pop_front();
    }
}

} // namespace emu
