"The site: its pages say what the code says, nbdev can process them, and no link leads nowhere."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

root = Path(__file__).resolve().parent.parent
notebooks = sorted(path for path in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
unnumbered = [path for path in notebooks if not re.match(r"\d", path.name)]
pages = [path for path in unnumbered if path.name != "index.ipynb"]


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def joined(text): return text if isinstance(text, str) else "".join(text)


def texts(path):
    "What a page shows as Markdown or HTML: its prose, its outputs."
    for cell in cells(path):
        if cell["cell_type"] == "markdown": yield joined(cell["source"])
        for output in cell.get("outputs") or []:
            for kind in "text/markdown", "text/html":
                if kind in output.get("data", {}): yield joined(output["data"][kind])


def prose(text):
    "Text without code, where a link is no link."
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "`code`", text)


def links(path):
    "Targets of the links and images of a page."
    for text in map(prose, texts(path)):
        yield from re.findall(r"\]\(<?([^)\s>]+)", text)
        yield from re.findall(r"""<(?:a|img|link|script)\b[^>]*?\b(?:href|src)=["']([^"']+)""", text)


def slug(heading):
    "The anchor that Pandoc gives to a heading."
    if explicit := re.search(r"\{[^}]*#([\w.:-]+)[^}]*\}\s*$", heading): return explicit[1]
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    heading = re.sub(r"[^\w\s.-]", "", heading).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", heading))


def anchors(path):
    "Where a link into a page may lead."
    found = set()
    for text in texts(path):
        text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)
        for heading in re.findall(r"^#{1,6}\s+(.+)$", text, re.M):
            name, n = slug(heading), 0
            while (f"{name}-{n}" if n else name) in found: n += 1
            found.add(f"{name}-{n}" if n else name)
        found |= set(re.findall(r"""\bid=["']([^"']+)""", text))
    return found


def page_of(target):
    "The notebook behind a page: itself, or the one whose page it names (`table.html` is written from `02_table.ipynb`)."
    if target.exists(): return target
    if target.suffix != ".html": return None
    for path in [*target.parent.glob("*.ipynb")]:
        if re.sub(r"^\d+\w*_", "", path.stem) == target.stem: return path


