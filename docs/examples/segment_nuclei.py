"""Nuclei from background: a U-Net over a backbone of this package, on the photos of the 2018 Data Science Bowl.

    python docs/examples/segment_nuclei.py --data dsb2018-nuclei.tar

Needs segmentation_models_pytorch. The tar holds dsb2018/split.json ({"train": [name, ...], "val": [...]}),
dsb2018/images/NAME.jpg and dsb2018/labels/NAME.png, whose pixels are 0 for background and else a nucleus's number.
Prints the foreground IoU on the validation images; stopped by --minutes or Ctrl-C, the same command goes on.
"""

import argparse
import json
import math
import os
import tarfile
import time

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from timm_halonet.files import whole_file

MEAN, STD = (torch.tensor(x).view(3, 1, 1) * 255 for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def read(path):
    """The samples of each split: [(photo (3, H, W) uint8, foreground (1, H, W) bool), ...]."""
    with tarfile.open(path) as tar:

        def pixels(name):
            return np.array(Image.open(tar.extractfile(f"dsb2018/{name}")))

        def pair(name):
            photo, label = pixels(f"images/{name}.jpg"), pixels(f"labels/{name}.png")
            return torch.from_numpy(photo).permute(2, 0, 1), torch.from_numpy(label > 0)[None]

        return {k: [pair(name) for name in v] for k, v in json.load(tar.extractfile("dsb2018/split.json")).items()}


def batch(pairs, size, crop, rng):
    """Random square crops, turned and mirrored: photos (size, 3, crop, crop), foregrounds (size, 1, crop, crop)."""
    crops = []
    for x, y in (pairs[i] for i in rng.integers(len(pairs), size=size)):
        top, left = (rng.integers(n - crop + 1) for n in x.shape[1:])
        both = torch.cat([z[:, top : top + crop, left : left + crop] for z in (x, y)]).rot90(rng.integers(4), (1, 2))
        crops.append(both.flip(2) if rng.integers(2) else both)
    x, y = torch.stack(crops).float().split([3, 1], dim=1)
    return (x - MEAN) / STD, y


@torch.inference_mode()
def evaluate(model, pairs, device):
    """Foreground IoU over all pixels, and its mean over images, of whole photos padded to multiples of 32."""
    counts = []
    for x, y in pairs:
        height, width = x.shape[1:]
        padded = F.pad((x - MEAN) / STD, (0, -width % 32, 0, -height % 32), mode="reflect")
        found = model(padded[None].to(device))[0, :, :height, :width].cpu() > 0
        counts.append([(found & y).sum(), (found | y).sum()])
    inter, union = torch.tensor(counts, dtype=torch.float64).T
    return inter.sum() / union.sum(), (inter / union.clamp(min=1)).mean()


def main():
    """Train a U-Net over the backbone, then print its scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="TAR")
    parser.add_argument("--model", default="halonet_h0", help="name in timm (default halonet_h0)")
    parser.add_argument("--no-weights", action="store_true", help="start at random though there are weights")
    for name, default in (("steps", 2000), ("batch", 8), ("crop", 160), ("seed", 0), ("lr", 5e-4)):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training, to go on later, after so long")
    parser.add_argument("--checkpoint", default="segment.pt", help="written every 50 steps (default segment.pt)")
    args = parser.parse_args()
    start, step, splits = time.monotonic(), 0, read(args.data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    weights = (timm.models.is_model_pretrained(args.model) and not args.no_weights) or None
    model = smp.Unet(f"tu-{args.model}", encoder_weights=weights).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    if os.path.exists(args.checkpoint):
        saved = torch.load(args.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    first, end = step, start + 60 * args.minutes
    while step < args.steps and time.monotonic() < end:
        rng = np.random.default_rng([args.seed, step])  # the same crops after an interruption
        x, y = (z.to(device) for z in batch(splits["train"], args.batch, args.crop, rng))
        decay = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / 100) * decay
        logits = model.train()(x)
        loss = F.binary_cross_entropy_with_logits(logits, y) + smp.losses.DiceLoss("binary")(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 50 == 0 or step == args.steps or time.monotonic() >= end:
            pace = (time.monotonic() - start) / (step - first)
            print(f"step {step}/{args.steps}, loss {loss.item():.4f}, {pace:.2f} s a step", flush=True)
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
            with whole_file(args.checkpoint) as temporary:
                torch.save(state, temporary)
    pixels, images = evaluate(model.eval(), splits["val"], device)
    print(f"{step} steps: foreground IoU {pixels:.4f} of all pixels, {images:.4f} mean of {len(splits['val'])} images")


if __name__ == "__main__":
    main()
