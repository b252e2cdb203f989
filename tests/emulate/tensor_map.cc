#include "tests/emulate/tensor_map.h"

#include "tests/emulate/machine.h"

#include <string.h>

namespace emu
{

namespace
{

constexpr uint64_t MARK = 0x7e9504a9d0b6e1c3;
constexpr uint32_t ROW_BYTES = 128; /* of the swizzle */
constexpr uint32_t PIECE = 16;      /* bytes that stay together */

/* Pieces of 16 bytes change places within 128 bytes, by which 128 of 1024 these are. */
size_t swizzled(size_t at)
{
    return at ^ (at >> 3 & 0x70);
}

/* f(bytes from the start of a row, where it begins or NULL outside of the array, place in shared
 * memory before the swizzle) for the pieces of a box. */
template <class F> void each_piece(const tensor_map &m, box_position p, size_t offset, const F &f)
{
    if (offset % ROW_BYTES != 0)
        fail("a box at %zu of shared memory, not a multiple of %u", offset, ROW_BYTES);
    size_t at = offset;
    for (uint32_t i = 0; i < m.box[1] * m.box[2] * m.box[3]; i++) {
        const char *row = m.data;
        uint32_t left = i;
        for (int d = 1; d < 4; left /= m.box[d], d++) {
            int64_t place = (int64_t)p.at[d] + left % m.box[d];
            if (place < 0 || place >= (int64_t)m.sizes[d])
                row = nullptr;
            else if (row != nullptr)
                row += (uint64_t)place * m.strides[d - 1];
        }
        for (uint32_t x = 0; x < m.box[0] * m.number; x += PIECE, at += PIECE)
            f((int64_t)p.at[0] * m.number + x, row, at);
    }
}

} // namespace

tensor_map read_tensor_map(const void *map)
{
    static_assert(sizeof(tensor_map) <= sizeof(CUtensorMap), "place");
    if ((uintptr_t)map % 64 != 0)
        fail("a tensor map at %p, not a multiple of 64", map);
    tensor_map m;
    memcpy(&m, map, sizeof m);
    if (m.mark != MARK)
        fail("%p is no tensor map", map);
    return m;
}

void land_box(const tensor_map &m, box_position from, char *to, size_t offset)
{
    int64_t size = (int64_t)m.sizes[0] * m.number, step = m.number;
    each_piece(m, from, offset, [&](int64_t x, const char *row, size_t at) {
        char *piece = to - offset + swizzled(at);
        if (row != nullptr && x >= 0 && x + PIECE <= size) {
            memcpy(piece, row + x, PIECE);
            return;
        }
        memset(piece, 0, PIECE);
        for (int64_t i = 0; row != nullptr && i < PIECE; i += step)
            if (x + i >= 0 && x + i < size)
                memcpy(piece + i, row + x + i, (size_t)step);
    });
}

void take_box(const tensor_map &m, box_position to, const char *from, size_t offset, bool add)
{
    int64_t size = (int64_t)m.sizes[0] * m.number, step = m.number;
    if (add && step != sizeof(float))
        fail("a box of numbers of %d bytes to add", (int)step);
    each_piece(m, to, offset, [&](int64_t x, const char *row, size_t at) {
        const char *piece = from - offset + swizzled(at);
        for (int64_t i = 0; row != nullptr && i < PIECE; i += step)
            if (x + i >= 0 && x < size) { /* a piece is stored whole: past the row's end, too */
                char *there = const_cast<char *>(row) + x + i;
                if (add)
                    *(float *)there += *(const float *)(piece + i);
                else
                    memcpy(there, piece + i, (size_t)step);
            }
    });
}

} // namespace emu

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *data, const cuuint64_t *sizes, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill)
{
    bool bf16 = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    if ((!bf16 && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT32) || rank < 3 || rank > 4 ||
        interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle != CU_TENSOR_MAP_SWIZZLE_128B ||
        fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
        return CUDA_ERROR_NOT_SUPPORTED;
    emu::tensor_map m = {};
    m.number = bf16 ? 2 : 4;
    if ((uintptr_t)data % 16 != 0 || (uintptr_t)map % 64 != 0 ||
        box[0] * m.number > emu::ROW_BYTES || box[0] * m.number % emu::PIECE != 0)
        return CUDA_ERROR_INVALID_VALUE;
    m.mark = emu::MARK;
    m.data = (const char *)data;
    m.sizes[3] = m.box[3] = 1;
    for (cuuint32_t i = 0; i < rank; i++) {
        if (sizes[i] == 0 || sizes[i] > UINT64_C(1) << 32 || box[i] == 0 || box[i] > 256 ||
            steps[i] != 1)
            return CUDA_ERROR_INVALID_VALUE;
        m.sizes[i] = sizes[i];
        m.box[i] = box[i];
    }
    for (cuuint32_t i = 0; i < rank - 1; i++) {
        if (strides[i] % 16 != 0 || strides[i] >= UINT64_C(1) << 40)
            return CUDA_ERROR_INVALID_VALUE;
        m.strides[i] = strides[i];
    }
    memcpy(map, &m, sizeof m);
    return CUDA_SUCCESS;
}
