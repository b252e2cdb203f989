#include "tests/emulate/wgmma.h"

#include "common/dtype.h"
#include "tests/emulate/machine.h"
#include "tests/emulate/thread_state.h"

#include <math.h>
#include <string.h>

namespace emu
{

namespace
{

constexpr int THREADS = 128, ROWS = 64, DEPTH = 16, MAX_COLS = 256;

/* --- Operands ----------------------------------------------------------------------------- */

/* The fields of a descriptor, in bytes. */
struct operand {
    size_t start, leading, stride;
};

operand decode(uint64_t descriptor)
{
    if (descriptor >> 62 != 1)
        fail("a descriptor of wgmma whose swizzle is not that of 128 bytes: %#llx",
             (unsigned long long)descriptor);
    operand o = {(descriptor & 0x3fff) << 4, (descriptor >> 16 & 0x3fff) << 4,
                 (descriptor >> 32 & 0x3fff) << 4};
    if (o.stride % 1024 != 0)
        fail("a descriptor of wgmma with units at multiples of %zu, not of 1024", o.stride);
    return o;
}

/* Eight numbers at `at` before the swizzle, to every `step`-th place of `to`. */
void read_piece(const char *shared, size_t size, size_t at, float *to, int step)
{
    at ^= at >> 3 & 0x70;
    if (at + 16 > size)
        fail("wgmma reads at %zu of %zu bytes of shared memory", at, size);
    uint16_t bits[8];
    memcpy(bits, shared + at, sizeof bits);
    for (int i = 0; i < 8; i++)
        to[i * step] = qv_bf16_to_f32(bits[i]);
}

/* An operand of `n` rows (or columns, of b) with 16 numbers each, which are beside each other, or,
 * `by_columns`, beside those of the same k. Number k of row i goes to m[i row_step + k k_step]. */
void read_operand(uint64_t descriptor, bool by_columns, int n, float *m, int row_step, int k_step)
{
    const operand o = decode(descriptor);
    const char *shared = shared_memory();
    const size_t size = shared_size();
    if (by_columns)
        for (int k = 0; k < DEPTH; k++)
            for (int row = 0; row < n; row += 8)
                read_piece(shared, size,
                           o.start + (size_t)(row / 64) * o.leading + (size_t)(k / 8) * o.stride +
                               (size_t)(k % 8) * 128 + (size_t)(row % 64) * 2,
                           m + row * row_step + k * k_step, row_step);
    else
        for (int row = 0; row < n; row++)
            for (int k = 0; k < DEPTH; k += 8)
                read_piece(shared, size,
                           o.start + (size_t)(row / 8) * o.stride + (size_t)(row % 8) * 128 +
                               (size_t)k * 2,
                           m + row * row_step + k * k_step, k_step);
}

/* --- Products ----------------------------------------------------------------------------- */

typedef thread_state::pending pending;

struct alignas(64) matrices {
    float a[ROWS][DEPTH], b[DEPTH][MAX_COLS], d[ROWS][MAX_COLS];
};

/* The sums of all threads to the matrix, from where `own_of` says they are, or from the matrix to
 * the accumulators. Of 8 columns a thread has two neighbours, in two rows. */
template <bool TO_MATRIX, typename F> void move_sums(void **threads, matrices &m, int n, F own_of)
{
    for (int thread = 0; thread < THREADS; thread++) {
        float *own = own_of(*(thread_state *)threads[thread]);
        float *d = &m.d[thread / 32 * 16 + thread % 32 / 4][thread % 4 * 2];
        for (int i = 0; i < n / 2; i += 4, d += 8)
            for (int k = 0; k < 4; k++) {
                float &cell = d[k / 2 * 8 * MAX_COLS + k % 2];
                if (TO_MATRIX)
                    cell = own[i + k];
                else
                    own[i + k] = cell;
            }
    }
}

void read_a_registers(void **threads, size_t i, matrices &m)
{
    for (int thread = 0; thread < THREADS; thread++) {
        const pending &p = ((thread_state *)threads[thread])->products[i];
        int row = thread / 32 * 16 + thread % 32 / 4, col = thread % 4 * 2;
        for (int j = 0; j < 4; j++) {
            float *to = &m.a[row + j % 2 * 8][col + j / 2 * 8];
            to[0] = qv_bf16_to_f32((uint16_t)p.a_registers[j]);
            to[1] = qv_bf16_to_f32((uint16_t)(p.a_registers[j] >> 16));
        }
    }
}

typedef float sixteen __attribute__((vector_size(64)));

sixteen &at(float *p)
{
    return *reinterpret_cast<sixteen *>(p);
}

/* d [64 x n] += a b, by 4 rows of 16 columns, which stay in registers. The products of BF16 numbers
 * are exact. */
void multiply_matrices(matrices &m, int n)
{
    for (int row = 0; row < ROWS; row += 4)
        for (int col = 0; col < n; col += 16) {
            sixteen sums[4];
            for (int i = 0; i < 4; i++)
                sums[i] = at(&m.d[row + i][col]);
            for (int k = 0; k < DEPTH; k++)
                for (int i = 0; i < 4; i++)
                    sums[i] += m.a[row + i][k] * at(&m.b[k][col]);
            for (int i = 0; i < 4; i++)
                at(&m.d[row + i][col]) = sums[i];
        }
}

bool is_same(const pending &p, const pending &q)
{
    return p.n == q.n && p.a == q.a && p.b == q.b && p.a_in_registers == q.a_in_registers &&
           p.a_by_columns == q.a_by_columns && p.b_by_columns == q.b_by_columns &&
           p.adds == q.adds && p.sums.size() == q.sums.size();
}

void need_agreement(void **threads, size_t n_products)
{
    const thread_state &first = *(const thread_state *)threads[0];
    for (int thread = 1; thread < THREADS; thread++) {
        const thread_state &other = *(const thread_state *)threads[thread];
        if (other.products.size() < n_products || other.groups != first.groups)
            fail("threads 0 and %d of a warpgroup have given different numbers of wgmma", thread);
        for (size_t i = 0; i < n_products; i++)
            if (!is_same(first.products[i], other.products[i]))
                fail("threads 0 and %d of a warpgroup have given different wgmma", thread);
    }
}

/* The first `n_products` of the warpgroup, in order. Sums stay in `m` from one product to the next
 * as long as these are for the same accumulators. */
void make_products(void **threads, size_t n_products)
{
    static matrices m; /* one host thread is in the machine */
    const std::vector<pending> &list = ((thread_state *)threads[0])->products;
    for (size_t i = 0; i < n_products; i++) {
        const pending &p = list[i];
        bool goes_on = i > 0 && list[i - 1].d == p.d;
        auto accumulators = [i](thread_state &t) { return t.products[i].d; };
        if (!p.adds)
            memset(m.d, 0, sizeof m.d);
        else if (!p.sums.empty())
            move_sums<true>(threads, m, p.n,
                            [i](thread_state &t) { return t.products[i].sums.data(); });
        else if (!goes_on)
            move_sums<true>(threads, m, p.n, accumulators);
        if (p.a_in_registers)
            read_a_registers(threads, i, m);
        else
            read_operand(p.a, p.a_by_columns, ROWS, m.a[0], DEPTH, 1);
        read_operand(p.b, p.b_by_columns, p.n, m.b[0], 1, MAX_COLS);
        multiply_matrices(m, p.n);
        if (i + 1 == n_products || list[i + 1].d != p.d)
            move_sums<false>(threads, m, p.n, accumulators);
    }
    for (int thread = 0; thread < THREADS; thread++) {
        std::vector<pending> &own = ((thread_state *)threads[thread])->products;
        own.erase(own.begin(), own.begin() + (ptrdiff_t)n_products);
    }
}

void need_all(void **threads, const char *what)
{
    for (int thread = 0; thread < THREADS; thread++)
        if (threads[thread] == nullptr)
            fail("%s without thread %d of the warpgroup", what, thread);
}

/* All groups that have ended, or none. */
void commit_all(void **threads, void *)
{
    need_all(threads, "wgmma.commit_group");
    const thread_state &first = *(const thread_state *)threads[0];
    need_agreement(threads, first.products.size());
    if (chance(2))
        return;
    make_products(threads, first.products.size());
    for (int thread = 0; thread < THREADS; thread++)
        for (size_t &group : ((thread_state *)threads[thread])->groups)
            group = 0;
}

/* All but the last *(int *)ctx groups. */
void wait_all(void **threads, void *ctx)
{
    need_all(threads, "wgmma.wait_group");
    const std::deque<size_t> groups = ((thread_state *)threads[0])->groups;
    size_t n_groups = 0, n_products = 0;
    while (n_groups + (size_t) * (int *)ctx < groups.size())
        n_products += groups[n_groups++];
    need_agreement(threads, n_products);
    make_products(threads, n_products);
    for (int thread = 0; thread < THREADS; thread++) {
        std::deque<size_t> &own = ((thread_state *)threads[thread])->groups;
        own.erase(own.begin(), own.begin() + (ptrdiff_t)n_groups);
    }
}

} // namespace

void multiply(const product &given)
{
    thread_state &s = own_state();
    if (!s.fenced)
        fail("wgmma before any wgmma.fence");
    pending p;
    (product &)p = given;
    bool is_new = true;
    for (const pending &earlier : s.products)
        is_new = is_new && earlier.d != p.d;
    if (is_new) {
        p.sums.assign(p.d, p.d + p.n / 2);
        for (int j = 0; j < p.n / 2; j++)
            p.d[j] = NAN;
    }
    s.products.push_back(std::move(p));
}

void products_begin()
{
    own_state().fenced = true;
}

void products_commit()
{
    thread_state &s = own_state();
    size_t in_groups = 0;
    for (size_t group : s.groups)
        in_groups += group;
    s.groups.push_back(s.products.size() - in_groups);
    group_meet(&s, commit_all, nullptr);
}

void products_wait(int n)
{
    thread_state &s = own_state();
    group_meet(&s, wait_all, &n);
}

} // namespace emu
