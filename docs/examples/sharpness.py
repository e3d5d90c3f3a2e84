"""Does a model look at sharpness? The same photos sharp and blurred: how often does its first answer change?

    python docs/examples/sharpness.py --data-dir imagenette/val --models halonet_h0.tiny_imagenet_r128 --img-size 64 96

Weights that were trained on photos enlarged from 64 px may have learnt the blur. Here each photo is shown at --img-size
in three ways: as it is, shrunk to --blur pixels and enlarged again, and (as a yardstick) moved by 2 % of its width. The
photos are the first --per-class of each class folder by name; none has to belong to one of the model's own classes. A
model may be local-dir:FOLDER. Prints and, with --markdown, writes a table. With --answers it also prints what the model
takes most of each class for.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import resolve_data_config
from torchvision.transforms.functional import normalize, pil_to_tensor

from timm_halonet.report.markdown import replace_region

START, END = "<!-- sharpness -->", "<!-- /sharpness -->"
MOVED = 0.02  # of the width


def views(photo: Image.Image, size: int, blur: int) -> dict[str, Image.Image]:
    """The photo at `size` pixels square, as it is, blurred and moved to the right."""
    across = max(1, round(MOVED * photo.width))
    return {
        "sharp": photo.resize((size, size), Image.Resampling.BICUBIC),
        "blurred": photo.resize((blur, blur), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC),
        "moved": photo.crop((across, 0, photo.width, photo.height)).resize((size, size), Image.Resampling.BICUBIC),
    }


def find_photos(data_dir: Path, per_class: int) -> list[tuple[str, Path]]:
    """(class folder, file) of the first photos of each class by name.

    Raises:
        ValueError: data_dir has no folders with files.
    """
    folders = sorted(p for p in data_dir.glob("*") if p.is_dir())
    found = [(f.name, photo) for f in folders for photo in sorted(f.iterdir())[:per_class]]
    if not found:
        raise ValueError(f"{data_dir} holds no folders of photos")
    return found


@torch.inference_mode()
def answers(model: torch.nn.Module, photos: list[tuple[str, Path]], size: int, blur: int) -> dict[str, torch.Tensor]:
    """(photos, classes) float32 probabilities for each view."""
    config = resolve_data_config({}, model=model)
    found: dict[str, list[torch.Tensor]] = {}
    for _, file in photos:
        with Image.open(file) as opened:
            seen = views(opened.convert("RGB"), size, blur)
        for view, image in seen.items():
            x = normalize(pil_to_tensor(image).float() / 255, config["mean"], config["std"])
            found.setdefault(view, []).append(model(x[None]).softmax(1)[0])
    return {view: torch.stack(p) for view, p in found.items()}


def row(name: str, size: int, found: dict[str, torch.Tensor]) -> str:
    """The table's row of a model: how often the first answer stays, and the mean probability of the first answer."""
    first = {view: p.argmax(1) for view, p in found.items()}
    same = {view: 100 * (first["sharp"] == other).float().mean().item() for view, other in first.items()}
    sure = {view: 100 * p.max(1).values.mean().item() for view, p in found.items()}
    figures = same["blurred"], same["moved"], sure["sharp"], sure["blurred"]
    return f"| {name} | {size} | " + " | ".join(f"{x:.0f}" for x in figures) + " |"


def main(argv: list[str] | None = None) -> int:
    """Show the photos to each model at each size, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, metavar="FOLDER", help="a folder of photos for each class")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME.TAG")
    parser.add_argument("--img-size", type=int, nargs="+", required=True)
    parser.add_argument("--blur", type=int, default=64, metavar="PIXELS", help="size that photos are shrunk to")
    parser.add_argument("--per-class", type=int, default=10, metavar="PHOTOS")
    parser.add_argument("--answers", action="store_true", help="print what each class is taken for")
    parser.add_argument("--markdown", metavar="FILE", help=f"write the table between {START} and {END} in it")
    args = parser.parse_args(argv)
    try:
        photos = find_photos(Path(args.data_dir), args.per_class)
    except ValueError as e:
        parser.error(str(e))

    rows = [
        "| model | size, px | same answer when blurred, % | when moved, % | mean probability, sharp, % | blurred, % |",
        "|---|---|---|---|---|---|",
    ]
    for name in args.models:
        model = timm.create_model(name, pretrained=True).eval()
        labels = model.pretrained_cfg.get("label_names") or range(model.num_classes)
        words = model.pretrained_cfg.get("label_descriptions") or {}
        for size in args.img_size:
            found = answers(model, photos, size, args.blur)
            rows.append(row(name, size, found))
            if args.answers:
                first = found["sharp"].argmax(1).tolist()
                for folder in dict.fromkeys(f for f, _ in photos):
                    taken = Counter(labels[i] for i, (f, _) in zip(first, photos, strict=True) if f == folder)
                    most = (f"{words.get(label, label)} {count}" for label, count in taken.most_common(4))
                    print(f"{size} px, {folder}: {'; '.join(most)}")
    text = "\n".join(rows)
    print(text)
    if args.markdown:
        replace_region(Path(args.markdown), START, END, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
