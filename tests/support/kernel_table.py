"""Compiles the Triton kernels for GPUs that need not be here, and counts what they would do there.

    python tests/support/kernel_table.py [--quick] [--float32] [--json] [--markdown FILE] [--chip 90] [--registers 128]
    python tests/support/kernel_table.py --shapes "H1 stage 1" --chip 100 --tiles queries=64 keys=64 warps=4

For every shape that the models have: registers a thread, bytes of stack a thread (where registers are spilled to),
shared memory of a program, programs that fit on a multiprocessor; and, counted in the machine code, barriers, fences
and instructions a tile, loops weighted by their mean number of iterations on that map. Nothing is run and nothing is
timed: the time is predicted from the counts, with `CHIPS`, `ISSUE` and `ISSUE_OF_A_WARP`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_halonet.ops import triton_kernels, triton_plan
from timm_halonet.ops.options import Options
from timm_halonet.ops.triton import fold_tile, plan
from timm_halonet.ops.triton_plan import products_of

BATCH = 128
# Share of cycles in which a scheduler issues an instruction: by the number of its warps, as measured on an H200 (see
# docs/backends/kernels.md), and the most, which is assumed.
ISSUE_OF_A_WARP, ISSUE = 0.145, 0.6


class Chip(NamedTuple):
    shared: int  # bytes, the most that a program may have
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second
    flops: float  # dense 16-bit FLOP a second


CHIPS = {  # A100, H100 and B200 as their vendor states them
    80: Chip(163 << 10, 108, 1.41e9, 2.0e12, 312e12),
    90: Chip(227 << 10, 132, 1.98e9, 3.35e12, 989e12),
    100: Chip(227 << 10, 148, 1.85e9, 8.0e12, 2250e12),
}


class Shape(NamedTuple):
    name: str
    block: int
    halo: int
    stride: int
    dim: int
    dim_v: int
    heads: int
    side: int  # of the key map
    ring: bool = False  # mask_border=False


SHAPES = [  # the first four are the quick ones
    Shape("H1 stage 1", 8, 3, 1, 16, 16, 4, 64),
    Shape("H1 stage 3", 8, 3, 1, 32, 32, 8, 16),
    Shape("H5 stage 1", 14, 2, 1, 16, 40, 4, 112),
    Shape("H4 stage 1", 12, 2, 1, 16, 16, 4, 96),
    Shape("H1 stage 2, first", 8, 3, 2, 16, 16, 8, 64),
    Shape("H1 stage 2", 8, 3, 1, 16, 16, 8, 32),
    Shape("H1 stage 4", 8, 3, 1, 64, 64, 8, 8),
    Shape("H3 stage 1", 10, 3, 1, 16, 16, 4, 80),
    Shape("H6 stage 1", 8, 4, 1, 16, 48, 4, 128),
    Shape("H7 stage 1", 10, 3, 1, 16, 64, 4, 150),
    Shape("H7 stage 3", 10, 3, 1, 32, 128, 8, 38),
    Shape("timm halonet_h1 stage 1", 8, 3, 1, 8, 8, 8, 64, True),
    Shape("timm halonet26t", 8, 2, 1, 16, 32, 8, 32, True),
    Shape("timm halonet26t, first", 8, 2, 2, 16, 64, 8, 32, True),
    Shape("timm haloregnetz_b", 7, 3, 1, 24, 24, 6, 28, True),
    Shape("detection, block 32", 32, 3, 1, 64, 64, 4, 64),
]
POINTERS = ["q", "k", "v", "out", "kept", "grad", "dq", "window_kv", "dk", "dv"]
FLOATS = ["rel_h", "rel_w", "saved", "partial", "d_rel_h", "d_rel_w"]
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def options_of(shape: Shape) -> Options:
    scale = shape.dim**-0.5
    return Options(shape.block, shape.halo, shape.stride, scale, False, not shape.ring, shape.stride)


def _tool(name: str) -> str:
    return str(next(Path(triton.__file__).parent.rglob(f"bin/{name}")))


def _compiled(name: str, dtype: torch.dtype, meta: dict, chip: int, **options: int):
    kernel = getattr(triton_kernels, f"{name}_kernel")
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in meta:
            signature[argument] = "constexpr"
        elif argument in POINTERS + FLOATS:
            signature[argument] = "*" + (TYPES[dtype] if argument in POINTERS else "fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:  # sizes and strides are not specialised
            signature[argument] = "fp32" if "scale" in argument or "factor" in argument else "i32"
    constants = {(i,): meta[x] for i, x in enumerate(kernel.arg_names) if x in meta}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", chip, 32),
        options=dict(options, enable_fp_fusion=True),
    )


class Counts(NamedTuple):
    """Of one program's warp, in the machine code; an entry for each depth of loops."""

    instructions: list[int]
    barriers: list[int]
    fences: list[int]
    loads16: list[int]  # of 16 bits, from global memory


