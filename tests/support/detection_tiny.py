"""A detector, a data set and their Trainer, small enough that a step takes a millisecond."""

import torch

from timm_halonet.detection.configs import FasterRCNNCfg, TrainCfg
from timm_halonet.detection.models import Recipe
from timm_halonet.detection.training import Budget, Trainer


class TinyDetector(torch.nn.Module):
    """Called in training as a detector is: images and targets in, a dict of losses out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 3)
        self.norm = torch.nn.BatchNorm1d(3, affine=False)
        self.recipe = Recipe("faster_rcnn", "none", 2, FasterRCNNCfg())

    def forward(self, images, targets):
        means = torch.stack([image.mean(dim=(1, 2)) for image in images])
        if len(means) > 1:
            means = self.norm(means)
        found = self.layer(means)
        return {"loss_a": (found - 3).square().mean(), "loss_b": found.abs().mean()}


class TinyDataset:
    """Images of one colour; `broken` maps an index to the error that reading it raises."""

    def __init__(self, count, broken=()):
        self.names = [f"{n}.png" for n in range(count)]
        self.broken = dict(broken)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        if index in self.broken:
            raise self.broken[index]
        return torch.full((3, 8, 8), index / 10) + torch.rand(3, 1, 1), {"image_id": index + 1}


def tiny_trainer(out, images=4, epochs=2, cfg=None, broken=(), minutes=None, **kwargs):
    cfg = cfg or TrainCfg(lr=0.1, batch_size=2)
    kwargs = {"log": lambda line: None, **kwargs}
    return Trainer(TinyDetector(), TinyDataset(images, broken), cfg, out, Budget(epochs, minutes), **kwargs)
