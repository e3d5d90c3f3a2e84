"""Average precision against a naive reference, and pictures."""

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from timm_halonet.detection import MaskDataset, average_precision, rle
from timm_halonet.detection.drawing import draw_detections

from ..support.detection_samples import discs, write_masks


def naive_ap(truth, results, max_dets, threshold):
    """One class, one IoU threshold, as the COCO paper's page defines it: 101 recalls, interpolated precision."""
    matched, scored, count = set(), [], len(truth["annotations"])

    def iou(a, b):
        w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        inter = max(w, 0) * max(h, 0)
        return inter / (a[2] * a[3] + b[2] * b[3] - inter)

    for image in truth["images"]:
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        found = sorted((r for r in results if r["image_id"] == image["id"]), key=lambda r: -r["score"])[:max_dets]
        for result in found:
            free = [(iou(result["bbox"], a["bbox"]), a["id"]) for a in own if a["id"] not in matched]
            best = max(free, default=(0, None))
            if best[0] >= threshold:
                matched.add(best[1])
            scored.append((result["score"], best[0] >= threshold))
    scored.sort(key=lambda pair: -pair[0])
    hits = np.cumsum([hit for _, hit in scored])
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / count
    steps = np.linspace(0, 1, 101)
    return np.mean([max(precision[recall >= r - 1e-9], default=0.0) for r in steps])


def test_average_precision_equals_a_naive_one():
    rng = np.random.default_rng(0)
    images = [{"id": i, "height": 500, "width": 500} for i in (1, 2)]
    annotations, results = [], []
    for image in images:
        for n in range(150):  # more than COCO's 100, on a grid so that boxes of one image do not overlap
            x, y = 30 * (n % 15) + 3, 30 * (n // 15) + 3
            w, h = rng.uniform(10, 24, 2).tolist()
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image["id"], "category_id": 1, "bbox": [x, y, w, h]}
            )
            annotations[-1].update(area=w * h, iscrowd=0)
            if rng.random() < 0.9:
                box = (np.array([x, y, w, h]) + rng.normal(0, 2.0, 4)).tolist()
                results.append({"image_id": image["id"], "category_id": 1, "bbox": box, "score": rng.random()})
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    for limit in (100, 500):
        scores = average_precision(truth, results, max_dets=limit)["box"]
        for metric, threshold in (("AP50", 0.5), ("AP75", 0.75)):
            assert scores[metric] == pytest.approx(naive_ap(truth, results, limit, threshold), abs=2e-3)
        mean = np.mean([naive_ap(truth, results, limit, t) for t in np.arange(0.5, 0.96, 0.05)])
        assert scores["AP"] == pytest.approx(mean, abs=2e-3)
        assert scores["APl"] is None and scores["APs"] == scores["AP"]
    few, many = (average_precision(truth, results, max_dets=limit)["box"]["AR"] for limit in (100, 500))
    assert many > few + 0.05
    assert average_precision(truth, [], max_dets=100)["box"]["AP"] == 0.0


def test_perfect_masks_score_one(tmp_path):
    """Through the whole chain: truth encoded, given back as detections; and masks that miss a third lose AP75."""
    truth = MaskDataset(write_masks(tmp_path, train=3), "train").ground_truth()
    results = [
        {**{k: a[k] for k in ("image_id", "category_id", "bbox", "segmentation")}, "score": 0.9}
        for a in truth["annotations"]
    ]
    scores = average_precision(truth, results)
    assert scores["mask"]["AP"] == scores["box"]["AP"] == 1.0
    for result in results:
        mask = rle.decode(result["segmentation"], 64, 64).copy()
        rows = np.flatnonzero(mask.any(axis=1))
        mask[rows[: int(0.4 * len(rows))]] = 0
        result["segmentation"] = rle.encode(mask)
    scores = average_precision(truth, results)
    assert scores["box"]["AP"] == 1.0 and scores["mask"]["AP50"] == 1.0 and scores["mask"]["AP75"] < 0.5


def test_size_of_a_mask_is_its_own():
    """A false detection counts among the small ones by its mask, whatever its box."""
    small, other = np.zeros((2, 200, 200), np.uint8)
    small[:20, :20] = other[100:120, 100:120] = 1
    truth = {
        "images": [{"id": 1, "height": 200, "width": 200}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 20], "segmentation": rle.encode(small)}
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    truth["annotations"][0].update(area=400, iscrowd=0)
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [80, 80, 100, 100], "segmentation": rle.encode(other), "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 20], "segmentation": rle.encode(small), "score": 0.8},
    ]
    scores = average_precision(truth, results)
    assert scores["mask"]["APs"] == 0.5 and scores["box"]["APs"] == 1.0


def test_pictures():
    picture, _ = next(discs(2, 0))
    image = torch.from_numpy(picture).permute(2, 0, 1)
    found = {"boxes": torch.tensor([[10.0, 10.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    drawn = draw_detections(image, found, ["disc"])
    changed = (drawn != image).any(0)
    assert changed[10, 10:30].all() and not changed[14:26, 14:26].any() and not changed[40:].any()
    assert torch.equal(draw_detections(image, {k: v[:0] for k, v in found.items()}, ["disc"]), image)


def test_overlapping_masks_show_the_first():
    image = torch.full((3, 20, 20), 200, dtype=torch.uint8)
    first, second = np.zeros((2, 20, 20), dtype=np.uint8)
    first[5:15, 5:15], second[5:15, 10:20] = 1, 1
    found = {"boxes": torch.tensor([[5.0, 5.0, 15.0, 15.0], [10.0, 5.0, 20.0, 15.0]]), "labels": torch.tensor([1, 1])}
    found["rles"] = [rle.encode(first), rle.encode(second)]
    drawn = draw_detections(image, found, ["disc"], boxes=False)
    assert torch.equal(drawn[:, 5:15, 5:10], drawn[:, 5:15, 10:15])  # one colour over all of the first
    assert not torch.equal(drawn[:, 5:15, 10:15], drawn[:, 5:15, 15:20])
    assert torch.equal(drawn[:, :5], image[:, :5])


@pytest.mark.parametrize("ids", [[0, 1, 2], [-1, 0, 1], [-3, -2, -1], [5, 0, 2**63]])
def test_ids_do_not_change_the_scores(ids):
    """COCO's matching takes 0 and less for no match; Roboflow's exports begin at 0."""
    boxes = [[5, 5, 20, 20], [40, 40, 30, 30], [5, 50, 20, 20]]
    truth = {
        "images": [{"id": 0, "height": 100, "width": 100}],
        "annotations": [
            {"id": i, "image_id": 0, "category_id": 0, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, box in zip(ids, boxes, strict=True)
        ],
        "categories": [{"id": 0, "name": "a"}],
    }
    results = [{"image_id": 0, "category_id": 0, "bbox": box, "score": 0.9} for box in boxes]
    assert average_precision(truth, results)["box"]["AP"] == 1.0
    assert [a["id"] for a in truth["annotations"]] == ids  # as they were
