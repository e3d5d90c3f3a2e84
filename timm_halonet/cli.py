"""The `timm-halonet` command."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .benchmark import run as benchmark
from .detection import command as detection
from .report.files import json_text
from .report.streams import any_text

DEFAULT_MODEL = "halonet_h0"
PICTURE = ".png, .jpg, .svg or .pdf (default {})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 for success, 1 where something failed (argparse exits with 2)."""
    with any_text():
        try:
            args = _parser().parse_args(detection.expand_config(sys.argv[1:] if argv is None else argv))
            return args.run(args)
        except (ValueError, RuntimeError, OSError) as e:
            print(f"timm-halonet: error: {' '.join(str(e).splitlines())}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("timm-halonet: interrupted", file=sys.stderr)
            return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="timm-halonet", description="HaloNets for timm.")
    commands = parser.add_subparsers(dest="command", required=True)

    classify = commands.add_parser("classify", help="say what is in photos")
    classify.add_argument("photos", nargs="+", metavar="PHOTO|FOLDER", help="anything that Pillow reads")
    classify.add_argument("--topk", type=int, default=5, metavar="K", help="labels a photo (default 5)")
    classify.add_argument("--json", action="store_true", help="one JSON object a line and photo")
    classify.add_argument("--batch-size", type=int, default=16, metavar="N")
    classify.set_defaults(run=_classify)

    attend = commands.add_parser("attend", help="draw where a model looks from a position, stage by stage")
    attend.add_argument("photo", metavar="PHOTO")
    attend.add_argument("--at", required=True, type=_position, metavar="Y,X", help="position in pixels of the photo")
    attend.add_argument("--out", default="attention.png", metavar="PICTURE", help=PICTURE.format("attention.png"))
    attend.set_defaults(run=_attend)

    for command in (classify, attend):
        command.add_argument(
            "--model",
            default=DEFAULT_MODEL,
            metavar="NAME",
            help=f"name in timm, local-dir:FOLDER or hf-hub:ORG/NAME (default {DEFAULT_MODEL})",
        )
        command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps ...")

    models = commands.add_parser("list", help="the architectures of this package and the weights that exist")
    models.add_argument("--macs", action="store_true", help="with billions of multiply-adds of one image")
    models.add_argument("--json", action="store_true")
    models.set_defaults(run=_list)

    verify = commands.add_parser("verify", help="check a checkpoint: config, hash, tensors, values, stored logits")
    verify.add_argument("checkpoint", metavar="FOLDER|NAME", help="a folder, a name in timm or hf-hub:ORG/NAME")
    verify.add_argument(
        "--write-check", action="store_true", help="first write the hash and the logits of now into FOLDER/config.json"
    )
    verify.set_defaults(run=_verify)

    publish = commands.add_parser("publish", help="verify a checkpoint folder and upload it to the Hugging Face Hub")
    publish.add_argument("folder", metavar="FOLDER")
    publish.add_argument("--repo", required=True, metavar="ORG/NAME", help="made if it does not exist")
    publish.add_argument("--private", action="store_true", help="a private repository; a public one is refused")
    publish.add_argument("--dry-run", action="store_true", help="say what would be uploaded, without any network")
    publish.add_argument("--message", metavar="TEXT", help="of the commit")
    publish.set_defaults(run=_publish)

    convert = commands.add_parser("convert", help="turn a checkpoint of a model's authors into a checkpoint folder")
    convert.add_argument("source", metavar="SRC", help="a file of torch.save, loaded as weights only, or safetensors")
    convert.add_argument("destination", metavar="DST", help="the folder; made if it does not exist")
    convert.add_argument(
        "--model", required=True, metavar="NAME", help="an architecture that `timm-halonet list` lists"
    )
    convert.add_argument("--force", action="store_true", help="replace the weights and config.json that DST has")
    convert.set_defaults(run=_convert)

    plot = commands.add_parser("plot", help="curves of loss, accuracy and average precision of training runs")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="a folder that holds summary.csv, or such a file")
    plot.add_argument("--out", default="curves.png", metavar="PICTURE", help=PICTURE.format("curves.png"))
    plot.set_defaults(run=_plot)

    detection.add_parser(commands)

    bench = commands.add_parser("bench", help="measure speed and memory beside timm's and other ways to attend")
    benchmark.add_arguments(bench)
    bench.set_defaults(run=benchmark.run)
    return parser


