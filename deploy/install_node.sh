#!/bin/bash
# Installs the packages of the lock and this project in ~/olora_env, on each node of cluster.yaml. All nodes get the same
# versions, whenever they start. A node without a GPU gets torch from its index for CPUs, as 2.13.0+cpu, without CUDA's
# libraries; a run treats both as the same torch. Such a node must reach download.pytorch.org. Not tried yet.
set -e
here=$(cd "$(dirname "$0")" && pwd)
uv=~/.local/bin/uv
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
"$uv" venv --quiet --allow-existing --python 3.11 ~/olora_env
lock=$here/requirements.lock
options=()
if [ ! -e "${GPU_DEVICE:-/dev/nvidia0}" ]; then
    lock=~/requirements.cpu.lock
    # The lock has the hashes of torch's files on PyPI, so torch's are removed here; uv still checks all others.
    awk '/^[^ #]/ { left_out = /^(nvidia-|cuda-|triton==)/; bare = /^torch==/ }
        left_out || (bare && /^ /) { next }
        bare { sub(/ \\$/, "") }
        { print }' "$here/requirements.lock" >"$lock"
    options=(--torch-backend=cpu)
fi
"$uv" pip install --quiet --python ~/olora_env/bin/python "${options[@]}" -r "$lock"
"$uv" pip install --quiet --python ~/olora_env/bin/python --no-deps "$(dirname "$here")"
