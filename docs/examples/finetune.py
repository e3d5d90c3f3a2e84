"""Fine-tuning from a pretrained model against training it from scratch: the same recipe and epochs, several seeds.

    python docs/examples/finetune.py --train train.py --data-dir clothing64 --out runs
    python docs/examples/finetune.py --train train.py --data-dir imagenette --out runs --train-share 0.1 \
        --recipe docs/examples/finetune_imagenette.yaml --starts imagenette_r128 scratch

train.py is timm's. With --train-share each seed draws its own share of every class's training photos; the validation
split stays whole. Prints and, with --markdown, writes a table: top-1 on the validation split after the last epoch (not
the best one), mean and standard deviation over the seeds. A run that is done is not done again.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

from timm_halonet.report.markdown import replace_region
from timm_halonet.report.summary import read_run

RECIPE = Path(__file__).with_name("finetune_clothing.yaml")
STARTS = ("pretrained", "scratch")
START, END = "<!-- finetune -->", "<!-- /finetune -->"


def a_share(data_dir: Path, share: float, seed: int, out: Path) -> Path:
    """A folder of links: `share` of the training photos of each class in data_dir, at least one, and the whole val.

    Raises:
        ValueError: data_dir has no folder train with a folder for each class.
    """
    folder = out / f"share-{data_dir.name}-{share}-{seed}"
    if not folder.exists():
        classes = sorted(p for p in (data_dir / "train").glob("*") if p.is_dir())
        if not classes:
            raise ValueError(f"{data_dir}/train holds no folders of classes")
        partial = folder.with_suffix(".partial")
        generator = random.Random(seed)
        for of_class in classes:
            photos = sorted(of_class.iterdir())
            target = partial / "train" / of_class.name
            target.mkdir(parents=True, exist_ok=True)
            for photo in generator.sample(photos, max(1, round(share * len(photos)))):
                link = target / photo.name
                link.unlink(missing_ok=True)
                os.symlink(photo.resolve(), link)
        (partial / "val").unlink(missing_ok=True)
        os.symlink((data_dir / "val").resolve(), partial / "val")
        partial.rename(folder)
    return folder


def train(args: argparse.Namespace, model: str, start: str, seed: int) -> float:
    """Top-1 in percent after the last epoch.

    Raises:
        RuntimeError: train.py failed, with the end of its log.
    """
    name = f"{model}.{start}.{seed}"
    out, data = Path(args.out), Path(args.data_dir)
    done = out / f"{name}.done"
    if not done.exists():
        if args.train_share < 1:
            data = a_share(data, args.train_share, seed, out)
        tagged = model if start in STARTS else f"{model}.{start}"
        line = [sys.executable, args.train, "--config", args.recipe, "--data-dir", str(data), "--model", tagged]
        line += ["--seed", str(seed), "--device", args.device, "--output", args.out, "--experiment", name]
        line += [] if start == "scratch" else ["--pretrained"]
        log = out / f"{name}.log"
        with log.open("w") as f:
            code = subprocess.run(line, stdout=f, stderr=subprocess.STDOUT, check=False).returncode
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
    parser.add_argument(
        "--starts",
        nargs="+",
        default=list(STARTS),
        metavar="START",
        help="pretrained (the default tag), scratch (random weights), or tags of the models",
    )
    parser.add_argument("--recipe", default=str(RECIPE), metavar="FILE", help="train.py's --config")
    parser.add_argument("--train-share", type=float, default=1.0, help="of each class's training photos, 0 to 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", metavar="FILE", help=f"write the table between {START} and {END} in it")
    args = parser.parse_args(argv)
    if not 0 < args.train_share <= 1:
        parser.error(f"--train-share must be above 0 and at most 1, not {args.train_share}")

    Path(args.out).mkdir(parents=True, exist_ok=True)
    rows = ["| model | start | top-1 by seed, % | mean | standard deviation |", "|---|---|---|---|---|"]
    for model in args.models:
        for start in args.starts:
            found = []
            for seed in args.seeds:
                found.append(train(args, model, start, seed))
                print(f"{model}, {start}, seed {seed}: {found[-1]:.2f} %", flush=True)
            spread = f"{statistics.stdev(found):.1f}" if len(found) > 1 else "-"
            each = ", ".join(f"{x:.1f}" for x in found)
            rows.append(f"| {model} | {start} | {each} | {statistics.mean(found):.1f} | {spread} |")
    text = "\n".join(rows)
    print(text)
    if args.markdown:
        replace_region(Path(args.markdown), START, END, text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, ValueError) as e:
        sys.exit(f"finetune.py: {e}")
