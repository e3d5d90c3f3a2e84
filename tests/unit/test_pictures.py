"""Pictures with photos in them: the sheet of `attend`, detections, contact sheets. What is shown stands where it is."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from timm_halonet.detection import rle
from timm_halonet.detection.drawing import contact_sheet, draw_detections
from timm_halonet.report.attention import BlockAttention, draw


def pixels(figure):
    """(height, width, 3), 0 to 255."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(float)


def panel(ax, image):
    """The part of the picture that a panel covers."""
    left, bottom, right, top = ax.get_window_extent().extents.round().astype(int)
    return image[image.shape[0] - top : image.shape[0] - bottom, left:right]


def attention(at, size=(8, 10), block=(0, 0, 4, 4), window=(0, 0, 6, 6), name="stages.0.1.self_attn"):
    """All of the attention at one place of the map, a little at others of the window."""
    weights = torch.zeros(size)
    weights[window[0] : window[2], window[1] : window[3]] = 0.002
    weights[at] = 1 - weights.sum()
    return BlockAttention(name, size, block, window, weights)


@pytest.mark.parametrize("at", [(5, 1), (1, 5)])
def test_the_overlay_is_brightest_at_the_largest_weight(at):
    photo = Image.new("RGB", (100, 80), (120, 120, 120))
    figure = draw(photo, [attention(at)], (0.25, 0.2))
    plain, overlay = (panel(ax, pixels(figure)) for ax in figure.axes)
    assert np.ptp(plain[200:].mean(-1)) == 0  # the photo is as it was
    height, width = overlay.shape[0] / 8, overlay.shape[1] / 10
    cell = {
        (y, x): overlay[
            round((y + 0.4) * height) : round((y + 0.6) * height), round((x + 0.4) * width) : round((x + 0.6) * width)
        ].mean()
        for y in range(8)
        for x in range(10)
        if (y, x) != (2, 2)  # where the position is marked
    }
    assert max(cell, key=cell.get) == at
    window, outside = cell[3, 3], cell[7, 9]
    assert cell[at] > window + 20 and window > outside + 5 and outside < 60


def test_the_sheet_names_layers_blocks_and_windows():
    found = [attention((1, 1)), attention((0, 0), (4, 5), (0, 0, 4, 4), (0, 0, 4, 5), "stages.1.2.self_attn")]
    figure = draw(Image.new("RGB", (100, 80)), found, (0.25, 0.2))
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "photo\nat y 0.25, x 0.20",
        "stages.0.1, map 8x10\nblock 4x4, window 6x6",
        "stages.1.2, map 4x5\nblock 4x4, window 4x5",
    ]
    frames = [[(p.get_xy(), p.get_width(), p.get_height()) for p in ax.patches] for ax in figure.axes]
    assert frames == [[], [((0, 0), 6, 6), ((0, 0), 4, 4)], [((0, 0), 5, 4), ((0, 0), 4, 4)]]
    assert [tuple(ax.lines[0].get_xydata()[0]) for ax in figure.axes] == [(0.2, 0.25), (2, 2), (1, 1)]
    image = pixels(figure)
    for ax in figure.axes:  # letters, and the mark in red where it is
        assert image[: image.shape[0] - panel(ax, image).shape[0]].min() < 100
        part = panel(ax, image)
        assert part[round(0.25 * part.shape[0]), round(0.2 * part.shape[1])].tolist() == [255, 32, 32]


@pytest.mark.parametrize("size", [(100, 80), (30, 200), (3000, 1), (1, 3000)])
def test_sheets_of_any_photo_fit_and_no_title_covers_another(size):
    names = [f"encoder.stages.{n}.blocks.11.self_attn" for n in range(3)]
    found = [attention((1, 1), (128, 128), (0, 0, 16, 16), (0, 0, 19, 19), name) for name in names]
    figure = draw(Image.new("RGB", size), found, (0.25, 0.2))
    height, width, _ = pixels(figure).shape
    assert height == 360 and width <= 4 * 960
    boxes = [ax._left_title.get_window_extent() for ax in figure.axes]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes)) and boxes[-1].x1 <= width
    assert all(box.y1 <= height for box in boxes)


COLORS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10)]


def test_a_contact_sheet_holds_the_photos():
    photos = [torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, 40, 80) for color in COLORS]
    rows = [[("red", photos[0]), ("green", photos[1]), ("a" * 300, photos[2])], [("yellow", photos[3])]]
    sheet = np.array(contact_sheet(rows, cell=100))
    assert sheet.shape == (2 * 126 + 8, 3 * 108 + 8, 3)
    for n, color in enumerate(COLORS):
        y, x = 8 + n // 3 * 126, 8 + n % 3 * 108
        assert (sheet[y + 18 : y + 68, x : x + 100] == color).all()  # 80 x 40, fitted into 100 x 100
        assert (sheet[y + 70 : y + 117, x : x + 100] == 255).all()
        assert sheet[y : y + 18, x : x + 100].min() < 100  # its title
        assert (sheet[y : y + 18, x + 100 : x + 108] == 255).all()  # which ends where the next begins
    with pytest.raises(ValueError, match="no pictures for a contact sheet"):
        contact_sheet([[], []])


def test_titles_with_letters_that_cannot_be_written():
    photo = torch.zeros(3, 4, 4, dtype=torch.uint8)
    contact_sheet([[("bad\udcff\n中文", photo)]])
    draw_detections(photo, {"boxes": torch.tensor([[0.0, 0, 3, 3]]), "labels": torch.tensor([1])}, ["x\udcff", "中文"])


def test_each_box_is_drawn_where_it_is():
    image = torch.full((3, 60, 90), 128, dtype=torch.uint8)
    boxes = torch.tensor([[5.0, 8.0, 25.0, 30.0], [40.0, 20.0, 80.0, 50.0]])
    drawn = draw_detections(image, {"boxes": boxes, "labels": torch.tensor([1, 1])}, ["disc"])
    wanted = torch.zeros(60, 90, dtype=torch.bool)
    for left, top, right, bottom in boxes.int().tolist():
        wanted[top : bottom + 1, [left, right]] = True
        wanted[[top, bottom], left : right + 1] = True
    assert torch.equal((drawn != image).any(0), wanted)
    first, second = drawn[:, 8, 10], drawn[:, 20, 50]
    assert not torch.equal(first, second)  # a colour an object
    named = draw_detections(image, {"boxes": boxes, "labels": torch.tensor([1, 2])}, ["disc", "cell"])
    assert ((named != drawn).any(0) & ~wanted).any()  # names, where there is more than one class
    scored = draw_detections(image, {"boxes": boxes, "labels": torch.tensor([1, 1]), "scores": boxes[:, 0]}, ["disc"])
    assert ((scored != drawn).any(0) & ~wanted).any()


def test_each_mask_is_drawn_where_it_is():
    image = torch.full((3, 20, 30), 100, dtype=torch.uint8)
    masks = np.zeros((2, 20, 30), dtype=np.uint8)
    masks[0, 2:8, 3:9], masks[1, 10:15, 20:28] = 1, 1
    boxes = torch.tensor([[3.0, 2, 9, 8], [20, 10, 28, 15]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 1]), "rles": [rle.encode(mask) for mask in masks]}
    drawn = draw_detections(image, found, ["disc"], boxes=False)
    assert torch.equal((drawn != image).any(0), torch.from_numpy(masks.any(0)))
    assert len(drawn[:, 2:8, 3:9].flatten(1).unique(dim=1)[0]) == 1
    assert not torch.equal(drawn[:, 3, 4], drawn[:, 12, 22])
