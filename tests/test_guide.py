"What the user guide names is there: options, commands, defaults, and its example commands run."
import re
import shlex

import pytest

# Options of the guide's tables and examples: the commands that take them, and the default that --help shows (None: it shows none).
promised = """
--table                        pretrain,train,predict,rf-baseline
--unifrac-matrix               pretrain,train
--output-dir                   pretrain,train
--batch-size                   pretrain,train              8
--epochs                       pretrain,train              100
--metadata                     train,rf-baseline
--metadata-column              train,rf-baseline
--pretrained-encoder           train
--freeze-base                  train                       False
--classifier                   train                       False
--out-dim                      train
--target-transform             train                       minmax
--normalize-by                 train
--lr                           pretrain,train              1e-4
--optimizer                    pretrain,train              adamw
--scheduler                    pretrain,train              warmup_cosine
--best-metric                  train                       val_loss
--penalty                      pretrain,train              1.0
--nuc-penalty                  pretrain,train              1.0
--target-penalty               train                       1.0
--count-penalty                pretrain,train              1.0
--loss-type                    train                       huber
--quantiles                    train
--over-penalty                 train                       1.0
--under-penalty                train                       1.0
--loss-config                  train
--bounded-targets              train                       False
--output-activation            train                       none
--learnable-output-scale       train                       False
--regressor-hidden-dims        train
--regressor-dropout            train                       0.0
--categorical-columns          train
--categorical-embed-dim        train                       16
--categorical-fusion           train                       concat
--conditional-output-scaling   train
--categorical-help             train
--embedding-dim                pretrain,train              128
--attention-heads              pretrain,train              4
--attention-layers             pretrain,train              4
--max-bp                       pretrain,train              150
--token-limit                  pretrain,train              1024
--asv-sampling                 pretrain,train              first
--gradient-checkpointing       pretrain,train              True
--asv-chunk-size               pretrain,train              256
--gradient-accumulation-steps  pretrain,train              1
--warmup-steps                 pretrain,train
--patience                     pretrain,train              10
--scheduler-t0                 pretrain,train
--scheduler-t-mult             pretrain,train
--scheduler-eta-min            pretrain,train
--scheduler-patience           pretrain,train
--scheduler-factor             pretrain,train
--nuc-mask-ratio               pretrain,train              0.15
--nuc-mask-strategy            pretrain,train              random
--compile-model                pretrain,train
--fsdp                         pretrain,train              False
--data-parallel                pretrain,train              False
--distributed                  pretrain,train              False
--train-samples                rf-baseline
--val-samples                  rf-baseline
--output                       predict,rf-baseline
--model                        predict
--n-estimators                 rf-baseline                 500
--max-features                 rf-baseline                 sqrt
--random-seed                  rf-baseline                 42
--n-jobs                       rf-baseline                 -1
"""

choices = {
    "--target-transform": "none minmax zscore zscore-category log-minmax log-zscore",
    "--loss-type": "huber mse mae quantile asymmetric",
    "--output-activation": "none relu softplus exp",
    "--categorical-fusion": "concat add gmu cross-attention",
    "--asv-sampling": "first abundance random",
    "--scheduler": "warmup_cosine cosine_restarts plateau onecycle",
    "--nuc-mask-strategy": "random span",
    "--optimizer": "adamw adam sgd",
}


def rows():
    for line in promised.strip().splitlines():
        option, commands, *default = line.split()
        for command in commands.split(","): yield pytest.param(option, command, *default or [None], id=f"{command}{option}")


@pytest.fixture(scope="module")
def pages():
    "Help of each command, by option: its text on one line."
    from aam.cli import commands, load_command
    from aam.config import command_parser

    def entries(name):
        entry, found = [], {}
        for line in command_parser(load_command(name), f"aam {name}").format_help().splitlines():
            if re.match(r"  -", line): entry = found.setdefault(re.search(r"--[\w-]+", line)[0], [])
            entry.append(line.strip())
        return {option: " ".join(lines) for option, lines in found.items()}

    return {name: entries(name) for name in commands}


def agree(shown, wanted):
    try: return float(shown) == float(wanted)
    except ValueError: return shown == wanted


@pytest.mark.parametrize("option, command, default", list(rows()))
def test_option_is_in_help_with_its_default(pages, option, command, default):
    text = pages[command].get(option)
    assert text is not None, f"aam {command} --help lacks {option}"
    if default is not None:
        shown = re.search(r"\(default: ([^)]+)\)", text)
        assert shown and agree(shown[1], default), text


@pytest.mark.parametrize("option", choices)
def test_choices_are_those_of_the_guide(pages, option):
    offered = re.search(r"\{([^}]*)\}", pages["train"][option])[1].split(",")
    assert not set(choices[option].split()) - set(offered)


