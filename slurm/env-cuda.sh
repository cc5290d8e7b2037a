#!/usr/bin/env bash
# Makes the environment of train.sbatch for NVIDIA GPUs. Once, on a login node, from anywhere: bash slurm/env-cuda.sh
#
# AAM_ENV       where; it must be visible from the compute nodes
# PYTHON        3.10 or newer
# TORCH_INDEX   wheels for another CUDA, such as https://download.pytorch.org/whl/cu126, if the driver is too old for PyPI's
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

AAM_ENV=${AAM_ENV:-$HOME/envs/aam}
PYTHON=${PYTHON:-python3}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "aam needs Python 3.10 or newer: set PYTHON, or load a module that has it")'
"$PYTHON" -m venv "$AAM_ENV"
if [ -n "${TORCH_INDEX:-}" ]; then "$AAM_ENV/bin/pip" install 'torch>=2.9,<2.14' --index-url "$TORCH_INDEX"; fi
"$AAM_ENV/bin/pip" install .

"$AAM_ENV/bin/python" -c 'import torch; print("PyTorch", torch.__version__, "CUDA", torch.version.cuda, "GPU here:", torch.cuda.is_available())'
"$AAM_ENV/bin/aam" --version
echo "made $AAM_ENV"
