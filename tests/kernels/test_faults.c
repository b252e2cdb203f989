/* That the emulated device shows mistakes: of kernels that forget one thing each, what is right
 * comes out only when nothing is forgotten.
 */
#include "tests/kernels/test_faults.h"

#include "common/dtype.h"

#include <criterion/criterion.h>
#include <cuda_runtime_api.h>
#include <signal.h>
#include <string.h>

enum { N = 128, ROW = 64, TIMES = 20 };

/* Whether i + 1 is at i. */
static bool runs_well(test_fault fault, bool has_it)
{
    static uint16_t rows[N * ROW];
    static float numbers[N];
    void *in, *out;
    for (int i = 0; i < N; i++)
        rows[i * ROW] = qv_f32_to_bf16((float)(i + 1));
    cr_assert_eq(cudaMalloc(&in, sizeof rows), cudaSuccess);
    cr_assert_eq(cudaMalloc(&out, sizeof numbers), cudaSuccess);
    cr_assert_eq(cudaMemcpy(in, rows, sizeof rows, cudaMemcpyHostToDevice), cudaSuccess);
    cr_assert_eq(test_with_fault(fault, has_it, in, out), QV_OK, "%s", qv_error());
    cr_assert_eq(cudaMemcpy(numbers, out, sizeof numbers, cudaMemcpyDeviceToHost), cudaSuccess);
    cr_assert_eq(cudaFree(in), cudaSuccess);
    cr_assert_eq(cudaFree(out), cudaSuccess);
    for (int i = 0; i < N; i++)
        if (numbers[i] != (float)(i + 1))
            return false;
    return true;
}

static const struct {
    test_fault fault;
    const char *name;
} faults[] = {
    {NO_BARRIER, "no __syncthreads()"},
    {NO_WARP_BARRIER, "no __syncwarp()"},
    {NO_COPY_WAIT, "no wait for cp.async"},
    {NO_FREE_STAGE, "a copy to where others still read"},
    {NO_BOX_WAIT, "no wait for the copy engine"},
    {NO_PRODUCT_WAIT, "no wait for wgmma"},
    {NO_OPERAND, "wgmma before its operand is there"},
};

Test(kernels_faults, are_seen_in_some_of_twenty_runs)
{
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        int well = 0, bad = 0;
        for (int n = 0; n < TIMES; n++) {
            well += runs_well(faults[i].fault, false);
            bad += !runs_well(faults[i].fault, true);
        }
        cr_expect_eq(well, TIMES, "without %s: right %d of %d times", faults[i].name, well, TIMES);
        cr_expect_gt(bad, 0, "%s: right each time", faults[i].name);
    }
}

Test(kernels_faults, a_deadlock_is_reported, .signal = SIGABRT)
{
    cr_assert(runs_well(NOT_ALL_ARRIVE, false));
    (void)runs_well(NOT_ALL_ARRIVE, true);
}