# The guide's example commands, placeholders filled. Where it says `...`, the files follow.
small = "--embedding-dim 16 --attention-layers 1 --attention-heads 2 --kmer-dim 8 --unifrac-branches 12 --max-bp 40 --device cpu --epochs 1"
files = "--table {survey}/table.biom --unifrac-matrix {survey}/unifrac.npy"
column = "--metadata {survey}/metadata.tsv --metadata-column"
examples = {
    "pretrain": f"pretrain {files} --output-dir {{out}} --batch-size 8 --epochs 100",
    "two-stage": f"train {files} {column} soil_ph --output-dir {{out}} --pretrained-encoder {{encoder}} --freeze-base --batch-size 8 --epochs 100",
    "single-stage": f"train {files} {column} soil_ph --output-dir {{out}} --epochs 100",
    "minmax": f"train --target-transform minmax {files} {column} soil_ph --output-dir {{out}}",
    "log-minmax": f"train --target-transform log-minmax {files} {column} soil_moisture --output-dir {{out}}",
    "zscore-category": f'train --target-transform zscore-category --normalize-by "season" {files} {column} soil_ph --output-dir {{out}}',
    "quantile": f"train --loss-type quantile --quantiles 0.1,0.5,0.9 {files} {column} soil_ph --output-dir {{out}}",
    "asymmetric": f"train --loss-type asymmetric --over-penalty 1.0 --under-penalty 2.0 {files} {column} soil_ph --output-dir {{out}}",
    "loss-config": f"""train --loss-config '{{{{"0": "mse", "1": "huber"}}}}' {files} {column} soil_ph,soil_moisture --output-dir {{out}}""",
    "categoricals": f'train --categorical-columns "habitat,season" --categorical-embed-dim 16 --categorical-fusion concat {files} {column} soil_ph --output-dir {{out}}',
    "conditional-scaling": f'train --categorical-columns "habitat,season" --conditional-output-scaling "habitat" {files} {column} soil_ph --output-dir {{out}}',
    "staged-categoricals": f'train --pretrained-encoder {{encoder}} --freeze-base --categorical-columns "habitat,season" {files} {column} soil_ph --output-dir {{out}}',
    "24-gb": f"pretrain --batch-size 2 --gradient-accumulation-steps 16 --token-limit 256 {files} --output-dir {{out}}",
    "medium": f"pretrain --embedding-dim 768 --attention-heads 6 --attention-layers 4 --batch-size 2 --gradient-accumulation-steps 16 {files} --output-dir {{out}}",
    "large": f"pretrain --embedding-dim 1152 --attention-heads 12 --attention-layers 8 --batch-size 12 --gradient-accumulation-steps 4 --warmup-steps 5000 "
             f"--scheduler cosine_restarts --patience 20 {files} --output-dir {{out}}",
    "rf-baseline": f"rf-baseline --table {{survey}}/table.biom {column} soil_ph --train-samples {{trained}}/train_samples.txt --val-samples {{trained}}/val_samples.txt "
                   "--output {out}/rf_predictions.tsv",
    "categorical-help": "train --categorical-help",
}
quick = {"single-stage", "rf-baseline", "categorical-help"}


def written(name):
    "The example as words, its places still to be filled."
    return shlex.split(examples[name].replace("{{", "{").replace("}}", "}"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in quick else [pytest.mark.slow]) for n in examples])
def test_example_runs(aam, survey, request, tmp_path, name):
    "Exit code 0, and what the example is for is there."
    from aam.unifrac import read_distances, write_distances

    words = written(name)
    places = dict(survey=str(survey), out=str(tmp_path))
    write_distances(read_distances(survey / "unifrac.h5"), tmp_path / "unifrac.npy") # not into the survey, which other tests watch
    words = [w.replace("{survey}/unifrac.npy", str(tmp_path / "unifrac.npy")) for w in words]
    for key, fixture, inside in (("encoder", "pretrained", "/checkpoints/best_model.pt"), ("trained", "trained", "")):
        if f"{{{key}}}" in examples[name]: places[key] = f"{request.getfixturevalue(fixture)}{inside}"
    for key, place in places.items(): words = [w.replace(f"{{{key}}}", place) for w in words]
    if words[0] in ("pretrain", "train") and name != "categorical-help":
        words += shlex.split(small if "encoder" not in places else "--device cpu --epochs 1") # a pre-trained encoder brings its own shape
    if words[0] == "rf-baseline": words += ["--n-estimators", "20", "--n-jobs", "1"]
    said = aam(*words)
    if name == "categorical-help": assert "concat" in said.out
    elif words[0] == "rf-baseline": assert (tmp_path / "rf_predictions.tsv").stat().st_size > 0
    else: assert (tmp_path / "checkpoints/best_model.pt").exists() and (words[0] == "pretrain" or (tmp_path / "val_predictions.tsv").exists())
