#!/bin/bash
# Runs a command on a Ray of all nodes of this Slurm job. The *.sbatch files call it: bash ray.sh COMMAND [ARGUMENT ...]
# Run: Slurm 24.11 with two nodes in namespaces of one machine (tests/outside/test_slurm.py). Not run: GPUs, Apptainer.
#   - USR1 (--signal=B:USR1@150, before the time limit): the command gets SIGTERM, which for the scripts of pipelines/ means
#     one more checkpoint; then the job is requeued, and resumes. `scancel --signal=TERM --batch JOB` stops it the same way,
#     without a requeue.
#   - A plain scancel, a preemption and `scontrol requeue` reach Ray's processes at the same time as the command. The run then
#     resumes from its last checkpoint, with the same result.
#   - The exit code is the command's.
# OLORA_IN="apptainer exec --nv /shared/olora-ray.sif" runs Ray and the command in an image. Otherwise they come from PATH.
set -u
head=$(hostname)
# Several jobs may share a node, so each has a port, a folder and a token of its own.
address=$head:$((20000 + SLURM_JOB_ID % 10000))
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c "
    ulimit -n 65536 2>/dev/null
    role=--address=$address
    if [ \$SLURM_PROCID = 0 ]; then
        role='--head --node-ip-address=$head --port=${address#*:} --temp-dir=/tmp/ray$SLURM_JOB_ID --include-dashboard=false'
    fi
    exec ${OLORA_IN:-} ray start --block --num-cpus=\$SLURM_CPUS_ON_NODE \$role" &
nodes=$!
export RAY_ADDRESS=$address

# A run with a fixed number of workers does not wait for nodes that are not there yet.
${OLORA_IN:-} python - "$SLURM_JOB_NUM_NODES" <<'WAIT' || { echo "error: Ray has not started on all nodes of job $SLURM_JOB_ID within 5 minutes" >&2; exit 75; }
import os, sys, time
import ray
end = time.monotonic() + 300
while time.monotonic() < end:
    try:
        ray.init(address=os.environ["RAY_ADDRESS"], logging_level="error", log_to_driver=False)
        while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]) and time.monotonic() < end:
            time.sleep(1)
        sys.exit(time.monotonic() >= end)
    except (ConnectionError, RuntimeError, ValueError):
        time.sleep(1)
sys.exit(1)
WAIT

requeue=
${OLORA_IN:-} "$@" &
command=$!
trap 'kill -TERM $command 2>/dev/null' TERM
trap 'requeue=yes; kill -TERM $command 2>/dev/null' USR1
while wait $command; code=$?; kill -0 $command 2>/dev/null; do :; done
if [ "$requeue" ] && [ $code != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # until Slurm ends this job
fi
kill $nodes
exit $code
