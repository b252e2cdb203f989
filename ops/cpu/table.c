/* The table of one instruction set: compiled once for each, like the op files that it names. */
#include "ops/cpu/cpu.h"
#include "ops/cpu/simd.h"

const qv_cpu_isa QV_ISA(qv_cpu_isa) = {
    .name = QV_SIMD_NAME,
    .ops =
        {
#define QV_OP_ENTRY(name, args) .name = QV_ISA(qv_cpu_##name),
            QV_OP_LIST(QV_OP_ENTRY)
#undef QV_OP_ENTRY
        },
};
