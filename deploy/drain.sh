#!/bin/bash
# The preStop hook of worker pods: tells Ray that this node is taken away. Training then writes a checkpoint and continues
# without the node; a node on which nothing runs ends by itself. KubeRay starts Ray under bash, which ignores SIGTERM
# as process 1: what is left after the deadline is stopped here.
#   drain.sh [SECONDS]
seconds=${1:-90}
# The id from the raylet of this pod: without one, drain-node takes the head's where it does not recognise this node.
node=$(cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n' | sed -n 's/^--node_id=//p' | head -n 1)
ray drain-node --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is deleted" \
    --deadline-remaining-seconds "$seconds" && sleep "$seconds"
ray stop --force
