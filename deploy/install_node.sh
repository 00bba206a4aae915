#!/bin/bash
# Installs on a node of cluster.yaml what every node has: the packages of the lock, and this project, in ~/olora_env.
# All nodes get the same versions, whenever they start. Without a GPU torch comes from its index for CPUs, as
# 2.13.0+cpu, and CUDA's libraries stay away; a run takes both for the same torch. These nodes must reach
# download.pytorch.org. Not tried yet.
set -e
here=$(cd "$(dirname "$0")" && pwd)
uv=~/.local/bin/uv
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
"$uv" venv --quiet --allow-existing --python 3.11 ~/olora_env
lock=$here/requirements.lock
options=()
if [ ! -e "${GPU_DEVICE:-/dev/nvidia0}" ]; then
    lock=~/requirements.cpu.lock
    # The lock's hashes of torch are those of PyPI's files; uv checks the others all the same.
    awk '/^[^ #]/ { left_out = /^(nvidia-|cuda-|triton==)/; bare = /^torch==/ }
        left_out || (bare && /^ /) { next }
        bare { sub(/ \\$/, "") }
        { print }' "$here/requirements.lock" >"$lock"
    options=(--torch-backend=cpu)
fi
"$uv" pip install --quiet --python ~/olora_env/bin/python "${options[@]}" -r "$lock"
"$uv" pip install --quiet --python ~/olora_env/bin/python --no-deps "$(dirname "$here")"
