"""Discs on noise, as both formats of `timm-halonet detect` have them."""

import json

import numpy as np
from PIL import Image


def discs(count: int, seed: int, side: int = 64, objects: int = 4):
    """Images (side, side, 3) in uint8 and label maps (side, side) in uint16; the last image holds nothing."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:side, :side]
    for n in range(count):
        image = rng.normal(60, 20, (side, side, 3))
        labels = np.zeros((side, side), np.uint16)
        placed = 0
        while placed < (objects if n < count - 1 else 0):
            radius = rng.integers(6, 11)
            y, x = rng.integers(radius, side - radius, 2)
            disc = (yy - y) ** 2 + (xx - x) ** 2 <= radius**2
            if not labels[disc].any():
                placed += 1
                labels[disc] = 300 + placed  # more than 8 bits
                image[disc] += rng.uniform(70, 120)
        yield image.clip(0, 255).astype(np.uint8), labels


def write_masks(folder, **splits):
    """images/, labels/ and split.json of the given numbers of images."""
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    names = {}
    for seed, (split, count) in enumerate(splits.items()):
        names[split] = [f"{split}{n}" for n in range(count)]
        for name, (image, labels) in zip(names[split], discs(count, seed), strict=True):
            Image.fromarray(image).save(folder / "images" / f"{name}.png")
            Image.fromarray(labels).save(folder / "labels" / f"{name}.png")
    (folder / "split.json").write_text(json.dumps(names))
    return folder


def coco_content(count: int, seed: int, category: int = 7):
    """The content of a COCO file of the same images, and the images by file name; masks are polygons (squares)."""
    images, annotations, pictures = [], [], {}
    for n, (image, labels) in enumerate(discs(count, seed)):
        height, width = labels.shape
        images.append({"id": 10 + n, "file_name": f"{n}.png", "height": height, "width": width})
        pictures[f"{n}.png"] = image
        for value in np.unique(labels[labels > 0]):
            rows, columns = np.nonzero(labels == value)
            x, y = int(columns.min()), int(rows.min())
            w, h = int(columns.max()) + 1 - x, int(rows.max()) + 1 - y
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + n,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": category, "name": "disc"}, {"id": 3, "name": "square"}]
    return {"images": images, "annotations": annotations, "categories": categories}, pictures


def write_coco(folder, content, pictures, split="train"):
    """annotations/instances_SPLIT.json and SPLIT/."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / split).mkdir(exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / split / name)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def naive_instances(label_map: np.ndarray):
    """Boxes and masks of a label map, one value after the other."""
    boxes, masks = [], []
    for value in sorted(set(label_map.ravel().tolist()) - {0}):
        mask = label_map == value
        rows, columns = np.nonzero(mask)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        masks.append(mask)
    return np.array(boxes, dtype=np.float32).reshape(-1, 4), np.array(masks)
