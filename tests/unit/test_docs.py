"""The README and the site's pages: links lead somewhere, code runs, figures are those of the committed files."""

import importlib.util
import json
import re
from pathlib import Path

import choosing
import pytest
import speed_chart
import timm
from PIL import Image

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(ROOT.glob("docs/**/*.md")) + sorted(ROOT.glob("hub_configs/**/*.md"))


def links(text: str) -> list[str]:
    """Targets of links and pictures that are files, without their anchors."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    return [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if ":" not in target]


def test_links_are_found():
    text = "[a](b/c.md#d) ![e](f.png) [g](https://h.i) [j](#k)\n```\n[l](m.md)\n```\n`[n](o.md)`"
    assert links(text) == ["b/c.md", "f.png"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = links(page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_paths_of_pages_in_commands_and_messages_exist():
    """Code, tests and pages name files of docs/ by their paths."""
    files = [*ROOT.glob("timm_halonet/**/*.py"), *ROOT.glob("docs/examples/**/*.py"), *ROOT.glob("docs/**/*.md")]
    named = {path for file in files for path in re.findall(r"docs/[\w/-]+\.(?:md|py)", file.read_text("utf-8"))}
    assert named and [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.integration
def test_the_quickstart_runs(capsys):
    [code] = re.findall(r"## Quickstart\n\n```python\n(.*?)```", README, flags=re.S)
    exec(code, {})
    printed = capsys.readouterr().out
    assert printed.startswith("torch.Size([1, 200]) [(1, 64, 100, 150)")


@pytest.mark.integration
@pytest.mark.parametrize(("name", "needs"), [("quickstart", []), ("deploy", ["onnx", "onnxruntime", "openvino"])])
def test_the_code_of_a_page_runs(name, needs, tmp_path, monkeypatch):
    for module in needs:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page(f"learn/{name}.md"), flags=re.S)
    assert len(blocks) > 2
    exec("\n".join(blocks), {})


def test_the_table_of_models_is_what_timm_makes():
    rows = re.findall(r"^\| `(halonet_h\d)` \| ([\d,]+) \| (\d+) \| [\d.]+ \| ([\d.]+) \|", README, flags=re.M)
    assert [name for name, *_ in rows] == [f"halonet_h{i}" for i in range(8)]
    for name, count, image, top1 in rows:
        parameters = sum(p.numel() for p in timm.create_model(name, device="meta").parameters())
        paper = choosing.FAMILIES["HaloNet, paper"][name]
        assert (int(count.replace(",", "")), int(image), float(top1)) == (parameters, *paper)


def test_eleven_models_have_imagenet_weights():
    uhalonets = timm.list_pretrained("uhalonet_*")
    accelerated = re.findall(r"^\| `([\w.]+_in1k)`", page("models/timm-halo.md"), flags=re.M)
    assert len(uhalonets) == 4 and len(accelerated) == 7
    assert all(timm.models.get_pretrained_cfg(name) for name in accelerated)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_speed_in_the_readme_is_that_of_the_report():
    figures = json.loads(page("reports/speed.json"))
    [layer] = re.findall(r"^\| attention layer.*?\| ([\d.]+)x \| ([\d.]+)x \|", README, flags=re.M)
    [blocked] = re.findall(r"^\| the same without.*?\| ([\d.]+)x \| ([\d.]+)x \|", README, flags=re.M)
    [model] = re.findall(r"^\| `halonet_h1` at 256 px \| ([\d.]+)x \| ([\d.]+)x \|", README, flags=re.M)
    for column, (mode, case) in enumerate((("forward", "inference"), ("training", "training"))):
        assert float(layer[column]) == pytest.approx(speed_chart.layer_speed(figures, mode), abs=0.06)
        assert float(blocked[column]) == pytest.approx(speed_chart.layer_speed(figures, mode, "blocked"), abs=0.06)
        times = figures["cases"][f"model/float32/{case}"]
        assert float(model[column]) == pytest.approx(times["timm halonet_h1"] / times["halonet_h1"], abs=0.06)
        for name, value in times.items():  # and the JSON has what the report's table has
            if name != "timm halonet_h1":
                assert f", {value:g} ms" in page("reports/speed.md")


@pytest.mark.parametrize(("script", "arguments"), [(choosing, ["--markdown", "page.md"]), (speed_chart, [])])
def test_charts_are_drawn_from_committed_figures(script, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("page.md").write_text("<!-- choosing -->\n<!-- /choosing -->\n")
    assert script.main([*arguments, "--plot", "chart.png"]) == 0
    with Image.open("chart.png") as picture:
        assert picture.width > 600
    assert "chart.png" in capsys.readouterr().out
    if arguments:
        assert Path("page.md").read_text().strip() in page("models/choosing.md")


def test_the_page_of_commands_has_every_command():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = hooks.on_page_markdown(page("reference/command-line.md"), page=None)
    titles = re.findall(r"^#+ `timm-halonet ([a-z ]+)`$", text, flags=re.M)
    expected = {"classify", "attend", "list", "verify", "publish", "convert", "plot", "bench", "detect"}
    assert {title for title in titles if " " not in title} >= expected
    assert {f"detect {name}" for name in ("train", "eval", "predict", "compare")} <= set(titles)
    assert (
        text.count("usage: timm-halonet") == len(titles) - 1 and hooks.MARK not in text
    )  # detect has no options itself


def test_links_out_of_the_pages_are_shown_as_paths():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = hooks.on_page_markdown("[H0](../../hub_configs/a.b/README.md) [c](../d.md)", page=None)
    assert text == "H0 (`hub_configs/a.b/README.md` in the repository) [c](../d.md)"
