/* What cuda_device.h declares: barriers of a block, and what the lanes of a warp exchange. */
#include "tests/emulate/device/cuda_device.h"

#include <unordered_map>

namespace emu
{

namespace
{

/* The value of an index that names no lane of the meeting. */
constexpr uint64_t NOTHING = 0xfff7a5a5fff7a5a5u; /* NaN, twice */

struct shuffled {
    uint64_t value, result;
    int from; /* lane */
};

void shuffle_all(void **lanes, void *)
{
    for (int lane = 0; lane < 32; lane++)
        if (shuffled *to = (shuffled *)lanes[lane]) {
            const shuffled *from = (const shuffled *)lanes[to->from];
            to->result = from ? from->value : NOTHING;
        }
}

struct reduced {
    uint32_t value;
    reduce_mode mode;
    bool is_signed;
    uint32_t result;
};

uint32_t combine(const reduced &how, uint32_t a, uint32_t b)
{
    bool less = how.is_signed ? (int32_t)a < (int32_t)b : a < b;
    switch (how.mode) {
    case REDUCE_ADD:
        return a + b;
    case REDUCE_MIN:
        return less ? a : b;
    case REDUCE_MAX:
        return less ? b : a;
    }
    fail("no such reduction: %d", (int)how.mode);
}

void reduce_all(void **lanes, void *)
{
    const reduced *first = nullptr;
    uint32_t sum = 0;
    for (int lane = 0; lane < 32; lane++)
        if (const reduced *from = (const reduced *)lanes[lane]) {
            sum = first ? combine(*first, sum, from->value) : from->value;
            first = first ? first : from;
        }
    for (int lane = 0; lane < 32; lane++)
        if (reduced *to = (reduced *)lanes[lane])
            to->result = sum;
}

struct balloted {
    int predicate;
    uint32_t result;
};

void ballot_all(void **lanes, void *)
{
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; lane++)
        if (const balloted *from = (const balloted *)lanes[lane])
            votes |= (uint32_t)(from->predicate != 0) << lane;
    for (int lane = 0; lane < 32; lane++)
        if (balloted *to = (balloted *)lanes[lane])
            to->result = votes;
}

struct matched {
    uint64_t value;
    uint32_t result;
};

void match_all(void **lanes, void *)
{
    for (int lane = 0; lane < 32; lane++)
        if (matched *to = (matched *)lanes[lane]) {
            to->result = 0;
            for (int i = 0; i < 32; i++)
                if (lanes[i] && ((const matched *)lanes[i])->value == to->value)
                    to->result |= 1u << i;
        }
}

void meet_only(void **, void *) {}

} // namespace

uint64_t shuffle(shuffle_mode mode, unsigned mask, uint64_t value, int with, int width)
{
    if (width < 1 || width > 32 || (width & (width - 1)) != 0)
        fail("a shuffle among %d lanes", width);
    int lane = current->lane, first = lane & ~(width - 1), last = first + width - 1, from = lane;
    switch (mode) {
    case SHUFFLE_INDEX:
        from = first + (with & (width - 1));
        break;
    case SHUFFLE_UP:
        from = lane - with;
        break;
    case SHUFFLE_DOWN:
        from = lane + with;
        break;
    case SHUFFLE_XOR:
        from = lane ^ with;
        break;
    }
    bool own = mode == SHUFFLE_UP ? from < first : from > last; /* xor may reach lanes in front */
    shuffled mine = {value, 0, own ? lane : from};
    warp_meet(mask, &mine, shuffle_all, nullptr);
    return mine.result;
}

uint32_t reduce(reduce_mode mode, unsigned mask, uint32_t value, bool is_signed)
{
    reduced mine = {value, mode, is_signed, 0};
    warp_meet(mask, &mine, reduce_all, nullptr);
    return mine.result;
}

} // namespace emu

unsigned __ballot_sync(unsigned mask, int predicate)
{
    emu::balloted mine = {predicate, 0};
    emu::warp_meet(mask, &mine, emu::ballot_all, nullptr);
    return mine.result;
}

unsigned __match_any_sync(unsigned mask, uint64_t value)
{
    emu::matched mine = {value, 0};
    emu::warp_meet(mask, &mine, emu::match_all, nullptr);
    return mine.result;
}

void __syncwarp(unsigned mask)
{
    int present = 0;
    emu::warp_meet(mask, &present, emu::meet_only, nullptr);
}

void __syncthreads()
{
    emu::barrier(0, 0);
}

int __syncthreads_or(int predicate)
{
    static std::unordered_map<emu::block *, int> votes; /* zero whenever nobody votes */
    int &vote = votes[emu::current->block];
    vote |= predicate != 0;
    emu::barrier(0, 0);
    int any = vote;
    emu::barrier(0, 0); /* all have read it */
    vote = 0;
    emu::barrier(0, 0);
    return any;
}

void __trap()
{
    emu::fail("trap");
}

size_t __cvta_generic_to_shared(const void *p)
{
    size_t at = (size_t)((const char *)p - emu::shared_memory());
    if (at >= emu::shared_size())
        emu::fail("address %p is not in the block's shared memory", p);
    return at;
}
