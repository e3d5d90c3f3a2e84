"""Fine-tuning from a pretrained model against training it from scratch: the same recipe and epochs, several seeds.

    python docs/examples/finetune.py --train train.py --data-dir clothing64 --out runs

train.py is timm's. Prints and, with --markdown, writes a table: top-1 on the validation split after the last epoch (not
the best one), mean and standard deviation over the seeds. A run that is done is not done again.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from timm_halonet.report.markdown import replace_region
from timm_halonet.report.summary import read_run

RECIPE = Path(__file__).with_name("finetune_clothing.yaml")
STARTS = {"pretrained": ["--pretrained"], "scratch": []}
START, END = "<!-- finetune -->", "<!-- /finetune -->"


def train(args: argparse.Namespace, model: str, start: str, seed: int) -> float:
    """Top-1 in percent after the last epoch.

    Raises:
        RuntimeError: train.py failed, with the end of its log.
    """
    name = f"{model}.{start}.{seed}"
    out = Path(args.out)
    done = out / f"{name}.done"
    if not done.exists():
        line = [sys.executable, args.train, "--config", str(RECIPE), "--data-dir", args.data_dir, "--model", model]
        line += ["--seed", str(seed), "--device", args.device, "--output", args.out, "--experiment", name]
        log = out / f"{name}.log"
        with log.open("w") as f:
            code = subprocess.run([*line, *STARTS[start]], stdout=f, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            end = "\n".join(log.read_text().splitlines()[-5:])
            raise RuntimeError(f"{' '.join(line)} returned {code}; {log} ends with\n{end}")
        done.touch()
    return read_run(out / name).curves["eval_top1"][-1]


def main(argv: list[str] | None = None) -> int:
    """Train each model from each start with each seed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, metavar="FILE", help="timm's train.py")
    parser.add_argument(
        "--data-dir",
        required=True,
        metavar="FOLDER",
        help="a folder with train and val, each with a folder for each class",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="train.py's output and logs")
    parser.add_argument("--models", nargs="+", default=["halonet_h0"], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", metavar="FILE", help=f"write the table between {START} and {END} in it")
    args = parser.parse_args(argv)

    Path(args.out).mkdir(parents=True, exist_ok=True)
    rows = ["| model | start | top-1 by seed, % | mean | standard deviation |", "|---|---|---|---|---|"]
    for model in args.models:
        for start in STARTS:
            found = []
            for seed in args.seeds:
                found.append(train(args, model, start, seed))
                print(f"{model}, {start}, seed {seed}: {found[-1]:.2f} %", flush=True)
            spread = statistics.stdev(found) if len(found) > 1 else float("nan")
            each = ", ".join(f"{x:.1f}" for x in found)
            rows.append(f"| {model} | {start} | {each} | {statistics.mean(found):.1f} | {spread:.1f} |")
    text = "\n".join(rows)
    print(text)
    if args.markdown:
        replace_region(Path(args.markdown), START, END, text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as e:
        sys.exit(f"finetune.py: {e}")