def broken_links(folder, processed=False):
    "Every link of every page under `folder` that leads nowhere. nbdev writes links from the root of the site; in our own text they would be mistakes."
    folder = folder.resolve()
    for path in sorted(folder.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        for link in links(path):
            if re.match(r"(https?|mailto|data):", link): continue
            file, _, anchor = link.partition("#")
            target = folder / file[1:] if processed and file.startswith("/") else (path.parent / file).resolve() if file else path
            page = page_of(target)
            if page is None or not target.is_relative_to(folder): yield f"{path.relative_to(folder)}: {link} leads nowhere"
            elif anchor and page.suffix == ".ipynb" and anchor not in anchors(page): yield f"{path.relative_to(folder)}: {link}: no heading of that name"


def missing_files(folder):
    "What `_quarto.yml` names and `folder` lacks."
    site = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8"))

    def entries(node):
        if isinstance(node, str) and node.endswith((".ipynb", ".css", ".yml", ".svg", ".png", ".scss")): yield node
        if isinstance(node, dict): node = list(node.values())
        if isinstance(node, list):
            for child in node: yield from entries(child)

    return [name for name in entries(site) if name != "nbdev.yml" and not (folder / name).exists()]


def test_checker_finds_what_is_broken(tmp_path):
    def write(name, *sources): (tmp_path / name).write_text(json.dumps(dict(cells=[dict(cell_type="markdown", source=s) for s in sources])))

    write("02_table.ipynb", "# table", "## Rarefied `counts`, twice", "## Rarefied counts twice")
    write("index.ipynb", "[fine](02_table.ipynb) [fine](02_table.ipynb#rarefied-counts-twice-1) [fine](table.html) [fine](https://a.b) `[code](x)`\n```\n[code](y)\n```")
    assert list(broken_links(tmp_path)) == []
    write("index.ipynb", "[a](03_gone.ipynb) [b](02_table.ipynb#gone) ![c](images/gone.svg) <img src='gone.png'> [d](../outside.md) [e](/table.html)")
    assert len(list(broken_links(tmp_path))) == 6 and len(list(broken_links(tmp_path, processed=True))) == 5


def test_notebooks_have_no_broken_link():
    assert list(broken_links(root / "nbs")) == []
    assert missing_files(root / "nbs") == []


def test_each_kind_of_page_is_there():
    names = {str(path.relative_to(root / "nbs")) for path in pages}
    assert names >= {"getting_started.ipynb", "guide.ipynb", "how_it_works.ipynb", "tutorials/quickstart.ipynb", "tutorials/pretrain_finetune.ipynb"}
    assert not [path.name for path in pages if re.search(r"^#\|\s*(export|default_exp)", "".join(joined(c["source"]) + "\n" for c in cells(path)), re.M)]


@pytest.mark.parametrize("path", pages, ids=lambda path: path.stem)
def test_page_was_run(path):
    "Pages keep their outputs, without the messages of training and the paths of whoever ran them."
    code = [c for c in cells(path) if c["cell_type"] == "code"]
    assert any(c["outputs"] for c in code), f"run: python .ci/pages.py {path.relative_to(root)}"
    for cell in code:
        for output in cell["outputs"]:
            assert output.get("name") != "stderr" and output["output_type"] != "error"
            text = joined(output.get("text", "")) + "".join(joined(v) for k, v in output.get("data", {}).items() if k.startswith("text/"))
            assert str(root) not in text and "/tmp" not in text, text
    assert path.stat().st_size < 400_000


def test_guide_shows_the_options_as_they_are():
    from aam.cli import commands, load_command
    from aam.config import option_table

    shown = "\n".join(texts(root / "nbs/guide.ipynb"))
    for name in commands:
        function = load_command(name)
        for options in function.groups.values():
            assert option_table(options) in shown, f"{options.__name__}: run: python .ci/pages.py nbs/guide.ipynb"
        if function.plain: assert option_table(function) in shown, f"aam {name}: run: python .ci/pages.py nbs/guide.ipynb"
        assert f"`aam {name}`" in shown


@pytest.mark.parametrize("names", ["target_transform_names", "loss_type_names", "fusion_names", "scheduler_names"])
def test_guide_explains_every_choice(names):
    from aam import config

    choices = getattr(config, names)
    rows = re.findall(r"^\| `([\w-]+)` \|", "\n".join(texts(root / "nbs/guide.ipynb")), re.M)
    assert [name for name in choices if name not in rows] == []


@pytest.fixture(scope="session")
def processed(once):
    "The project as nbdev-proc-nbs leaves it, in a copy, with a stub in the place of Quarto."
    def build(folder):
        folder.mkdir()
        for name in "pyproject.toml", "settings.ini", "README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "_quarto.yml": shutil.copy(root / name, folder)
        for name in "nbs", "aam": shutil.copytree(root / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        stub = folder / "bin" / "quarto"
        stub.parent.mkdir()
        stub.write_text("#!/bin/sh\nexit 0\n")
        stub.chmod(0o755)
        env = {**os.environ, "PATH": os.pathsep.join([str(stub.parent), str(Path(sys.executable).parent), os.environ["PATH"]]), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        done = subprocess.run([Path(sys.executable).with_name("nbdev-proc-nbs"), "--n-workers", "2"], cwd=folder, env=env, capture_output=True, text=True, timeout=900)
        (folder / "said").write_text(f"{done.returncode}\n{done.stdout}{done.stderr}")

    return once("site", build)


@pytest.mark.slow
def test_nbdev_processes_every_notebook_without_a_word(processed):
    code, _, said = (processed / "said").read_text().partition("\n")
    assert code == "0" and said.strip() == "", said[-3000:]
    assert sorted(p.relative_to(processed / "_proc") for p in (processed / "_proc").rglob("*.ipynb")) == [p.relative_to(root / "nbs") for p in notebooks]


@pytest.mark.slow
def test_processed_pages_have_no_broken_link(processed):
    assert list(broken_links(processed / "_proc", processed=True)) == []
    assert missing_files(processed / "_proc") == []


@pytest.mark.slow
def test_processed_modules_document_what_they_export(processed):
    for path in (processed / "_proc").glob("[0-9]*_*.ipynb"):
        shown = set(re.findall(r"^### (\w+)", "\n".join(texts(path)), re.M))
        module = ast.parse((root / "aam" / (re.sub(r"^\d+_", "", path.stem) + ".py")).read_text(encoding="utf-8"))
        exported = next(ast.literal_eval(n.value) for n in module.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
        defined = {n.name for n in module.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        assert defined & set(exported) <= shown, f"{path.name}: {sorted(defined & set(exported) - shown)}"


def test_cells_that_import_do_nothing_else():
    "nbdev-proc-nbs runs every cell with an import, alone: what else is in it may lack what it needs."
    mixed = []
    for path in [path for path in notebooks if path not in unnumbered]:
        for cell in cells(path):
            source = joined(cell["source"])
            if cell["cell_type"] != "code" or re.search(r"^#\|\s*(export|default_exp|eval: *false)", source, re.M): continue
            kinds = {type(node) for node in ast.parse(re.sub(r"^\s*[%!].*", "pass", source, flags=re.M)).body}
            if kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign}: mixed.append(f"{path.name}: {source.splitlines()[0]}")
    assert mixed == [], "split off the imports"
