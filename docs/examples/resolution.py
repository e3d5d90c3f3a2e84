"""`python docs/examples/resolution.py`: memory and time of backbones at growing image sizes, batch 1.

Every figure comes from its own process, whose memory is limited. So a model that runs out of memory says so, and the
machine survives. Memory is what a step takes in addition to parameters and image: the peak of the resident set on the
CPU (see `memory.py`), that of PyTorch's allocator on a GPU.
"""

import argparse
import contextlib
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from timm_halonet.benchmark.run import DTYPES, choose_device, positive, progress
from timm_halonet.files import whole_file
from timm_halonet.report.machine import machine, machine_line
from timm_halonet.report.markdown import replace_region
from timm_halonet.report.plots import check_output, save

MODELS = (
    "halonet_h0",
    "halonet_h1",
    "seresnet50_halo8",
    "timm:halonet_h1",
    "vit_small_patch16_224",
    "vit_small_patch16_224/unfused",
)
SIZES = (256, 512, 1024, 2048)
SAMPLE_SECONDS = 3  # shorter steps are repeated, ten times at most, and the median counts
OUT_OF_MEMORY = "out of memory"
TOO_LONG = "longer than"


@dataclass(frozen=True)
class Measurement:
    """One model at one size; `bytes` and `seconds` are None where `error` says why."""

    model: str
    size: int  # pixels a side
    mode: str  # forward or training
    bytes: int | None
    seconds: float | None
    error: str = ""
    machine: str = ""

    @property
    def pixels(self) -> int:
        """The pixels of the image: `size` squared."""
        return self.size**2


# ---- the measuring process -----------------------------------------------------------------------------------------


def build(name: str):
    """A model that returns feature maps.

    Args:
        name: of any timm model that has `features_only`; "timm:NAME" for timm's own of that name in byoanet, where
            this package's took its place; "NAME/unfused" for attention that holds its logits, where timm has both.
    """
    import timm
    from timm.models import byoanet

    name, _, variant = name.partition("/")
    if variant not in ("", "unfused"):
        raise ValueError(f"{name}/{variant}: the only variant is /unfused")
    if variant:
        timm.layers.set_fused_attn(False)
    if name.startswith("timm:"):
        return getattr(byoanet, name.removeprefix("timm:"))(features_only=True)
    # a ViT takes other sizes than its own only when told
    kwargs = dict(dynamic_img_size=True) if name.startswith(("vit_", "deit")) else {}
    return timm.create_model(name, features_only=True, **kwargs)


def worker(model: str, size: int, mode: str, device: str, dtype: str, limit: int) -> dict[str, Any]:
    """Peak bytes and median seconds of a step, or the error; with at most `limit` bytes on top of what there is."""
    import torch

    torch.manual_seed(0)
    backbone = build(model).to(device).train(mode == "training")
    autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")

    def run(x: torch.Tensor) -> None:
        with autocast, torch.inference_mode(mode == "forward"):
            features = backbone(x)
            if mode == "training":
                torch.stack([f.float().square().mean() for f in features]).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    run(torch.randn(1, 3, min(size, 256), min(size, 256), device=device))  # sets up what is set up once
    backbone.zero_grad()
    x = torch.randn(1, 3, size, size, device=device)
    samples: list[float] = []

    def sample() -> None:
        start = time.perf_counter()
        run(x)
        samples.append(time.perf_counter() - start)

    if device == "cpu":
        _limit_memory(limit)
    try:
        size_bytes = _peak_bytes(sample, device)
        if not samples or samples[0] < SAMPLE_SECONDS:
            repeats = min(10, math.ceil(SAMPLE_SECONDS / samples[0])) if samples else 3
            samples.clear()
            for _ in range(repeats):
                sample()
    except (RuntimeError, MemoryError) as e:
        return {"error": OUT_OF_MEMORY if _is_out_of_memory(e) else f"{type(e).__name__}: {e}"}
    return {"bytes": size_bytes, "seconds": statistics.median(samples)}


