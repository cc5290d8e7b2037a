#!/usr/bin/env bash
# Makes the environment of train.sbatch for AMD GPUs, such as the MI300A of Cosmos (SDSC). Once, on a login node: bash slurm/env-rocm.sh
# Then submit with MODULES=rocm/6.3.0 among the variables of train.sbatch.
#
# --compile-model is not supported on ROCm, and attention runs without the flash kernels.
#
# AAM_ENV       where; it must be visible from the compute nodes
# ROCM_MODULE   module of the cluster's ROCm; empty: none
# TORCH         aam needs 2.9 or newer, whose ROCm wheels are built for 6.4. They bring their own ROCm libraries; of the node they use the driver
# TORCH_INDEX   where these wheels are
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

AAM_ENV=${AAM_ENV:-$HOME/envs/aam}
ROCM_MODULE=${ROCM_MODULE-rocm/6.3.0}
TORCH=${TORCH:-2.9.1}
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/rocm6.4}

if [ -n "$ROCM_MODULE" ]; then set +u; module load "$ROCM_MODULE"; set -u; fi
mamba create --yes --prefix "$AAM_ENV" python=3.11
"$AAM_ENV/bin/pip" install "torch==$TORCH" --index-url "$TORCH_INDEX"

# The constraint keeps pip from replacing the ROCm build by PyPI's, which is for CUDA.
constraint=$(mktemp)
trap 'rm -f "$constraint"' EXIT
"$AAM_ENV/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > "$constraint"
"$AAM_ENV/bin/pip" install --constraint "$constraint" .

"$AAM_ENV/bin/python" -c 'import sys, torch; print("PyTorch", torch.__version__, "ROCm", torch.version.hip, "GPU here:", torch.cuda.is_available()); sys.exit(torch.version.hip is None)'
"$AAM_ENV/bin/aam" --version
echo "made $AAM_ENV"
