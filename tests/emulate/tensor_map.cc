#include "tests/emulate/tensor_map.h"

#include "tests/emulate/machine.h"

#include <string.h>

namespace emu
{

namespace
{

constexpr uint64_t MARK = 0x7e9504a9d0b6e1c3;
constexpr uint32_t ROW_BYTES = 128; /* of the swizzle */
constexpr uint32_t PIECE = 8;       /* numbers that stay together */

/* Pieces of 16 bytes change places within 128 bytes, by which 128 of 1024 these are. */
size_t swizzled(size_t at)
{
    return at ^ (at >> 3 & 0x70);
}

/* Numbers [x, x + PIECE) of a row. */
void land_piece(const tensor_map &m, const char *row, bool inside, int64_t x, char *to)
{
    int64_t size = (int64_t)m.sizes[0];
    if (inside && x >= 0 && x + PIECE <= size) {
        memcpy(to, row + 2 * x, 2 * PIECE);
        return;
    }
    memset(to, 0, 2 * PIECE);
    for (int64_t i = 0; inside && i < PIECE; i++)
        if (x + i >= 0 && x + i < size)
            memcpy(to + 2 * i, row + 2 * (x + i), 2);
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
    if (offset % ROW_BYTES != 0)
        fail("a box at %zu of shared memory, not a multiple of %u", offset, ROW_BYTES);
    size_t at = offset;
    for (int64_t z = from.z; z < (int64_t)from.z + m.box[2]; z++)
        for (int64_t y = from.y; y < (int64_t)from.y + m.box[1]; y++) {
            bool inside = z >= 0 && z < (int64_t)m.sizes[2] && y >= 0 && y < (int64_t)m.sizes[1];
            const char *row = m.data;
            if (inside)
                row += (uint64_t)z * m.strides[1] + (uint64_t)y * m.strides[0];
            for (uint32_t x = 0; x < m.box[0]; x += PIECE, at += 2 * PIECE)
                land_piece(m, row, inside, (int64_t)from.x + x, to - offset + swizzled(at));
        }
}

} // namespace emu

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *data, const cuuint64_t *sizes, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill)
{
    if (type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || rank != 3 ||
        interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle != CU_TENSOR_MAP_SWIZZLE_128B ||
        fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
        return CUDA_ERROR_NOT_SUPPORTED;
    if ((uintptr_t)data % 16 != 0 || (uintptr_t)map % 64 != 0 || box[0] * 2 > emu::ROW_BYTES ||
        box[0] % emu::PIECE != 0)
        return CUDA_ERROR_INVALID_VALUE;
    emu::tensor_map m = {};
    m.mark = emu::MARK;
    m.data = (const char *)data;
    for (int i = 0; i < 3; i++) {
        if (sizes[i] == 0 || sizes[i] > UINT64_C(1) << 32 || box[i] == 0 || box[i] > 256 ||
            steps[i] != 1)
            return CUDA_ERROR_INVALID_VALUE;
        m.sizes[i] = sizes[i];
        m.box[i] = box[i];
    }
    for (int i = 0; i < 2; i++) {
        if (strides[i] % 16 != 0 || strides[i] >= UINT64_C(1) << 40)
            return CUDA_ERROR_INVALID_VALUE;
        m.strides[i] = strides[i];
    }
    memcpy(map, &m, sizeof m);
    return CUDA_SUCCESS;
}
