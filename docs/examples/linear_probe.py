"""A linear probe: how far do a model's features carry to other photos, with nothing but a linear classifier on them?

    python docs/examples/linear_probe.py --data-dir clothing64 --img-size 64 128 \\
        --models halonet_h0 halonet_h0.imagenette_r128

Needs scikit-learn. The features are what the model's own classifier sees (timm's `forward_head(pre_logits=True)`), of
the whole photo without augmentation. The classifier is scikit-learn's logistic regression on features of mean 0 and
deviation 1; its regularisation is chosen by cross-validation among the training photos, and the validation split is
looked at once. A model without a tag has random weights, which is the floor. A seed chooses the folds, the random
weights and, with --train-share, the photos.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.data import create_dataset, create_loader, resolve_data_config

from timm_halonet.report.markdown import replace_region

STRENGTHS = np.logspace(-4, 1, 6)  # inverse regularisation, scikit-learn's C
START, END = "<!-- linear probe -->", "<!-- /linear probe -->"


def create(name: str, seed: int, weights: str | None = None) -> torch.nn.Module:
    """The model without its classifier: pretrained where the name has a tag or `weights` is a file, else random."""
    torch.manual_seed(seed)
    overlay = {"pretrained_cfg_overlay": {"file": weights}} if weights else {}
    return timm.create_model(name, pretrained=bool(weights) or "." in name, num_classes=0, **overlay).eval()


def features(
    model: torch.nn.Module, root: str, split: str, img_size: int, batch_size: int, workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """(photos, features) float32 and (photos,) integer labels of a split: photos resized whole to img_size, no crop."""
    dataset = create_dataset("", root=root, split=split)
    config = {**resolve_data_config({}, model=model), "input_size": (3, img_size, img_size), "crop_pct": 1.0}
    loader = create_loader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        use_prefetcher=False,
        persistent_workers=False,
        **{k: config[k] for k in ("input_size", "interpolation", "mean", "std", "crop_pct")},
    )
    found, labels = [], []
    with torch.inference_mode():
        for images, targets in loader:
            found.append(model(images.contiguous(memory_format=torch.channels_last)).numpy())
            labels.append(targets.numpy())
    return np.concatenate(found), np.concatenate(labels)


def a_share(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Indices of the same share of every class, at least 2 photos, drawn by the seed."""
    generator = np.random.default_rng(seed)
    kept = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        kept.append(generator.permutation(of_class)[: max(2, round(share * len(of_class)))])
    return np.sort(np.concatenate(kept))


def probe(train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray], seed: int) -> float:
    """Top-1 in percent on `validation` of a logistic regression that saw `train`."""
    folds = min(5, int(np.bincount(train[1])[np.unique(train[1])].min()))
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
        {"logisticregression__C": STRENGTHS},
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
    )
    return 100 * search.fit(*train).score(*validation)


def main(argv: list[str] | None = None) -> int:
    """Probe each model at each size with each seed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir",
        required=True,
        metavar="FOLDER",
        help="a folder with train and val, each with a folder for each class",
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME[.TAG][=FILE]")
    parser.add_argument("--img-size", type=int, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-share", type=float, default=1.0, help="of the training photos of each class, 0 to 1")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1, help="processes that read photos")
    parser.add_argument("--markdown", metavar="FILE", help=f"write the table between {START} and {END} in it")
    args = parser.parse_args(argv)
    if not 0 < args.train_share <= 1:
        parser.error(f"--train-share must be above 0 and at most 1, not {args.train_share}")

    rows = ["| model | size, px | top-1 by seed, % | mean |", "|---|---|---|---|"]
    for given in args.models:
        name, _, weights = given.partition("=")
        for size in args.img_size:
            splits = None
            found = []
            for seed in args.seeds:
                model = create(name, seed, weights)
                if splits is None or not (weights or "." in name):  # random weights differ by seed
                    splits = [
                        features(model, args.data_dir, s, size, args.batch_size, args.workers)
                        for s in ("train", "validation")
                    ]
                (x, y), validation = splits
                kept = a_share(y, args.train_share, seed)
                found.append(probe((x[kept], y[kept]), validation, seed))
                print(f"{given}, {size} px, seed {seed}: {found[-1]:.2f} %", flush=True)
            rows.append(
                f"| {name}{'' if weights or '.' in name else ', random weights'} | {size} "
                f"| {', '.join(f'{x:.1f}' for x in found)} | {statistics.mean(found):.1f} |"
            )
    text = "\n".join(rows)
    print(text)
    if args.markdown:
        replace_region(Path(args.markdown), START, END, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