def _limit_memory(limit: int) -> None:
    """Let this process's data grow by `limit` bytes only, where the system can do that."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        status = Path("/proc/self/status").read_text().splitlines()
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + limit, resource.RLIM_INFINITY))


def _peak_bytes(step: Callable[[], None], device: str) -> int | None:
    """None where the system does not tell; `step` may not have run then."""
    import torch

    from timm_halonet.benchmark.case import Skip
    from timm_halonet.benchmark.memory import peak_growth

    if device == "cpu":
        try:
            return peak_growth(step)
        except Skip:
            return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "bad_alloc"))


# ---- the sweep -----------------------------------------------------------------------------------------------------


def measure(model: str, size: int, args: argparse.Namespace, device: str) -> Measurement:
    """One measurement in a fresh process."""
    mode = "training" if args.train else "forward"
    task = dict(model=model, size=size, mode=mode, device=device, dtype=args.dtype, limit=int(args.limit * 2**30))
    command = [sys.executable, __file__, "--worker", json.dumps(task), "--threads", str(args.threads)]

    def result(bytes: int | None = None, seconds: float | None = None, error: str = "") -> Measurement:
        return Measurement(model, size, mode, bytes, seconds, error)

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return result(error=f"{TOO_LONG} {args.timeout:g} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"its process returned {done.returncode}"]
        killed = done.returncode == -9 or "bad_alloc" in done.stderr
        return result(error=OUT_OF_MEMORY if killed else lines[-1][:200])
    return result(**json.loads(done.stdout.splitlines()[-1]))


def sweep(args: argparse.Namespace, device: str, found: list[Measurement]) -> bool:
    """Fills `found`, model by model from small to large; whether Ctrl-C cut it short.

    After a size that takes too much memory or time, a model's larger ones are not tried.
    """
    start, total = time.monotonic(), len(args.models) * len(args.sizes)
    where = machine_line(machine(device))
    for i, model in enumerate(args.models):
        failed = ""
        for j, size in enumerate(sorted(args.sizes)):
            if not failed:
                minutes = (time.monotonic() - start) / 60
                progress(f"[{i * len(args.sizes) + j + 1}/{total}] {model} at {size} px, {minutes:.1f} minutes so far")
                try:
                    one = measure(model, size, args, device)
                except KeyboardInterrupt:
                    progress("interrupted")
                    return True
                failed = one.error if one.error.startswith((OUT_OF_MEMORY, TOO_LONG)) else ""
            else:
                one = Measurement(model, size, one.mode, None, None, "not tried")
            found.append(Measurement(**{**asdict(one), "machine": where}))
            progress(f"    {cell(found[-1])}")
            if args.csv:
                write_csv(args.csv, found)
    return False


# ---- from figures to tables ----------------------------------------------------------------------------------------


def exponent(found: Sequence[Measurement], model: str, quantity: str) -> float | None:
    """x where `quantity` ("bytes" or "seconds") grows with pixels ** x, by least squares; None below two sizes."""
    points = {m.pixels: getattr(m, quantity) for m in found if m.model == model and getattr(m, quantity)}
    if len(points) < 2:
        return None
    return statistics.linear_regression([math.log(x) for x in points], [math.log(y) for y in points.values()]).slope


def cell(m: Measurement) -> str:
    """A cell of the table: memory and time, or why there are none."""
    if m.error:
        return m.error
    size = "-" if m.bytes is None else f"{m.bytes / 2**20:.0f} MiB"
    return f"{size}, {m.seconds:.3g} s" if m.seconds is not None else size


def table(found: Sequence[Measurement]) -> str:
    """Markdown: a row for each size, a column for each model, and how memory and time grow."""
    models, sizes = list(dict.fromkeys(m.model for m in found)), sorted({m.size for m in found})
    cells = {(m.model, m.size): cell(m) for m in found}
    lines = ["| image | " + " | ".join(f"`{model}`" for model in models) + " |", "|---" * (len(models) + 1) + "|"]
    for size in sizes:
        lines.append(f"| {size} px | " + " | ".join(cells.get((model, size), "-") for model in models) + " |")
    for quantity, label in (("bytes", "memory"), ("seconds", "time")):
        powers = (exponent(found, model, quantity) for model in models)
        lines.append(
            f"| {label} grows with | " + " | ".join("-" if x is None else f"pixels^{x:.2f}" for x in powers) + " |"
        )
    return "\n".join(lines)


def write_csv(file: str, found: Sequence[Measurement]) -> None:
    """Write all measurements, the whole file or nothing."""
    with whole_file(file) as temporary, temporary.open("w", newline="") as f:
        writer = csv.DictWriter(f, [field.name for field in fields(Measurement)])
        writer.writeheader()
        writer.writerows(asdict(m) for m in found)


def read_csv(file: str) -> list[Measurement]:
    """The measurements that `write_csv` wrote.

    Raises:
        ValueError: the file lacks columns, or a value is not a number; with the line.
    """
    found = []
    with open(file, newline="") as f:
        reader = csv.DictReader(f)
        for row in reader:
            try:
                size, bytes, seconds = int(row["size"]), row["bytes"], row["seconds"]
                numbers = (int(bytes) if bytes else None, float(seconds) if seconds else None)
                found.append(Measurement(row["model"], size, row["mode"], *numbers, row["error"], row["machine"]))
            except (KeyError, TypeError, ValueError) as e:
                raise ValueError(f"{file}, line {reader.line_num}: not a measurement ({e!r})") from None
    return found


def update_markdown(file: str, found: Sequence[Measurement]) -> None:
    """Replace what stands between `<!-- resolution:MODE -->` and `<!-- /resolution -->`; a new file gets just that.

    Raises:
        ValueError: the file is there, but these marks are not.
    """
    machines = "; ".join(dict.fromkeys(m.machine for m in found))
    text = f"Measured on: {machines}.\n\n{table(found)}"
    replace_region(Path(file), f"<!-- resolution:{found[0].mode} -->", "<!-- /resolution -->", text)


# ---- the command ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    p = argparse.ArgumentParser(
        prog="python docs/examples/resolution.py", description=(__doc__ or "").partition(":")[2]
    )
    p.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=f"default: {' '.join(MODELS)}")
    p.add_argument("--sizes", nargs="+", type=positive, default=list(SIZES), metavar="PX", help="default: %(default)s")
    p.add_argument("--train", action="store_true", help="a training step instead of the features alone")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="others by autocast (default float32)")
    p.add_argument("--threads", type=positive, default=os.cpu_count() or 1, metavar="N", help="of the CPU")
    p.add_argument("--limit", type=float, default=16, metavar="GIB", help="memory for a step on the CPU (default 16)")
    p.add_argument("--timeout", type=float, default=900, metavar="S", help="for one measurement (default 900)")
    p.add_argument("--csv", metavar="FILE", help="write all figures; kept up to date on the way")
    p.add_argument("--markdown", metavar="FILE", help="write the table between marks in it, or a new file")
    p.add_argument("--plot", metavar="PICTURE", help="draw memory and time over image size")
    p.add_argument("--report", nargs="+", metavar="CSV", help="measure nothing: report what these runs, joined, found")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    return p


def run(args: argparse.Namespace) -> int:
    """The command: 0, or 130 after Ctrl-C (with all output of what was measured).

    Raises:
        ValueError: a device that is not there, files that do not fit.
    """
    if args.worker:
        import torch

        torch.set_num_threads(args.threads)
        print(json.dumps(worker(**json.loads(args.worker))))
        return 0
    if args.plot:
        check_output(args.plot)
    for file in (args.csv, args.markdown, args.plot):
        if file and not Path(file).absolute().parent.is_dir():
            raise ValueError(f"cannot write {file}: there is no folder {Path(file).absolute().parent}")
    found: list[Measurement] = []
    interrupted = False
    if args.report:
        found = [m for file in args.report for m in read_csv(file)]
    else:
        interrupted = sweep(args, choose_device(args.device), found)
    if len({m.mode for m in found}) > 1:
        raise ValueError("forward and training figures do not go into one table: report them one by one")
    if found:
        print(table(found))
        if args.markdown:
            update_markdown(args.markdown, found)
        if args.plot:
            from resolution_plot import draw

            save(draw(found), args.plot)
    return 130 if interrupted else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 for an error, 130 after Ctrl-C."""
    try:
        return run(parser().parse_args(argv))
    except (ValueError, RuntimeError, OSError) as e:
        print(f"{parser().prog}: error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
