"""Compiles the Triton kernels for GPUs that need not be here, and says what they take of the chip.

    python tests/kernel_table.py [--quick] [--json] [--markdown FILE]

For every shape of the family and of timm's halo models: shared memory of a program in bytes (and the chip's limit),
registers a thread, and bytes of stack a thread, which is where registers are spilled to. Takes some minutes.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_halonet.ops import triton_kernels
from timm_halonet.ops.options import Options
from timm_halonet.ops.triton import NUM_STAGES, fold_pixels, plan

LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # shared memory of a program, by compute capability
# block, halo, query stride, channels a head, map: the first four are the quick ones
SHAPES = [
    (8, 3, 1, 16, 64),  # H0 to H2, stage 1; timm's halonet_h1
    (8, 3, 2, 16, 64),
    (10, 3, 1, 16, 80),  # H3, H7
    (8, 3, 1, 64, 8),  # stage 4 of timm's hybrids
    (8, 3, 1, 32, 16),
    (8, 2, 1, 16, 32),  # timm's halonet26t and its kin
    (8, 2, 2, 32, 32),
    (12, 2, 1, 16, 96),  # H4
    (14, 2, 1, 16, 112),  # H5
    (14, 2, 2, 16, 112),
    (8, 4, 1, 16, 128),  # H6
    (7, 3, 1, 16, 56),
    (8, 3, 1, 128, 16),
    (32, 3, 1, 64, 32),  # detection
]
POINTERS = ["q", "k", "v", "rel_h", "rel_w", "out", "grad", "dq", "window_k", "window_v", "dk", "dv"]


def compile_kernel(name: str, dtype: torch.dtype, shape, precision: str, chip: int) -> dict:
    """Compile one kernel and return its row of the table."""
    block, halo, stride, dim, side = shape
    options = Options(block, halo, stride, dim**-0.5, False, True, stride)
    tiles = plan(dtype, dim, dim, (side, side), options, name != "forward", precision)
    meta = dict(tiles.meta, P=fold_pixels(tiles.meta["BLOCK_D"]))
    kernel = getattr(triton_kernels, f"{name}_kernel")
    types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in meta:
            signature[argument] = "constexpr"
        elif argument in POINTERS or argument in ("lse", "partial"):
            signature[argument] = "*" + (types[dtype] if argument in POINTERS else "fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif "scale" in argument or "log2" in argument:
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            if argument[:2] in ("q_", "k_", "v_"):  # strides are multiples of 16, as Triton finds them at a launch
                attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {(i,): meta[x] for i, x in enumerate(kernel.arg_names) if x in meta}
    warps = 4 if name == "fold" else tiles.num_warps
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", chip, 32),
        options=dict(num_warps=warps, num_stages=NUM_STAGES),
    )
    registers, stack = _resources(compiled.asm["cubin"])
    return dict(
        kernel=name, b=block, h=halo, s=stride, d=dim, dtype=types[dtype], precision=precision, chip=chip, M=meta["M"],
        N=meta["N"], warps=warps, shared=compiled.metadata.shared, shared_limit=LIMITS[chip], registers=registers,
        stack=stack,
    )  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = next(Path(triton.__file__).parent.rglob("bin/cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return int(found["REG"]), int(found["STACK"])


def rows(quick: bool):
    """Yields the table's rows."""
    for i, shape in enumerate(SHAPES[:4] if quick else SHAPES):
        kinds = [(torch.bfloat16, "ieee")]
        if not quick:
            kinds.append((torch.float32, "tf32"))
            if i % 4 == 0:  # float16 is like bfloat16, and exact float32 for those who must
                kinds += [(torch.float16, "ieee"), (torch.float32, "ieee")]
        for dtype, precision in kinds:
            for name in ("forward", "backward", "fold"):
                for chip in LIMITS:
                    yield compile_kernel(name, dtype, shape, precision, chip)


def _markdown(table: list[dict]) -> str:
    lines = [
        "# What the Triton kernels take of a chip",
        "",
        f"Compiled, not run, on {date.today()} with Triton {triton.__version__} by `python tests/kernel_table.py"
        " --markdown docs/kernels.md`.",
        "b, h, s, d: block, halo, query stride, channels a head. M x N: queries and keys of a tile. In a chip's",
        f"column: shared memory of a program ({', '.join(f'sm_{k} has {v // 1024} KiB' for k, v in LIMITS.items())}),",
        "registers a thread / bytes of stack a thread, which is where registers are spilled to. Products of float32",
        "are done in TF32 where PyTorch allows it, else exactly (ieee), without tensor cores.",
        "",
        "| kernel | b, h, s, d | dtype | M x N, warps | " + " | ".join(f"sm_{k}" for k in LIMITS) + " |",
        "|---|---|---|---|" + "---|" * len(LIMITS),
    ]
    for i in range(0, len(table), len(LIMITS)):
        group = table[i : i + len(LIMITS)]
        x = group[0]
        dtype = x["dtype"] + (f" {x['precision']}" if x["dtype"] == "fp32" else "")
        cells = [f"{y['shared'] / 1024:.0f} KiB, {y['registers']} / {y['stack']}" for y in group]
        shape = f"{x['b']}, {x['h']}, {x['s']}, {x['d']}"
        lines.append(f"| {x['kernel']} | {shape} | {dtype} | {x['M']} x {x['N']}, {x['warps']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="bfloat16, four shapes")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there")
    args = parser.parse_args()
    table = []
    for row in rows(args.quick):
        table.append(row)
        print(json.dumps(row) if args.json else " ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    over = [row for row in table if row["shared"] > row["shared_limit"]]
    if args.markdown:
        Path(args.markdown).write_text(_markdown(table))
    if over:
        sys.exit(f"{len(over)} kernels take more shared memory than their chip has, the first: {over[0]}")


if __name__ == "__main__":
    main()