def count(assembly: str) -> Counts:
    """Counts what stands in `nvdisasm -c`'s listing, by the number of loops around it."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if found := re.match(r"\s*(\.L_\w+):", line):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
    loops: dict[int, int] = {}  # first -> last instruction
    for i, text in enumerate(instructions):
        found = re.search(r"\bBRA\b.*?(\.L_\w+)", text)
        if found and labels[found[1]] < i:
            loops[labels[found[1]]] = i
    depths = [sum(first <= i <= last for first, last in loops.items()) for i in range(len(instructions))]

    def by_depth(pattern: str) -> list[int]:
        found = [0] * (max(depths) + 1)
        for text, depth in zip(instructions, depths, strict=True):
            found[depth] += bool(re.search(pattern, text)) and not re.search(r"\bNOP\b", text)
        return found

    return Counts(*map(by_depth, ("", r"\bBAR\.(SYNC|RED)", r"\b(FENCE|MEMBAR)", r"\bLDG\.E\.U16")))


def _disassembled(cubin: bytes) -> tuple[Counts, int, int]:
    """Counts, registers a thread, bytes of stack a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True)
        usage = subprocess.run([_tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True)
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout))
    return count(listing.stdout), int(found["REG"]), int(found["STACK"])


def _windows(shape: Shape) -> list[int]:
    """Keys of each block's window along one dimension."""
    ring = shape.halo if shape.ring else 0
    starts = range(0, shape.side, shape.block)
    return [
        min(x + shape.block + shape.halo, shape.side + ring) - max(x - shape.halo, -ring) for x in starts
    ]  # fmt: skip


