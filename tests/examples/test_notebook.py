import os

import pytest

from example_scripts import ROOT, build_toy


nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_outputs_are_committed_with_the_plot_and_without_errors_or_paths(notebook):
    cells = code_cells(notebook)
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("text/html" in output.get("data", {}) for output in cells[-1].outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert str(ROOT) not in NOTEBOOK.read_text() and os.path.expanduser("~/") not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_notebook_runs_on_a_toy_model(notebook, tmp_path):
    toy = build_toy(tmp_path / "toy")
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = f"MODEL = {str(toy)!r}\nSAMPLES, ANCHORS = 8, 8"
    (imports,) = (cell for cell in notebook.cells if 'sys.path.insert(0, "..")' in cell.source)
    imports.source = imports.source.replace('".."', repr(str(ROOT)))
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    assert (tmp_path / "loramoe-demo" / "adapter" / "adapter_model.safetensors").exists()
    assert "loss on ordinary text" in str(code_cells(notebook)[-1].outputs)
