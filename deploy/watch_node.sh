#!/bin/bash
# Watches a worker node of cluster.yaml, deploy/gcp.yaml or deploy/azure.yaml, from the start of its Ray. It has run against
# stand-ins of the metadata services of EC2, GCE and Azure (tests/deploy/test_watch_node.py), on no cloud.
#   - The cloud takes the node away (a spot notice): drain.sh tells Ray, and the training leaves the node.
#   - The node has had no raylet for ten minutes, because the head is gone: the machine ends itself, so that it costs nothing.
# METADATA_URL and AZURE_URL are set in tests. On a machine without a metadata service this script does nothing.
service=${METADATA_URL:-http://169.254.169.254}
azure=${AZURE_URL:-https://management.azure.com}
patience=${1:-600}
pause=${2:-5}

ask() { curl --silent --fail --noproxy '*' --max-time 3 "$@"; }
from_ec2() {
    local token
    token=$(ask -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$service/latest/api/token") &&
        ask -H "X-aws-ec2-metadata-token: $token" "$service/latest/meta-data/$1"
}
from_gce() { ask -H 'Metadata-Flavor: Google' "$service/computeMetadata/v1/instance/$1"; }
from_azure() { ask -H 'Metadata: true' "$service/metadata/$1"; }

# EC2 gives two minutes of notice, the other clouds 30 seconds.
ec2_notice() { from_ec2 spot/instance-action | grep -q action; }
gce_notice() { from_gce preempted | grep -q TRUE; }
azure_notice() { from_azure 'scheduledevents?api-version=2020-07-01' | grep -q '"EventType": *"Preempt"'; }

# EC2 terminates an instance that shuts down, because of InstanceInitiatedShutdownBehavior. GCE stops it: its disk still costs.
ec2_end() { sudo shutdown -h now; }
gce_end() { sudo shutdown -h now; }
# Azure bills a machine that has shut itself down. The node's identity, which Ray has made, may take it off the bill.
azure_end() {
    local token
    token=$(from_azure 'identity/oauth2/token?api-version=2018-02-01&resource=https://management.azure.com/' |
        sed -n 's/.*"access_token": *"\([^"]*\)".*/\1/p')
    ask -X POST -H "Authorization: Bearer $token" --data '' \
        "$azure$(from_azure 'instance/compute/resourceId?api-version=2021-02-01&format=text')/deallocate?api-version=2024-07-01"
}

cloud=
for each in ec2 gce azure; do
    case $each in ec2) probe=instance-id ;; gce) probe=id ;; azure) probe='instance?api-version=2021-02-01' ;; esac
    "from_$each" "$probe" >/dev/null && cloud=$each && break
done
[ "$cloud" ] || { echo "no metadata service of a cloud answers at $service: this node is not watched"; exit 0; }
[ "$cloud" = ec2 ] && deadline=100 || deadline=20
echo "watching this node of $cloud"
seen=$SECONDS
while sleep "$pause"; do
    if "${cloud}_notice"; then
        echo "$cloud takes this node away: draining it for $deadline s"
        exec bash "$(dirname "$0")/drain.sh" "$deadline"
    fi
    pgrep -x raylet >/dev/null && seen=$SECONDS
    if [ $((SECONDS - seen)) -ge "$patience" ]; then
        echo "no raylet for $patience s: ending this machine"
        "${cloud}_end"
        seen=$SECONDS
    fi
done
