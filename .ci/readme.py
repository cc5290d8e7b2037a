"""README.md from nbs/index.ipynb, without Quarto. usage: readme.py (writes README.md) | readme.py demo|test (prints the README's command)"""
import posixpath
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def from_root(target: str) -> str:
    "A link as seen from nbs/, as seen from the root of the repository."
    return target if re.match(r"[a-z]+:|#|/", target) else posixpath.normpath(posixpath.join("nbs", target))


def link_files(text: str) -> str:
    "`CHANGELOG.md` and its like as links: the site has no such pages, the repository has."
    return re.sub(r"`([A-Z]+(?:\.md)?)`", lambda m: f"[{m[1]}]({m[1]})" if (root / m[1]).is_file() else m[0], text)


def readme() -> str:
    "The index notebook as Markdown: no front matter, hidden cells or directives."
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(root / "nbs/index.ipynb", as_version=4)
    notebook.cells = [c for c in notebook.cells if c.cell_type != "raw" and not re.search(r"^#\|\s*(hide|default_exp)\b", c.source, re.M)]
    for cell in notebook.cells:
        if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        else: cell.source = link_files(re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + from_root(m[2]), cell.source))
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    note = "<!-- Written from nbs/index.ipynb by .ci/readme.py. Do not edit. -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def setup_command(ends_in: str) -> str:
    "The README's one-line command that sets everything up and ends in `aam demo` or in the tests."
    shown = re.findall(r"^```bash\n(python3 -m venv .*)\n```$", (root / "README.md").read_text(encoding="utf-8"), re.M)
    (command,) = [c for c in shown if c.endswith(dict(demo="aam demo", test="pytest")[ends_in])]
    return command


if __name__ == "__main__":
    if len(sys.argv) > 1: print(setup_command(sys.argv[1]))
    else: (root / "README.md").write_text(readme(), encoding="utf-8")
