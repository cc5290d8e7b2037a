"The layout of the project: which notebook may import which, and what each must have."
import ast
import json
import re
from pathlib import Path

import pytest
import yaml

root = Path(__file__).resolve().parent.parent
notebooks = sorted(path for path in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
numbered = {path: int(match[1]) for path in notebooks if (match := re.match(r"(\d+)_", path.name))}
module_of = {path: re.sub(r"^\d+_", "", path.stem) for path in numbered}
number_of = {module_of[path]: number for path, number in numbered.items()}


def cells(path, kind):
    "Sources of the cells of one kind."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def imported(source):
    "Full names of the modules that a piece of Python imports, at any depth."
    source = re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.M)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom): yield node.module or "."


def own_modules(source):
    "Modules of aam that a piece of Python imports."
    return [name.split(".")[1] for name in imported(source) if name.startswith("aam.")]


@pytest.mark.parametrize("path", numbered, ids=lambda path: path.stem)
def test_imports_point_to_smaller_numbers(path):
    for source in cells(path, "code"):
        exported = re.search(r"^#\|\s*export", source, re.M)
        for module in own_modules(source):
            assert module in number_of, f"aam.{module} has no notebook"
            limit = numbered[path] - 1 if exported else numbered[path]  # an example may import the module that it explains
            assert number_of[module] <= limit, f"{path.name} imports aam.{module}"


@pytest.mark.parametrize("path", notebooks, ids=lambda path: path.stem)
def test_notebook_opens_with_title_and_summary(path):
    assert re.match(r"# \S.*\n\n?> \S.*", cells(path, "markdown")[0])


@pytest.mark.parametrize("path", numbered, ids=lambda path: path.stem)
def test_module_has_the_name_of_its_notebook(path):
    names = [m for source in cells(path, "code") for m in re.findall(r"^#\|\s*default_exp\s+(\S+)", source, re.M)]
    assert names == [module_of[path]]


@pytest.mark.parametrize("path", sorted((root / "aam").glob("*.py")), ids=lambda path: path.stem)
def test_modules_do_not_need_nbdev(path):
    assert not [name for name in imported(path.read_text(encoding="utf-8")) if name.split(".")[0] == "nbdev"]


def test_package_imports_nothing_by_itself():
    assert list(imported((root / "aam/__init__.py").read_text(encoding="utf-8"))) == []


def test_sidebar_lists_every_notebook_in_order():
    def entries(contents):
        for entry in contents:
            if isinstance(entry, str): yield entry
            else: yield from entries(entry["contents"])

    listed = list(entries(yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]))
    modules = [name for name in listed if re.match(r"\d", name)]
    assert listed[0] == "index.ipynb" and modules == sorted(modules) and listed[-len(modules):] == modules, "pages first, then modules by number"
    there = [path.relative_to(root / "nbs").as_posix() for path in notebooks]
    assert sorted(listed) == sorted(there), "name each notebook once in the sidebar in _quarto.yml"


def test_tutorials_have_no_numbers_and_export_nothing():
    for path in (root / "nbs/tutorials").glob("*.ipynb"):
        assert path not in numbered and not any(re.search(r"^#\|\s*(export|default_exp)", source, re.M) for source in cells(path, "code"))
