#!/bin/bash
# Run: on nodes of a cluster over ssh, by watch_node.sh, and in a pod of podman (tests/outside). Not run: as a hook of a kubelet.
# The preStop hook of worker pods, which watch_node.sh calls, too: tells Ray that this node will stop. Ray then places no
# more work on it, and the training leaves it after the current step. KubeRay starts Ray under bash, which as process 1
# ignores SIGTERM, so this script stops the remaining processes after the deadline.
#   drain.sh [SECONDS]
seconds=${1:-90}
# The node's id, from this machine's raylet: without it drain-node may drain another node.
node=$(cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n' | sed -n 's/^--node_id=//p' | head -n 1)
ray drain-node --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the node is taken away" \
    --deadline-remaining-seconds "$seconds" && sleep "$seconds"
ray stop --force
