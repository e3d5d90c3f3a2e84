"""What a detector finds, and how good it is: COCO's average precision of boxes and masks."""

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.roi_heads import paste_masks_in_image

from . import rle
from .data import DetectionDataset
from .processes import world_and_rank

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
MASK_THRESHOLD = 0.5
_CHUNK = 32  # masks that are held in the image's size at a time


@torch.inference_mode()
def detect(
    model: nn.Module, images: Sequence[torch.Tensor], *, amp: torch.dtype | None = None, masks: bool = True
) -> list[dict[str, Any]]:
    """Detections of a detector of this package or of torchvision, in evaluation mode.

    Unlike `model(images)` it never holds all masks in the image's size: hundreds of objects in a large image fit.

    Args:
        model: on its device, in evaluation mode.
        images: (3, H, W) in float32 from 0 to 1.
        amp: type for autocast, torch.bfloat16; None for float32.
        masks: whether to give masks, where the detector has them.

    Returns:
        For each image boxes (N, 4), labels (N) and scores (N) on the CPU, best first, and with masks `rles`: N masks as
        COCO's compressed run lengths.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("the detector is in training mode; call model.eval() first")
    device = next(model.parameters()).device
    batch = [image.to(device) for image in images]
    with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
        if isinstance(model, RetinaNet):
            return [{k: v.cpu() for k, v in found.items()} for found in model(batch)]
        # GeneralizedRCNN.forward, but for the masks
        transform: Any = model.transform
        resized, _ = transform(batch)
        features = model.backbone(resized.tensors)  # type: ignore[operator]
        proposals, _ = model.rpn(resized, features)  # type: ignore[operator]
        found, _ = model.roi_heads(features, proposals, resized.image_sizes)  # type: ignore[operator]
    small = [entry.pop("masks", None) for entry in found]
    sizes = [tuple(image.shape[-2:]) for image in batch]
    found = transform.postprocess(found, resized.image_sizes, sizes)
    results = [{k: v.cpu() for k, v in entry.items()} for entry in found]
    for result, mask, size in zip(results, small, sizes, strict=True):
        if mask is not None and masks:
            result["rles"] = _encode(mask.float().cpu(), result["boxes"], size)
    return results


def _encode(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, ...]) -> list[dict[str, Any]]:
    encoded = []
    for start in range(0, len(masks), _CHUNK):
        part = slice(start, start + _CHUNK)
        pasted = paste_masks_in_image(masks[part], boxes[part], size) > MASK_THRESHOLD
        encoded += [rle.encode(mask) for mask in pasted[:, 0].numpy()]
    return encoded


def to_coco(image_id: int | str, found: dict[str, Any], categories: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Detections of an image in COCO's format for results."""
    boxes = found["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    columns = zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
    results = [
        {"image_id": image_id, "category_id": categories[label - 1]["id"], "bbox": box, "score": score}
        for box, label, score in columns
    ]
    for result, segmentation in zip(results, found.get("rles", ()), strict=False):
        result["segmentation"] = segmentation
    return results


def evaluate(
    model: nn.Module,
    dataset: DetectionDataset,
    *,
    amp: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Average precision of a detector on a dataset, an image at a time; under torch.distributed each process takes its
    share, and all get the result.

    Args:
        model: on its device.
        dataset: without augmentation.
        amp: type for autocast, or None.
        progress: called with the images done and the images of this process.

    Returns:
        `box`, and with masks `mask`: a dict of METRICS each; `images`, `detections`, `max_dets` (of an image, the most
        that count) and `seconds_per_image` (of the model alone).

    Raises:
        ValueError: the dataset has another number of classes than the detector (`match_categories` compares and orders
            them by name), or an image or annotation that cannot be used.
    """
    count = _num_classes(model)
    if count != dataset.num_classes:
        raise ValueError(
            f"the detector has {count - 1} classes, the data has {dataset.num_classes - 1}: "
            f"{', '.join(str(c['name']) for c in dataset.categories[:10])}"
        )
    truth = dataset.ground_truth()  # first: it may be refused
    world, rank = world_and_rank()
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    image_ids = getattr(dataset, "image_ids", list(range(1, len(dataset) + 1)))
    results, seconds = [], 0.0
    own = range(rank, len(dataset), world)
    for done, index in enumerate(own, 1):
        image = dataset.image(index).float() / 255
        _synchronize(device)
        start = time.perf_counter()
        try:
            [found] = detect(model, [image.as_subclass(torch.Tensor)], amp=amp)
        except ValueError as e:
            raise ValueError(f"{dataset.names[index]}: {e}") from None
        _synchronize(device)
        seconds += time.perf_counter() - start
        results += to_coco(image_ids[index], found, dataset.categories)
        if progress:
            progress(done, len(own))
    model.train(training)
    if world > 1:
        parts: list[Any] = [None] * world
        distributed.all_gather_object(parts, (results, seconds))
        results = [result for part, _ in parts for result in part]
        seconds = sum(part for _, part in parts)
    limit = int(getattr(model, "detections_per_img", 0) or model.roi_heads.detections_per_img)  # type: ignore
    masks = getattr(getattr(model, "roi_heads", None), "mask_head", None) is not None
    scores = average_precision(truth, results, max_dets=limit, masks=masks)
    return {
        **scores,
        "images": len(dataset),
        "detections": len(results),
        "max_dets": limit,
        "seconds_per_image": round(seconds / len(dataset), 4),
    }


def _num_classes(model: nn.Module) -> int:
    if isinstance(model, RetinaNet):
        return model.head.classification_head.num_classes
    return model.roi_heads.box_predictor.cls_score.out_features  # type: ignore[union-attr, return-value]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def average_precision(
    ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], max_dets: int = 100, masks: bool | None = None
) -> dict[str, dict[str, float | None]]:
    """COCO's average precision, by faster-coco-eval.

    Args:
        ground_truth: the content of a COCO annotation file.
        results: COCO's results: image_id, category_id, score, bbox and, for masks, segmentation.
        max_dets: detections of an image and class that count, best first. COCO's own number is 100; with hundreds of
            objects in an image that alone would bound the recall.
        masks: whether to score masks too; None: where a result has a segmentation.

    Returns:
        `box`, and with masks `mask`: METRICS in 0..1. AP is the mean over IoU 0.50, 0.55 ...
        0.95; AP50 and AP75 at one IoU; APs, APm, APl of objects below 32^2, up to 96^2 and above (pixels of the image
        as it is); AR the mean recall. None where the ground truth has no such objects.
    """
    if masks is None:
        masks = any("segmentation" in result for result in results)
    kinds = {"box": "bbox", **({"mask": "segm"} if masks else {})}
    return {name: _average_precision(ground_truth, results, kind, max_dets) for name, kind in kinds.items()}


def _average_precision(
    ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], kind: str, max_dets: int
) -> dict[str, float | None]:
    tools = rle.coco_tools()
    # both are changed by the evaluator. A mask's size must come from the mask, so its results go without boxes.
    truth = tools.COCO(copy.deepcopy(_with_own_ids(ground_truth)))
    other = "bbox" if kind == "segm" else "segmentation"
    own = [{k: v for k, v in result.items() if k != other} for result in results]
    evaluator = tools.COCOeval_faster(truth, truth.loadRes(copy.deepcopy(own)), kind)
    evaluator.params.maxDets = [1, 10, max_dets] if max_dets > 10 else [max_dets]
    evaluator.evaluate()
    evaluator.accumulate()
    precision = np.asarray(evaluator.eval["precision"])  # IoU, recall, class, size, max_dets
    recall = np.asarray(evaluator.eval["recall"])  # IoU, class, size, max_dets
    ious = np.asarray(evaluator.params.iouThrs)
    sizes = list(evaluator.params.areaRngLbl)

    def mean(values: np.ndarray) -> float | None:
        values = values[values > -1]  # -1: no such objects
        return round(float(values.mean()), 4) if values.size else None

    everything = sizes.index("all")
    scores: dict[str, float | None] = {"AP": mean(precision[:, :, :, everything, -1])}
    for name, iou in (("AP50", 0.5), ("AP75", 0.75)):
        scores[name] = mean(precision[np.isclose(ious, iou), :, :, everything, -1])
    for name, size in (("APs", "small"), ("APm", "medium"), ("APl", "large")):
        scores[name] = mean(precision[:, :, :, sizes.index(size), -1])
    scores["AR"] = mean(recall[:, :, everything, -1])
    return scores


def _with_own_ids(content: dict[str, Any]) -> dict[str, Any]:
    """The same with annotations numbered from 1: to COCO's matching, 0 and less mean that nothing was matched."""
    annotations = [{**annotation, "id": n} for n, annotation in enumerate(content["annotations"], 1)]
    return {**content, "annotations": annotations}


def format_scores(result: dict[str, Any]) -> str:
    """Lines of a table for people."""
    lines = ["       " + "".join(f"{metric:>8}" for metric in METRICS)]
    for kind in ("box", "mask"):
        if kind in result:
            values = (result[kind][metric] for metric in METRICS)
            lines.append(f"  {kind:<5}" + "".join("       -" if v is None else f"{100 * v:8.1f}" for v in values))
    lines.append(
        f"  in %, at most {result['max_dets']} detections an image; {result['images']} images, "
        f"{result['seconds_per_image']:.3f} s each"
    )
    return "\n".join(lines)