def _position(text: str) -> tuple[int, int]:
    try:
        y, x = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected Y,X in pixels such as 120,200, got {text!r}") from None
    return y, x


def _classify(args: argparse.Namespace) -> int:
    from huggingface_hub.utils import tqdm

    from . import inference

    files = inference.find_photos(args.photos)
    device = inference.choose_device(args.device)
    model = inference.load_model(args.model)
    predictions = inference.classify(model, files, topk=args.topk, device=device, batch_size=args.batch_size)
    # a bar where there is something to wait for, and somebody who watches
    bar = tqdm(predictions, total=len(files), unit="photo", disable=None if len(files) > 1 else True)
    failed = 0
    for prediction in bar:
        if prediction.error is not None:
            failed += 1
            tqdm.write(f"timm-halonet: error: {prediction.error}", file=sys.stderr)
            if not args.json:
                continue
        if args.json:
            text = json_text(prediction.to_dict(), sys.stdout.encoding or "utf-8")
        else:
            text = "\n".join([prediction.file, *(f"  {100 * p:5.1f} %  {name}" for _, name, p in prediction.labels)])
        tqdm.write(text, file=sys.stdout)
    if failed:
        print(f"timm-halonet: {failed} of {len(files)} files could not be read", file=sys.stderr)
    return 1 if failed else 0


def _attend(args: argparse.Namespace) -> int:
    from timm.data import resolve_data_config
    from torchvision.transforms.v2 import functional as tv

    from . import inference
    from .report.attention import attention_of, draw
    from .report.plots import check_output, save

    check_output(args.out)
    photo = inference.open_photo(args.photo)
    y, x = args.at
    if not (0 <= y < photo.height and 0 <= x < photo.width):
        raise ValueError(
            f"--at {y},{x} lies outside the photo of {photo.height} x {photo.width} pixels (height, width)"
        )
    device = inference.choose_device(args.device)
    model = inference.load_model(args.model).to(device)
    data = resolve_data_config(model=model)
    # the whole photo, its sides kept in proportion: these models take any size
    side = min(data["input_size"][1:])
    scale = side / min(photo.size)
    size = [max(1, round(photo.height * scale)), max(1, round(photo.width * scale))]
    image = tv.to_dtype(tv.to_image(photo.resize((size[1], size[0]))), scale=True)
    image = tv.normalize(image, list(data["mean"]), list(data["std"]))[None].to(device)
    at = (y / photo.height, x / photo.width)
    print(save(draw(photo, attention_of(model, image, at), at), args.out))
    return 0


def _list(args: argparse.Namespace) -> int:
    from .registry import listing

    rows = listing(macs=args.macs)
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .checkpoints import verify

    checkpoint = verify.find_checkpoint(args.checkpoint)
    if args.write_check:
        if not Path(args.checkpoint.removeprefix("local-dir:")).is_dir():
            raise ValueError(f"--write-check needs a folder, got {args.checkpoint!r}")
        checkpoint = verify.write_check(checkpoint)
    for step, found in verify.verify(checkpoint):
        print(f"{step}: {found}", flush=True)
    return 0


def _publish(args: argparse.Namespace) -> int:
    from .checkpoints.publish import publish

    publish(args.folder, args.repo, private=args.private, dry_run=args.dry_run, message=args.message)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .checkpoints.convert import convert

    for step, found in convert(args.source, args.destination, args.model, force=args.force):
        print(f"{step}: {found}", flush=True)
    return 0


def _plot(args: argparse.Namespace) -> int:
    from .report.plots import check_output, draw_runs, save
    from .report.summary import read_run

    check_output(args.out)
    print(save(draw_runs([read_run(run) for run in args.runs]), args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
