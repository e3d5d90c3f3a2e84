"""Next step to a goal: shortest paths on random occupancy grids, imitated from an egocentric map.

The map (arXiv 2103.11374) shows free cells, walls and the goal around the agent, who stands in the centre; what lies
beyond the world is unknown. Breadth-first search says which of the four steps begin a shortest path. Ways to attend are
compared with each other, and with layers that do not attend at all but have as many parameters.
"""

import argparse
import sys
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from runs import TEST_SEED, Batch, Task, main
from torch import nn

from timm_halonet.families.maast import MapAttentionEncoder

UNKNOWN, FREE, WALL, GOAL = range(4)
STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # rows and columns: up, down, left, right
WALLS = 0.3  # share of the cells


def distances(free: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Breadth-first search on many grids at once: steps from `start`, infinite where no path leads.

    free, start: (grids, H, W), boolean, one start a grid -> (grids, H, W) of float32.
    """
    inf = float("inf")
    found = torch.where(start, 0.0, inf)
    while True:
        ring = F.pad(found, (1, 1, 1, 1), value=inf)
        near = torch.stack([ring[:, 2:, 1:-1], ring[:, :-2, 1:-1], ring[:, 1:-1, 2:], ring[:, 1:-1, :-2]]).amin(0)
        further = torch.where(free, torch.minimum(found, near + 1), inf)
        further = torch.where(start, 0.0, further)
        if torch.equal(further, found):
            return found
        found = further


def make_maps(count: int, view: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps (count, view, view) of class ids, best steps (count, 4), boolean, and lengths of the paths (count,).

    The world reaches 2 to view // 2 cells from the agent on each side; the goal is any cell at least two steps away.
    """
    reach, parts, have = view // 2, [], 0
    offset = torch.arange(view) - reach
    while have < count:
        n = max(64, (count - have) * 5 // 4)
        up, down, left, right = torch.randint(2, reach + 1, (4, n, 1), generator=generator)
        rows, cols = (offset >= -up) & (offset <= down), (offset >= -left) & (offset <= right)
        inside = rows[:, :, None] & cols[:, None, :]
        free = inside & (torch.rand(n, view, view, generator=generator) >= WALLS)
        agent = torch.zeros(n, view, view, dtype=torch.bool)
        agent[:, reach, reach] = True
        free |= agent
        reached = distances(free, agent)
        goals = (reached >= 2) & reached.isfinite()
        # the largest of random numbers among them
        lot = torch.rand(n, view * view, generator=generator) * goals.flatten(1)
        goal = F.one_hot(lot.argmax(1), view * view).view(n, view, view).bool()
        steps_left = distances(free, goal)
        centre = steps_left[:, reach, reach]
        best = torch.stack([steps_left[:, reach + y, reach + x] < centre for y, x in STEPS], 1)
        maps = torch.where(inside, torch.where(free, FREE, WALL), UNKNOWN).masked_fill(goal, GOAL)
        solvable = goals.flatten(1).any(1)
        parts.append((maps[solvable], best[solvable], centre[solvable]))
        have += len(parts[-1][0])
    maps, best, lengths = (torch.cat(x)[:count] for x in zip(*parts, strict=True))
    return maps, best, lengths


def straight(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps to a free cell that come nearer to the goal as the crow flies, (count, 4), and how far that is, (count,).

    As far as the crow flies: rows plus columns, walls ignored.
    """
    reach, view = maps.shape[1] // 2, maps.shape[1]
    goal = (maps == GOAL).flatten(1).int().argmax(1)
    away = torch.stack([goal // view - reach, goal % view - reach], 1)
    nearer = torch.stack([(away * torch.tensor(step, device=maps.device)).sum(1) > 0 for step in STEPS], 1)
    can_go = torch.stack([_is_free(maps[:, reach + y, reach + x]) for y, x in STEPS], 1)
    return nearer & can_go, away.abs().sum(1)


def _is_free(cells: torch.Tensor) -> torch.Tensor:
    return (cells == FREE) | (cells == GOAL)


class CellMLP(nn.Module):
    """What is left of a transformer layer without attention: every cell for itself."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, known: torch.Tensor, block_size: tuple[int, int], halo: int) -> torch.Tensor:
        return self.norm(x + self.mlp(x))


class MaxPooled(nn.Module):
    """The encoder with its average over the cells replaced by the maximum."""

    def __init__(self, encoder: MapAttentionEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.encoder.head(self.encoder.forward_features(maps).amax((1, 2))))


class Paths(Task):
    """Encoders with different attention at choosing the next step of a shortest path, judged by accuracy."""

    name = "paths"
    variants: ClassVar = {
        "row": "row attention",
        "axial": "axial attention",
        "halo": "halo attention",
        "global": "global attention",
        "pooled": "no attention, average-pooled",
        "max_pooled": "no attention, max-pooled",
    }
    scores: ClassVar = {"accuracy": "right steps", "detours": "right steps where walls force a detour"}
    options: ClassVar = {
        "view": (11, "side of the map, in cells, odd"),
        "dim": (64, "channels; 128 in the paper"),
        "block_size": (4, "cells, of halo attention"),
        "halo_size": (2, "cells"),
    }
    defaults: ClassVar = dict(steps=1200, batch_size=64, lr=2e-3, test_size=4000)

    def model(self, variant: str, args: argparse.Namespace) -> nn.Module:
        encoder = MapAttentionEncoder(
            "global" if "pooled" in variant else variant,
            num_classes=GOAL,
            dim=args.dim,
            dropout=0.0,  # maps never come twice
            positions="offsets",  # the paper's positions cannot tell left from right
            max_offset=args.view // 2,
            block_size=args.block_size,
            halo_size=args.halo_size,
        )
        if "pooled" in variant:
            hidden = 64 + 2 * args.dim + 2  # the parameters of a layer's attention, put into its MLP
            encoder.layers = nn.ModuleList(CellMLP(args.dim, hidden) for _ in encoder.layers)
        body = MaxPooled(encoder) if variant == "max_pooled" else encoder
        return nn.Sequential(body, nn.Linear(encoder.head.out_features, len(STEPS)))

    def data(self, count: int, args: argparse.Namespace, generator: torch.Generator) -> Batch:
        if args.view < 5 or args.view % 2 == 0:
            raise ValueError(f"--view must be odd and >= 5, for the agent to stand in its centre, got {args.view}")
        maps, best, _ = make_maps(count, args.view, generator)
        return maps, best

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target / target.sum(1, keepdim=True))  # any shortest path is as good

    def judge(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        chosen = torch.cat([model(x).argmax(1) for x in inputs.split(256)])
        right = targets.gather(1, chosen[:, None])[:, 0].float()
        detour = self.detours(inputs, targets)
        return {"accuracy": 100 * right.mean().item(), "detours": 100 * right[detour].mean().item()}

    def detours(self, maps: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """Maps where no step that comes nearer to the goal as the crow flies begins a shortest path."""
        return ~(straight(maps)[0] & best).any(1)

    def notes(self, args: argparse.Namespace) -> str:
        """What simple rules reach, on average over their choices."""
        maps, best = self.data(args.test_size, args, torch.Generator().manual_seed(TEST_SEED))
        reach = args.view // 2
        can_go = torch.stack([_is_free(maps[:, reach + y, reach + x]) for y, x in STEPS], 1)
        nearer, _ = straight(maps)
        nearer = torch.where(nearer.any(1, keepdim=True), nearer, can_go)
        blind, crow = (100 * ((r & best).sum(1) / r.sum(1)).mean().item() for r in (can_go, nearer))
        share = 100 * self.detours(maps, best).float().mean().item()
        return (
            f"Any step that no wall blocks is right in {blind:.1f} % of these maps; one that comes nearer to the goal "
            f"as the crow flies, where there is one, in {crow:.1f} %. Walls force a detour from the first step in "
            f"{share:.1f} %."
        )

    def example(self, args: argparse.Namespace) -> Image.Image:
        """Three maps; the agent blue, with lines along the best steps, the goal orange, unknown cells gray."""
        maps, best, _ = make_maps(3, args.view, torch.Generator().manual_seed(TEST_SEED))
        cell, gap = 16, 20
        side = cell * args.view
        picture = Image.new("RGB", (3 * side + 2 * gap, side), "white")
        pen = ImageDraw.Draw(picture)
        colors = ("#b0b0b0", "#f4f4f4", "#303030", "#d55e00")
        for n, (map_, right) in enumerate(zip(maps.tolist(), best.tolist(), strict=True)):
            left = n * (side + gap)
            for y, row in enumerate(map_):
                for x, kind in enumerate(row):
                    at = (left + cell * x, cell * y)
                    pen.rectangle((*at, at[0] + cell - 2, at[1] + cell - 2), fill=colors[kind])
            cx, cy = left + side // 2 - 1, side // 2 - 1
            pen.ellipse((cx - 5, cy - 5, cx + 5, cy + 5), fill="#0072b2")
            for (y, x), is_best in zip(STEPS, right, strict=True):
                if is_best:
                    pen.line((cx, cy, cx + cell * x, cy + cell * y), fill="#0072b2", width=3)
        return picture


if __name__ == "__main__":
    sys.exit(main(Paths()))
