"""Runs pages of the site and stores what they show; messages of training are left out. usage: pages.py [nbs/guide.ipynb ...] (all pages)"""
import os
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
pages = ["getting_started.ipynb", "guide.ipynb", *sorted(str(p.relative_to(root / "nbs")) for pattern in ("how_*.ipynb", "tutorials/*.ipynb") for p in (root / "nbs").glob(pattern))]


def run(path: Path):
    "Runs a notebook in its own folder and writes its outputs into it."
    from fastcore.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell

    os.chdir(path.parent)
    notebook = read_nb(path)
    CaptureShell(mpl_format="png").run_all(notebook, exc_stop=True)
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type != "code": continue
        cell.execution_count = None
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output: output["execution_count"] = None
            if "metadata" in output: output["metadata"] = {} # as nbdev-clean leaves it
    write_nb(notebook, path)


if __name__ == "__main__":
    for path in [Path(p).resolve() for p in sys.argv[1:]] or [root / "nbs" / p for p in pages]: run(path)
