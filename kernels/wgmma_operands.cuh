/* Registers of wgmma's accumulators in inline assembly: their names, and d[] as operands, for
 * products of so many columns. What comes behind them is numbered from half as many on.
 */
#ifndef QV_KERNELS_WGMMA_OPERANDS_CUH
#define QV_KERNELS_WGMMA_OPERANDS_CUH

/* clang-format off */
#define QV_NAMES_16  "%0, %1, %2, %3, %4, %5, %6, %7"
#define QV_NAMES_32  QV_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QV_NAMES_48  QV_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define QV_NAMES_64  QV_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define QV_NAMES_72  QV_NAMES_64 ", %32, %33, %34, %35"
#define QV_NAMES_80  QV_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define QV_NAMES_88  QV_NAMES_80 ", %40, %41, %42, %43"
#define QV_NAMES_96  QV_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define QV_NAMES_104 QV_NAMES_96 ", %48, %49, %50, %51"
#define QV_NAMES_112 QV_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define QV_NAMES_120 QV_NAMES_112 ", %56, %57, %58, %59"
#define QV_NAMES_128 QV_NAMES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define QV_NAMES_136 QV_NAMES_128 ", %64, %65, %66, %67"
#define QV_NAMES_144 QV_NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define QV_NAMES_160 QV_NAMES_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define QV_NAMES_176 QV_NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define QV_NAMES_192 QV_NAMES_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define QV_NAMES_208 QV_NAMES_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define QV_NAMES_224 QV_NAMES_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define QV_NAMES_240 QV_NAMES_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define QV_NAMES_256 QV_NAMES_240 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define QV_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QV_EIGHT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
    "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define QV_CELLS_16  QV_EIGHT(0)
#define QV_CELLS_32  QV_CELLS_16, QV_EIGHT(8)
#define QV_CELLS_48  QV_CELLS_32, QV_EIGHT(16)
#define QV_CELLS_64  QV_CELLS_48, QV_EIGHT(24)
#define QV_CELLS_72  QV_CELLS_64, QV_FOUR(32)
#define QV_CELLS_80  QV_CELLS_64, QV_EIGHT(32)
#define QV_CELLS_88  QV_CELLS_80, QV_FOUR(40)
#define QV_CELLS_96  QV_CELLS_80, QV_EIGHT(40)
#define QV_CELLS_104 QV_CELLS_96, QV_FOUR(48)
#define QV_CELLS_112 QV_CELLS_96, QV_EIGHT(48)
#define QV_CELLS_120 QV_CELLS_112, QV_FOUR(56)
#define QV_CELLS_128 QV_CELLS_112, QV_EIGHT(56)
#define QV_CELLS_136 QV_CELLS_128, QV_FOUR(64)
#define QV_CELLS_144 QV_CELLS_128, QV_EIGHT(64)
#define QV_CELLS_160 QV_CELLS_144, QV_EIGHT(72)
#define QV_CELLS_176 QV_CELLS_160, QV_EIGHT(80)
#define QV_CELLS_192 QV_CELLS_176, QV_EIGHT(88)
#define QV_CELLS_208 QV_CELLS_192, QV_EIGHT(96)
#define QV_CELLS_224 QV_CELLS_208, QV_EIGHT(104)
#define QV_CELLS_240 QV_CELLS_224, QV_EIGHT(112)
#define QV_CELLS_256 QV_CELLS_240, QV_EIGHT(120)
/* clang-format on */

#endif
