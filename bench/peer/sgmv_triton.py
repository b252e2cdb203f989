"""Times our SGMV (bench_kernels lora) beside the Triton kernels of SGLang at the same shapes, in one run.

  sgmv_triton.py --sglang WHEEL_OR_FOLDER --bench BENCH_KERNELS [--only TEXT]

SGLANG is its wheel (pip download --no-deps sglang) or a folder that holds the package; only the kernels of
sglang/kernels/ops/lora/dense are loaded. SGLang has two backends for adapters: `triton` (sgemm_lora_a, qkv_lora_b,
sgemm_lora_b) and `csgmv` (chunked shrink and expand). Both are timed with one segment per adapter, which favours
them, and the faster one counts. Each does what ours does: shrink x by the A of every plane, expand into y, added to
what is there. Numbers are BF16, ranks those of the row, pools as large as the rank needs. Times are medians of
replays of CUDA graphs of many launches, which go round over copies of the factors, more than the L2 cache holds.
"""

import argparse
import atexit
import importlib
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import types
import zipfile

import torch

ROTATE_BYTES = 256e6
SHAPES = {  # name in bench_kernels: (inputs, output rows of each plane)
    "4B gdn in": (2560, [8192, 4096, 32, 32]),
    "4B gate_up": (2560, [9216, 9216]),
    "4B down": (9216, [2560]),
    "35B gdn in": (2048, [8192, 4096, 32, 32]),
}
ROW = re.compile(r"^(.+), (\d+) tokens, (\d+) adapters, rank (\d+) of (\d+) +(.*)$")


# --- The peer's kernels -------------------------------------------------------------------------


