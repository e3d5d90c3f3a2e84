"""What Ray Data runs: photos are read and decoded by tasks, and embedded by actors that hold the model."""

import contextlib
import logging
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..files import one_line, read_file
from ..photos import decode_photo, photo_error, resizable
from .shards import read_samples
from .sources import Source, is_uri, printable

OUTPUTS = ("features", "probabilities")
_BATCHES = 4  # in a block of photos: what one task decodes


def vectors(model: nn.Module, x: torch.Tensor, output: str) -> torch.Tensor:
    """One vector an image.

    Args:
        x: (N, 3, H, W), normalised.
        output: "features" for what the classifier sees, (N, head's width); "probabilities" for (N, classes).

    Raises:
        ValueError: a model that gives something else.
    """
    if output == "features":
        found = model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
    else:
        found = model(x).float().softmax(dim=-1)
    if not isinstance(found, torch.Tensor) or found.ndim != 2:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"{type(model).__name__} does not give one vector a photo but {shape}; take a classifier")
    return found.float()


class Decoder:
    """From files to pixels, in tasks.

    Args:
        data: timm's data config of the model.
        batch_size: samples of a shard that are decoded at a time.
    """

    def __init__(self, data: dict[str, Any], batch_size: int) -> None:
        from timm.data import create_transform

        # as timm's loader does it: pixels in 8 bits here, normalised next to the model
        self.transform = create_transform(**data, use_prefetcher=True)
        self.size = tuple(data["input_size"])
        self.side = round(min(self.size[1:]) / (data["crop_pct"] or 1))
        self.batch_size = batch_size

    def photos(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Photos by their number and path: rows with source, name (empty), label (empty), error and image."""
        rows = []
        for number, path in zip(batch["source"], batch["path"], strict=True):
            place = os.fsdecode(path)
            rows.append((number, "", "", *self._decode(place, partial(_read, place))))
        return _columns(rows)

    def shards(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        """The samples of shards, as `photos`. A shard that breaks off gives those before, and a row with an error."""
        for number, path in zip(batch["source"], batch["path"], strict=True):
            rows = []
            try:
                for sample in read_samples(os.fsdecode(path)):
                    pixels, error = self._decode(sample.name, sample.image)
                    rows.append((number, sample.name, sample.label(), pixels, error))
                    if len(rows) == self.batch_size:
                        yield _columns(rows)
                        rows = []
            except (OSError, ValueError, tarfile.TarError, EOFError, zlib.error) as e:
                rows.append((number, "", "", np.zeros(self.size, np.uint8), f"the shard cannot be read on ({e})"))
            if rows:
                yield _columns(rows)

    def _decode(self, where: str, read: Callable[[], bytes]) -> tuple[np.ndarray, str]:
        """Pixels, (3, H, W) in 8 bits, and an error, or an empty text."""
        try:
            return np.asarray(self.transform(resizable(decode_photo(read(), where), self.side))), ""
        except Exception as e:  # whatever a decoder raises for a broken file: the other photos go on
            return np.zeros(self.size, np.uint8), photo_error(where, e).removeprefix(f"{one_line(where)}: ")


def _columns(rows: list[tuple[int, str, str, np.ndarray, str]]) -> dict[str, Any]:
    sources, names, labels, images, errors = zip(*rows, strict=True)
    texts = {"name": names, "label": labels, "error": errors}
    columns = {key: np.array([printable(text) for text in column], object) for key, column in texts.items()}
    return {"source": np.array(sources, np.int64), **columns, "image": np.stack(images)}


def _read(place: str) -> bytes:
    if not is_uri(place):
        try:
            return read_file(place)
        except OSError as e:
            raise ValueError(e.strerror or str(e)) from None
    from pyarrow import fs

    system, path = fs.FileSystem.from_uri(place)
    with system.open_input_stream(path) as file:
        return file.read()


class Embedder:
    """From pixels to vectors, in an actor that holds the model.

    Args:
        model: a reference to it in Ray's object store, so that machines need no files of it.
        data: timm's data config of the model.
    """

    def __init__(self, model: Any, data: dict[str, Any], output: str, device: str) -> None:
        import ray

        self.device, self.output = torch.device(device), output
        self.model = ray.get(model[0]).to(self.device)
        mean, std = (torch.tensor(data[name], device=self.device).view(1, -1, 1, 1) * 255 for name in ("mean", "std"))
        self.mean, self.std = mean, std

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The batch with values, (N, width), in place of its pixels."""
        x = torch.tensor(batch.pop("image")).to(self.device).float()
        values = vectors(self.model, (x - self.mean) / self.std, self.output)
        return {**batch, "values": values.cpu().numpy()}


def check_ray() -> None:
    """Whether Ray Data and pyarrow can be imported.

    Raises:
        RuntimeError: they cannot; with the extra that brings them.
    """
    try:
        import pyarrow  # noqa: F401
        import ray.data  # noqa: F401
    except ImportError as e:
        raise RuntimeError(f"embed needs Ray Data ({e}): pip install 'timm_halonet[ray]'") from None


@contextlib.contextmanager
def session() -> Iterator[dict[str, float]]:
    """Ray, started or joined as its own settings say (RAY_ADDRESS), quiet, and stopped if it was started here.

    Yields:
        What the cluster has, such as {"CPU": 8.0, "GPU": 1.0}.

    Raises:
        RuntimeError: Ray is not installed.
    """
    check_ray()
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for handler in logging.getLogger(
        "ray.data"
    ).handlers:  # its file has everything; ours is the one line on the screen
        if not isinstance(handler, logging.FileHandler) and "File" not in type(handler).__name__:
            handler.setLevel(logging.CRITICAL)
    try:
        with ray.data.DataContext.current(context):
            yield ray.cluster_resources()
    finally:
        if ours:
            ray.shutdown()


def run(
    sources: Sequence[Source],
    shards: bool,
    model: nn.Module,
    data: dict[str, Any],
    output: str,
    *,
    batch_size: int,
    workers: int | None,
    device: str,
    resources: dict[str, float],
) -> Iterator[dict[str, np.ndarray]]:
    """Rows in the order of `sources`, some at a time: source (its number), name (within a shard), label (of a shard),
    error (empty for good rows), values (N, width).

    Raises:
        RuntimeError: Ray could not go on: a machine without memory, say.
    """
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy

    decoder = Decoder(data, batch_size)
    places = pa.array([os.fsencode(source.place) for source in sources], pa.binary())
    table = pa.table({"source": pa.array(range(len(sources)), pa.int64()), "path": places})
    step = 1 if shards else batch_size * _BATCHES
    rows = ray.data.from_arrow([table.slice(start, step) for start in range(0, len(table), step)])
    rows = rows.map_batches(decoder.shards if shards else decoder.photos, batch_size=batch_size, batch_format="numpy")
    cpus, on_gpus = int(resources.get("CPU", 1)), device.startswith("cuda")
    # by default one process a GPU, or one a core; a core is left for reading
    most = workers or (int(resources["GPU"]) if on_gpus else max(1, cpus - 1))
    rows = rows.map_batches(
        Embedder,
        batch_size=batch_size,
        batch_format="numpy",
        compute=ActorPoolStrategy(min_size=1, max_size=most),
        fn_constructor_args=([ray.put(model)], data, output, "cuda" if on_gpus else device),
        num_cpus=1 if cpus > 1 and not on_gpus else 0,
        num_gpus=1 if on_gpus else 0,
    )
    try:
        yield from rows.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)
    except ray.exceptions.RayError as e:
        cause = getattr(e, "cause", None) or e
        text = str(cause).strip().partition("\n")[0]
        raise RuntimeError(f"Ray stopped ({type(cause).__name__}: {text}); what is saved stays") from None
