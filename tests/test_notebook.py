"""The notebook runs from top to bottom, in a kernel of its own."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import REPOSITORY

NOTEBOOK = REPOSITORY / "notebooks" / "colab.ipynb"


def text_of(cell):
    return "".join(
        output.get("text", "") or "".join(output.get("data", {}).get("text/plain", ""))
        for output in cell.outputs
    )


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    # As in a clone, whose `notebooks` is the kernel's working directory.
    clone = tmp_path / "clone"
    (clone / "notebooks").mkdir(parents=True)
    for name in ("cnn", "configs", "train.py"):
        (clone / name).symlink_to(REPOSITORY / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code), "the notebook is kept without outputs"
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = parameters.source.replace("= 10.0", "= 0.05")
    folder = {"metadata": {"path": clone / "notebooks"}}
    NotebookClient(notebook, timeout=280, resources=folder).execute()

    texts = [text_of(cell) for cell in code]
    assert any("test images" in text for text in texts)
    assert any("confusion (rows" in text for text in texts)
    cifar10 = next(text for text in texts if "10,000 test images" in text or "left out: " in text)
    assert "%" in cifar10 or "cannot reach" in cifar10
    assert "epoch 5: loss" in texts[-1]
    pictures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3  # curves, confusion matrix, the classified picture