def load_peer(where):
    """The modules of the dense kernels, without the rest of the package."""
    root = pathlib.Path(where)
    if root.is_file():
        folder = tempfile.mkdtemp(prefix="sglang-")  # Triton reads the sources until the end
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        with zipfile.ZipFile(root) as wheel:
            for name in wheel.namelist():
                if name.startswith("sglang/kernels/ops/lora/dense/"):
                    wheel.extract(name, folder)
        root = pathlib.Path(folder)
    for name in ["", ".kernels", ".kernels.ops", ".kernels.ops.lora", ".kernels.ops.lora.dense", ".srt", ".srt.lora"]:
        package = types.ModuleType("sglang" + name)
        package.__path__ = [str(root / ("sglang" + name).replace(".", "/"))]
        sys.modules["sglang" + name] = package

    class Unset:
        def __getattr__(self, name):
            return types.SimpleNamespace(get=lambda: False)

    def stand_in(name, **content):
        sys.modules[name] = types.SimpleNamespace(**content)

    stand_in("sglang.srt.environ", envs=Unset())
    stand_in("sglang.srt.lora.utils", LoRABatchInfo=object)
    stand_in(
        "sglang.srt.utils",
        cached_triton_kernel=lambda key: lambda kernel: kernel,
        get_device_name=lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    )
    dense = "sglang.kernels.ops.lora.dense."
    return types.SimpleNamespace(
        shrink=importlib.import_module(dense + "sgemm_lora_a").sgemm_lora_a_fwd,
        expand=importlib.import_module(dense + "sgemm_lora_b").sgemm_lora_b_fwd,
        expand_slices=importlib.import_module(dense + "qkv_lora_b").qkv_lora_b_fwd,
        chunk_shrink=importlib.import_module(dense + "chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward,
        chunk_expand=importlib.import_module(dense + "chunked_sgmv_expand").chunked_sgmv_lora_expand_forward,
    )


class Case:
    """One row: tokens shared out evenly over adapters, in the order of the adapters."""

    dtype = torch.bfloat16

    def __init__(self, shape, tokens, adapters, rank, device, max_copies=64):
        self.n_in, self.rows = SHAPES[shape]
        self.tokens, self.adapters, self.rank, self.device = tokens, adapters, rank, device
        self.planes, n_out = len(self.rows), sum(self.rows)
        per_copy = 2 * adapters * rank * (self.planes * self.n_in + n_out)
        self.copies = min(max(1, int(ROTATE_BYTES // per_copy) + 1), max_copies)

        def numbers(*size):
            return torch.randn(*size, device=device, dtype=torch.float32).mul_(0.1).to(self.dtype)

        self.a = [numbers(adapters, self.planes * rank, self.n_in) for _ in range(self.copies)]
        self.b = [numbers(adapters, n_out, rank) for _ in range(self.copies)]
        self.x, self.y = numbers(tokens, self.n_in), numbers(tokens, n_out)
        ends = torch.tensor(self.rows).cumsum(0).tolist()
        self.offsets = torch.tensor([0, *ends], dtype=torch.int32, device=device)
        self.offsets_cpu = torch.tensor([0, *ends], dtype=torch.int32)
        self.starts = [tokens * i // adapters for i in range(adapters + 1)]

    def batch(self, starts, slots, longest, permuted):
        def ints(values, dtype=torch.int32):
            return torch.tensor(values, dtype=dtype, device=self.device)

        lens = [b - a for a, b in zip(starts, starts[1:])]
        return types.SimpleNamespace(
            use_cuda_graph=False,
            bs=len(slots),
            num_segments=len(slots),
            seg_indptr=ints(starts),
            seg_lens=ints(lens),
            weight_indices=ints(slots),
            lora_ranks=ints([self.rank] * self.adapters),
            scalings=torch.ones(self.adapters, device=self.device),
            max_len=longest,
            permutation=ints(list(range(self.tokens))) if permuted else None,
        )

    def segments(self):
        longest = max(b - a for a, b in zip(self.starts, self.starts[1:]))
        return self.batch(self.starts, list(range(self.adapters)), longest, False)

    def chunks(self):
        size = 128 if self.tokens >= 256 else 32 if self.tokens >= 64 else 16  # as its backend chooses
        starts, slots = [0], []
        for slot, (begin, end) in enumerate(zip(self.starts, self.starts[1:])):
            for at in range(begin, end, size):
                starts.append(min(at + size, end))
                slots.append(slot)
        return self.batch(starts, slots, size, True)

    def run_triton(self, peer, batch, copy):
        inner = peer.shrink(self.x, self.a[copy], batch, self.planes)
        if self.planes == 1:
            peer.expand(inner, self.b[copy], batch, self.y)
        else:
            most = max(self.rows)
            peer.expand_slices(inner, self.b[copy], batch, self.offsets, most, self.y, n_slices=self.planes)

    def run_chunked(self, peer, batch, copy):
        inner = peer.chunk_shrink(self.x, self.a[copy], batch, self.planes)
        most = max(self.rows)
        peer.chunk_expand(inner, self.b[copy], batch, self.offsets, most, self.y, self.offsets_cpu)

    def expected(self, y):
        """What both should leave in y, from float32 products of each adapter's tokens."""
        y = y.float().clone()
        for slot, (begin, end) in enumerate(zip(self.starts, self.starts[1:])):
            inner = (self.x[begin:end].float() @ self.a[0][slot].float().T).to(self.dtype).float()
            row = 0
            for plane, rows in enumerate(self.rows):
                part = inner[:, plane * self.rank : (plane + 1) * self.rank]
                y[begin:end, row : row + rows] += part @ self.b[0][slot, row : row + rows].float().T
                row += rows
        return y

    def check(self, run, peer, batch):
        """The largest difference to `expected`, over the largest number."""
        before = self.y.clone()
        run(peer, batch, 0)
        want = self.expected(before)
        worst = (self.y.float() - want).abs().max().item() / want.abs().max().item()
        self.y.copy_(before)
        return worst


def time_us(launch, copies):
    """Microseconds of one launch: median over replays of a graph of one round and more."""
    stream, n = torch.cuda.Stream(), max(20, copies)
    with torch.cuda.stream(stream):
        for copy in range(copies):
            launch(copy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(n):
            launch(i % copies)
    times = []
    for _ in range(8):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / n)
    return statistics.median(times[1:])


# --- The table ----------------------------------------------------------------------------------


def our_rows(bench):
    """(shape, tokens, adapters, rank, floor us, us) of each row that bench_kernels prints."""
    text = subprocess.run([bench, "lora"], check=True, stdout=subprocess.PIPE, text=True).stdout
    for line in text.splitlines():
        if m := ROW.match(line):
            numbers = m[6].split()
            yield m[1], int(m[2]), int(m[3]), int(m[4]), float(numbers[2]), float(numbers[3])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang", required=True, help="its wheel, or a folder that holds the package")
    parser.add_argument("--bench", required=True, help="our bench_kernels")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("sgmv_triton.py: no device that can be used")
    peer = load_peer(args.sglang)
    print(f"{torch.cuda.get_device_name()}; us; ratio: the peer's faster one over ours")
    print(f"{'':52} {'floor':>8} {'ours':>8} {'triton':>8} {'csgmv':>8} {'ratio':>6}")
    ratios = []
    for shape, tokens, adapters, rank, floor, ours in our_rows(args.bench):
        name = f"{shape}, {tokens} tokens, {adapters} adapters, rank {rank}"
        if args.only not in name:
            continue
        case, theirs = Case(shape, tokens, adapters, rank, "cuda"), []
        for run, batch in [(case.run_triton, case.segments()), (case.run_chunked, case.chunks())]:
            try:
                if (worst := case.check(run, peer, batch)) > 0.02:
                    raise ValueError(f"wrong by {worst:.2g}")
                theirs.append(time_us(lambda copy: run(peer, batch, copy), case.copies))
            except Exception as error:  # one backend that cannot do a shape leaves the other
                print(f"  {name}: {run.__name__}: {error}", file=sys.stderr)
                theirs.append(float("inf"))
        ratios.append(min(theirs) / ours)
        print(f"{name:52} {floor:8.2f} {ours:8.2f} {theirs[0]:8.2f} {theirs[1]:8.2f} {ratios[-1]:6.2f}", flush=True)
    if ratios:
        print(f"ours is faster in {sum(r > 1 for r in ratios)} of {len(ratios)}; median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
