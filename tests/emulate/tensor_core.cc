/* Fragments to matrices and back. Lane l has g = l / 4 and t = l % 4; of an accumulator [16][8] it
 * has rows g and g + 8, columns 2 t and 2 t + 1; of a [16][16] the same rows, and columns 2 t,
 * 2 t + 1 and those 8 further on; of b [16][8] column g and the same of its rows.
 */
#include "tests/emulate/tensor_core.h"

#include "common/dtype.h"
#include "tests/emulate/machine.h"

namespace emu
{

namespace
{

constexpr unsigned ALL = 0xffffffffu;

float low(uint32_t pair)
{
    return qv_f32_from_bits(pair << 16);
}

float high(uint32_t pair)
{
    return qv_f32_from_bits(pair & 0xffff0000u);
}

void need_all(void **lanes, const char *what)
{
    for (int lane = 0; lane < 32; lane++)
        if (lanes[lane] == nullptr)
            fail("%s without lane %d of the warp", what, lane);
}

typedef float eight __attribute__((vector_size(32)));

struct tile_product {
    float *c;
    const uint32_t *a;
    uint32_t b[2];
};

void multiply_all(void **lanes, void *)
{
    need_all(lanes, "mma");
    float a[16][16];
    eight b[16], c[16]; /* by rows */
    for (int lane = 0; lane < 32; lane++) {
        const tile_product &p = *(const tile_product *)lanes[lane];
        int g = lane / 4, t2 = lane % 4 * 2;
        for (int i = 0; i < 4; i++) {
            int row = g + i % 2 * 8, col = t2 + i / 2 * 8;
            a[row][col] = low(p.a[i]);
            a[row][col + 1] = high(p.a[i]);
        }
        for (int i = 0; i < 2; i++) {
            b[t2 + i * 8][g] = low(p.b[i]);
            b[t2 + i * 8 + 1][g] = high(p.b[i]);
        }
        for (int i = 0; i < 4; i++)
            c[g + i / 2 * 8][t2 + i % 2] = p.c[i];
    }
    for (int row = 0; row < 16; row++) {
        eight sums = c[row];
        for (int k = 0; k < 16; k++)
            sums += a[row][k] * b[k]; /* exact products */
        c[row] = sums;
    }
    for (int lane = 0; lane < 32; lane++) {
        const tile_product &p = *(const tile_product *)lanes[lane];
        int g = lane / 4, t2 = lane % 4 * 2;
        for (int i = 0; i < 4; i++)
            p.c[i] = c[g + i / 2 * 8][t2 + i % 2];
    }
}

struct tile_move {
    uint16_t *row; /* [8], of tile lane / 8 */
    uint32_t *fragments;
    bool transposed;
};

/* move(fragment, first, second): for each lane's fragment of each tile, and where its two numbers
 * are in shared memory. */
template <typename F> void each_pair(void **lanes, const char *what, const F &move)
{
    need_all(lanes, what);
    for (int lane = 0; lane < 32; lane++) {
        const tile_move &mine = *(const tile_move *)lanes[lane];
        int g = lane / 4, t2 = lane % 4 * 2;
        for (int tile = 0; tile < 4; tile++) {
            auto row = [&](int i) { return ((const tile_move *)lanes[tile * 8 + i])->row; };
            if (mine.transposed)
                move(mine.fragments[tile], row(t2)[g], row(t2 + 1)[g]);
            else
                move(mine.fragments[tile], row(g)[t2], row(g)[t2 + 1]);
        }
    }
}

void load_all(void **lanes, void *)
{
    each_pair(lanes, "ldmatrix", [](uint32_t &fragment, uint16_t first, uint16_t second) {
        fragment = first | (uint32_t)second << 16;
    });
}

void store_all(void **lanes, void *)
{
    each_pair(lanes, "stmatrix", [](uint32_t fragment, uint16_t &first, uint16_t &second) {
        first = (uint16_t)fragment;
        second = (uint16_t)(fragment >> 16);
    });
}

tile_move move_of(const void *row, const uint32_t *fragments, bool transposed, const char *what)
{
    size_t at = (size_t)((const char *)row - shared_memory());
    if (at >= shared_size() || at + 16 > shared_size())
        fail("%s: %p is not in the block's shared memory", what, row);
    if (at % 16 != 0)
        fail("%s: a row at %zu of shared memory, not a multiple of 16", what, at);
    return {(uint16_t *)const_cast<void *>(row), const_cast<uint32_t *>(fragments), transposed};
}

} // namespace

void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    tile_product mine = {c, a, {b0, b1}};
    warp_meet(ALL, &mine, multiply_all, nullptr);
}

void load_tiles(uint32_t (&r)[4], const void *row, bool transposed)
{
    tile_move mine = move_of(row, r, transposed, "ldmatrix");
    warp_meet(ALL, &mine, load_all, nullptr);
}

void store_tiles(void *row, const uint32_t (&r)[4], bool transposed)
{
    tile_move mine = move_of(row, r, transposed, "stmatrix");
    warp_meet(ALL, &mine, store_all, nullptr);
}

} // namespace emu
