#!/bin/bash
# The preStop hook of worker pods: tells Ray that this node is taken away. No work is placed on it any more, and training
# leaves it after the step under way. KubeRay starts Ray under bash, which ignores SIGTERM as process 1: what is left
# after the deadline is stopped here.
#   drain.sh [SECONDS]
seconds=${1:-90}
# The id from the raylet of this pod: without it, drain-node takes another node where it does not recognise this one.
node=$(cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n' | sed -n 's/^--node_id=//p' | head -n 1)
ray drain-node --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is deleted" \
    --deadline-remaining-seconds "$seconds" && sleep "$seconds"
ray stop --force
