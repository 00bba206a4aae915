#!/bin/bash
# Installs the packages of the lock and this project in ~/olora_env, on each node of cluster.yaml, deploy/gcp.yaml and
# deploy/azure.yaml. Run: from nothing in Debian 12 and 13 without pip, with CUDA's packages; in 13 with a Python 3.11 beside
# its 3.13. Not run: on Ubuntu, where uv downloads Python 3.11, and without a GPU.
# All nodes get the same versions, whenever they start. A node without a GPU gets torch from its index for CPUs, as 2.13.0+cpu,
# without CUDA's libraries; a run treats both as the same torch. Such a node must reach download.pytorch.org.
set -e
here=$(cd "$(dirname "$0")" && pwd)
uv=~/.local/bin/uv
lock=$here/requirements.lock
options=()
if [ -e "${GPU_DEVICE:-/dev/nvidia0}" ]; then
    # The lock's torch has CUDA 13.
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
    if ! [ "${driver%%.*}" -ge 580 ] 2>/dev/null; then
        echo "error: the torch of deploy/requirements.lock needs NVIDIA's driver 580 or newer, and this node has" \
            "${driver:-none}: choose another machine image" >&2
        exit 1
    fi
else
    lock=~/requirements.cpu.lock
    # The lock has the hashes of torch's files on PyPI, so torch's are removed here; uv still checks all others.
    awk '/^[^ #]/ { left_out = /^(nvidia-|cuda-|triton==)/; bare = /^torch==/ }
        left_out || (bare && /^ /) { next }
        bare { sub(/ \\$/, "") }
        { print }' "$here/requirements.lock" >"$lock"
    options=(--torch-backend=cpu)
fi
# A clean Debian or Ubuntu has Python, but no pip. uv then brings the project's version of Python where there is none.
if ! python3 -m pip --version >/dev/null 2>&1; then
    sudo apt-get update -qq
    sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-pip >/dev/null
fi
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
"$uv" venv --quiet --allow-existing --python 3.11 ~/olora_env
"$uv" pip install --quiet --python ~/olora_env/bin/python "${options[@]}" -r "$lock"
"$uv" pip install --quiet --python ~/olora_env/bin/python --no-deps "$(dirname "$here")"
