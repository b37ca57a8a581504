#!/usr/bin/env bash
# What `ray up` calls to start a node, and to start it again with another configuration: writes down what node.sh is to be told,
# since a reboot happens without `ray up`, and hands over to systemd.
#
#   start_node.sh head|worker [options of `ray start`]
set -euo pipefail

# What the autoscaler says about this machine; ARKOR_RAY_ what the cluster's YAML does.
umask 077
env | grep -E '^(RAY_(HEAD_IP|OVERRIDE_RESOURCES|OVERRIDE_LABELS|CLOUD_|NODE_TYPE_NAME|enable_autoscaler_v2)|ARKOR_RAY_)' \
  >"$HOME/node.env" || true
printf '%s\n' "$@" >"$HOME/node.args"
sudo systemctl restart arkor-ray
