"What is written in two places says the same thing in both."
import configparser
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aam

if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib

root = Path(__file__).resolve().parent.parent
pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def load(path):
    "A script as a module."
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme = load(root / ".ci/readme.py")


def expected_settings() -> dict:
    "Each key of settings.ini as pyproject.toml, the package or nbdev itself has it."
    from nbdev.config import nbdev_defaults

    project, nbdev = pyproject["project"], {**nbdev_defaults, **pyproject["tool"]["nbdev"]}
    return dict(
        lib_name=project["name"],
        version=aam.__version__,
        description=project["description"],
        author=project["authors"][0]["name"],
        license=project["license"],
        keywords=" ".join(project["keywords"]),
        min_python=project["requires-python"].removeprefix(">="),
        console_scripts=" ".join(f"{name}={target}" for name, target in project["scripts"].items()),
        requirements=" ".join(project["dependencies"]),
        dev_requirements=" ".join(project["optional-dependencies"]["dev"]),
        **{key: str(nbdev[key]) for key in ("lib_path", "nbs_path", "doc_path", "tst_flags", "custom_sidebar")},
    )


def test_settings_ini_agrees_with_pyproject():
    settings = configparser.ConfigParser()
    settings.read(root / "settings.ini", encoding="utf-8")
    assert dict(settings["DEFAULT"]) == expected_settings()


def test_readme_is_the_index_notebook():
    assert (root / "README.md").read_text(encoding="utf-8") == readme.readme(), "run: python .ci/readme.py"


def test_readme_links_lead_somewhere():
    text = (root / "README.md").read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
    assert "nbs/images/overview.svg" in targets
    assert [t for t in targets if not (root / t).exists()] == []


def test_ci_runs_what_readme_shows():
    command = readme.setup_command("test")
    assert "nbdev-test" in command and command.endswith("pytest")
    printed = subprocess.run([sys.executable, root / ".ci/readme.py", "test"], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == command
    script = (root / ".ci/run").read_text(encoding="utf-8")
    assert "command=$(python3 .ci/readme.py test)" in script and '-c "$command"' in script


def test_readme_shows_options_that_exist():
    pytest.importorskip("aam.cli")
    text = (root / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    shown = [line.split() for line in re.findall(r"^aam .*", blocks, re.M)]
    assert {words[1] for words in shown} >= {"pretrain", "train", "predict", "rf-baseline"}
    for words in shown:
        page = subprocess.run([sys.executable, "-m", "aam.cli", words[1], "--help"], capture_output=True, text=True, check=True).stdout
        missing = [w for w in words if w.startswith("--") and not re.search(rf"{w}\b", page)]
        assert missing == [], f"aam {words[1]} has no {missing}"


def test_quarto_configuration_is_one_file():
    link = root / "nbs/_quarto.yml"
    assert link.is_symlink() and link.readlink() == Path("../_quarto.yml")
    assert (root / "nbs/styles.css").exists()


@pytest.mark.parametrize("path", sorted((root / "slurm").iterdir()), ids=lambda path: path.name)
def test_cluster_scripts_are_sound(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    headers = [i for i, line in enumerate(text.splitlines()) if line.startswith("#SBATCH")]
    assert headers == list(range(1, len(headers) + 1)), "SLURM reads no header after the first command"
    assert bool(headers) == (path.suffix == ".sbatch")


@pytest.mark.parametrize("script, given, wanted", [
    ("train", dict(TREE="a tree.nwk"), ["--tree", "a tree.nwk"]),
    ("train", dict(UNIFRAC="u.h5", ENCODER="e.pt", OPTIONS="--preset small --lr 1e-3"), ["--unifrac-matrix", "u.h5", "--pretrained-encoder", "e.pt", "--preset", "small", "--lr", "1e-3"]),
    ("train", dict(SLURM_NTASKS="2"), ["--distributed"]),
    ("pretrain", dict(TREE="t.nwk"), ["--metadata", "m.tsv", "--tree", "t.nwk"]),
    ("pretrain_multinode", dict(SLURM_NTASKS="8"), ["--fsdp"]),
    ("pretrain", dict(SLURM_NTASKS="8", STRATEGY="distributed"), ["--distributed"]),
    ("array_sweep", dict(SWEEP="SWEEP", SLURM_ARRAY_TASK_ID="2", OPTIONS="--epochs 3"), ["--epochs", "3", "--lr", "1e-3"]),
])
def test_batch_script_hands_its_variables_on(tmp_path, script, given, wanted):
    from aam.cli import load_command
    from aam.config import parse_command

    stub = tmp_path / "srun"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    (tmp_path / "sweep.txt").write_text("--lr 1e-4\n--lr 1e-3\n")
    given = {k: v.replace("SWEEP", str(tmp_path / "sweep.txt")) for k, v in given.items()}
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "MODULES": "", "TABLE": "t.biom", "METADATA": "m.tsv", "COLUMN": "age", "OUT": "runs/age", **given}
    said = subprocess.run(["bash", root / f"slurm/{script}.sbatch"], env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    command = "pretrain" if script.startswith("pretrain") else "train"
    assert said[:2] == ["aam", command] and said[-len(wanted):] == wanted
    parsed = parse_command(load_command(command), said[2:], f"aam {command}")
    assert parsed["metadata"].name == "m.tsv" and str(parsed["resume_from"]) == "auto" and parsed["save_every_steps"] == 200
    assert str(parsed["output_dir"]) == ("runs/age/2" if script == "array_sweep" else "runs/age")
    if command == "train": assert parsed["metadata_column"] == "age"
    del env["TABLE"]
    assert subprocess.run(["bash", root / f"slurm/{script}.sbatch"], env=env, capture_output=True).returncode != 0


def test_documented_jobs_name_scripts_and_their_variables():
    known = set(re.findall(r"\b[A-Z][A-Z_]+\b", (root / "slurm/job.sh").read_text() + (root / "slurm/array_sweep.sbatch").read_text()))
    pages = [*(root / "slurm").glob("*.sbatch"), *(root / "nbs").glob("*.ipynb"), *(root / "nbs/tutorials").glob("*.ipynb")]
    jobs = [job for page in pages for job in re.findall(r"sbatch --[^\n`]*--export=ALL,(\S+?)(?:,OPTIONS=\S+ \S+)? slurm/(\w+\.sbatch)", page.read_text(encoding="utf-8"))]
    assert len(jobs) >= 10
    for variables, script in jobs:
        assert (root / "slurm" / script).exists()
        assert {word.split("=")[0] for word in variables.split(",")} <= known, variables