def roofline(shape: Shape, kernel: str, itemsize: int, chip: Chip) -> float:
    """The least seconds for a batch: every key read once, the keys that exist, one launch of nothing else."""
    keys = sum(_windows(shape)) ** 2 / len(_windows(shape)) ** 2  # of a window, on average
    grid = -(-shape.side // shape.stride)
    queries, pixels = BATCH * shape.heads * grid**2, BATCH * shape.heads * shape.side**2
    pairs, both = queries * keys, shape.dim + shape.dim_v
    maps = queries * both + pixels * both  # q and out, k and v
    if kernel == "forward":
        flops, traffic, exponentials = 2 * pairs * both, maps, pairs
    elif kernel == "backward":  # logits and weights again, and four products; the gradients as well
        flops, traffic, exponentials = 2 * pairs * (3 * shape.dim + 2 * shape.dim_v), 2 * maps, pairs
    else:
        return 0.0  # part of the backward, which needs none in principle
    rate = 16 * chip.multiprocessors * chip.clock
    return max(flops / chip.flops, traffic * itemsize / chip.bandwidth, exponentials / rate)


def compile_kernel(name: str, dtype: torch.dtype, shape: Shape, precision: str, chip: int, registers: int = 0) -> dict:
    """Compile one kernel, with at most so many registers a thread, and return its row of the table."""
    size = (shape.side, shape.side)
    options, products = options_of(shape), products_of(chip // 10)
    tiles = plan(dtype, shape.dim, shape.dim_v, size, options, name != "forward", precision, products=products)
    pixels, channels, chunks = fold_tile(shape.heads, shape.dim, shape.dim_v, True)
    align = 8 if dtype != torch.float32 else 4
    meta = dict(
        tiles.meta,
        P=pixels,
        CHANNELS=channels,
        PACKED=True if name == "fold" else 3 if shape.stride == 1 else 2,
        KEEP=False,
        ALIGN=align,
        WIDE=False,
    )
    warps = 4 if name == "fold" else tiles.num_warps
    most = dict(maxnreg=registers) if registers else {}
    compiled = _compiled(name, dtype, meta, chip, num_warps=warps, num_stages=tiles.num_stages, **most)
    counts, registers, stack = _disassembled(compiled.asm["cubin"])
    windows = _windows(shape)
    steps = sum(-(-x // meta["R"]) for x in windows) / len(windows)
    # the forward's loop is over keys, the backward's over tiles and keys; what is outside of it is once a program
    weights = {"forward": [1, steps], "backward": [0, 1, steps], "fold": [1, meta["PARTS"]]}[name]

    def a_tile(numbers: list[int]) -> float:
        return sum(n * weights[min(i, len(weights) - 1)] for i, n in enumerate(numbers))

    facts = CHIPS[chip]
    instructions = a_tile(counts.instructions)
    blocks = len(windows) ** 2
    if name == "fold":
        launched = BATCH * -(-(shape.side**2) // pixels) * chunks
    else:
        launched = BATCH * shape.heads * blocks * meta["PARTS"]
    programs = _programs(registers, warps, compiled.metadata.shared, facts)
    issue = min(ISSUE, ISSUE_OF_A_WARP * programs * warps / 4)
    seconds = launched * instructions * warps / (facts.multiprocessors * 4 * facts.clock * issue)
    least = roofline(shape, name, dtype.itemsize, facts)
    return dict(
        shape=shape.name, kernel=name, dtype=TYPES[dtype], precision=precision, chip=chip, M=meta["M"],
        parts=meta["PARTS"], keys=f"{meta['R']}x{meta['C']}", steps=round(steps, 2), warps=warps,
        shared=compiled.metadata.shared, shared_limit=facts.shared, registers=registers, stack=stack,
        programs=programs,
        barriers=round(a_tile(counts.barriers), 1), fences=round(a_tile(counts.fences), 1),
        instructions=round(instructions), loop_loads16=counts.loads16[-1], useful=round(tiles.useful, 3),
        useful_queries=round(_useful_queries(shape, meta), 3),
        microseconds=round(seconds * 1e6, 1), roofline=round(least * 1e6, 1),
    )  # fmt: skip


def _useful_queries(shape: Shape, meta: dict) -> float:
    return min(shape.side, shape.block // shape.stride) ** 2 / (meta["PARTS"] * meta["M"])


def _programs(registers: int, warps: int, shared: int, chip: Chip) -> int:
    """Programs that one multiprocessor holds at a time."""
    return min(65536 // (-(-registers // 8) * 8 * 32 * warps), 64 // warps, (chip.shared + 1024) // (shared + 1024))


def rows(shapes: list[Shape], chips: list[int], float32: bool = False, most: int = 0):
    """Yields the table's rows."""
    for shape in shapes:
        kinds = [(torch.bfloat16, "ieee")]  # float16 is like it
        if float32:
            kinds += [(torch.float32, "tf32"), (torch.float32, "ieee")]
        for dtype, precision in kinds:
            for name in ("forward", "backward", "fold"):
                for chip in chips:
                    yield compile_kernel(name, dtype, shape, precision, chip, most)


def markdown(table: list[dict]) -> list[str]:
    """The lines of a table with a column for each chip."""
    chips = sorted({row["chip"] for row in table})
    lines = [
        "| shape, dtype | kernel | tile, warps, useful | " + " | ".join(f"sm_{k}" for k in chips) + " |",
        "|---|---|---|" + "---|" * len(chips),
    ]
    for i in range(0, len(table), len(chips)):
        group = table[i : i + len(chips)]
        x = group[0]
        dtype = x["dtype"] + (f" {x['precision']}" if x["dtype"] == "fp32" else "")
        cells = [(f"{_tile(y)}: " if _tile(y) != _tile(x) else "") + _cell(y) for y in group]
        lines.append(f"| {x['shape']}, {dtype} | {x['kernel']} | {_tile(x)} | {' | '.join(cells)} |")
    return lines


def _tile(x: dict) -> str:
    if x["kernel"] == "fold":
        return "4"
    return f"{x['parts']} x {x['M']} x {x['keys']}, {x['warps']}, {x['useful']:.0%} ({x['useful_queries']:.0%})"


def _cell(x: dict) -> str:
    text = f"**{x['instructions']}**, {x['barriers']:.0f} / {x['fences']:.0f}; {x['registers']} / {x['stack']}, "
    text += f"{x['shared'] / 1024:.0f} KiB, {x['programs']}; {x['microseconds']:.0f} us"
    return text + (f" ({x['roofline'] / x['microseconds']:.0%})" if x["roofline"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="bfloat16, four shapes")
    parser.add_argument("--float32", action="store_true", help="as well, in TF32 and exactly")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there, between its two marks")
    parser.add_argument("--chip", type=int, nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument(
        "--registers", type=int, default=0, metavar="N", help="a thread's most (default: the compiler's)"
    )
    parser.add_argument("--shapes", nargs="+", choices=[x.name for x in SHAPES], metavar="NAME", help="these only")
    parser.add_argument(
        "--tiles", nargs="+", default=[], metavar="FIELD=N", help="of triton_plan.Limits, in place of what it chooses"
    )
    args = parser.parse_args()
    changes = {name: int(x) for name, x in (change.split("=") for change in args.tiles)}
    if unknown := set(changes) - set(triton_plan.Limits._fields):
        parser.error(f"--tiles: {', '.join(sorted(unknown))}: known are {', '.join(triton_plan.Limits._fields)}")
    chosen = triton_plan.limits_of
    triton_plan.limits_of = lambda *problem: chosen(*problem)._replace(**changes)
    shapes = [x for x in SHAPES if x.name in args.shapes] if args.shapes else SHAPES[: 4 if args.quick else None]
    table = []
    for row in rows(shapes, args.chip, args.float32, args.registers):
        table.append(row)
        print(json.dumps(row) if args.json else " ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    over = [row for row in table if row["shared"] > row["shared_limit"]]
    if args.markdown:
        _write(Path(args.markdown), table)
    if over:
        sys.exit(f"{len(over)} kernels take more shared memory than their chip has, the first: {over[0]}")


def _write(file: Path, table: list[dict]) -> None:
    before, mark, rest = file.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- /table -->")
    if not mark or not end:
        sys.exit(f"{file} has no <!-- table --> ... <!-- /table -->")
    lines = [f"Compiled, not run, on {date.today()} with Triton {triton.__version__}.", "", *markdown(table), ""]
    file.write_text(before + mark + "\n".join(lines) + end + after)


if __name__ == "__main__":
    main()
