"""The notebooks of docs/notebooks run from top to bottom, with small parameters."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra notebooks")
nbclient = pytest.importorskip("nbclient", reason="needs the extra notebooks")
pytest.importorskip("ipykernel", reason="needs the extra notebooks")
pytest.importorskip("skimage", reason="needs the extra notebooks")

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"


def run(name, folder, **parameters):
    """The notebook, run in `folder` with other values of its parameters; raises where a cell does."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for key, value in parameters.items():
        cell.source, count = re.subn(rf"^{key} = [^#\n]*", f"{key} = {value!r}  ", cell.source, flags=re.MULTILINE)
        assert count == 1, f"{name}.ipynb has no parameter {key}"
    client = nbclient.NotebookClient(
        notebook, timeout=550, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    return client.execute()  # raises where a cell does


def printed(notebook):
    return "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )


def test_classify(tmp_path):
    notebook = run("classify", tmp_path, EPOCHS=1, PHOTOS=8)
    assert "goldfish" in printed(notebook)
    assert not list(tmp_path.iterdir())  # nothing is left in the reader's folder


def test_classify_with_photos_of_the_user(tmp_path):
    from PIL import Image

    for kind in ("ant", "bee"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for n in range(4):
            Image.new("RGB", (40, 30), (60 * n, 0, 0)).save(tmp_path / "photos" / kind / f"{n}.png")
    run("classify", tmp_path, DATA=str(tmp_path / "photos"), EPOCHS=1, PHOTOS=4)


def test_nuclei(tmp_path):
    pytest.importorskip("faster_coco_eval", reason="needs the extra detection")
    notebook = run("nuclei", tmp_path, MINUTES=0.05, PHOTOS=8)
    assert re.search(r"\d+ found, \d+ drawn", printed(notebook))
    assert not list(tmp_path.iterdir())
