#!/usr/bin/env bash
# One node of a cluster, in the foreground: Ray and, on the head, the service. Whoever starts it again after a crash or a reboot,
# such as systemd or Docker, has all of it back, and jobs under way go on from their newest checkpoints.
#
#   node.sh head|worker [options of `ray start`]
#   node.sh exec COMMAND...      with the settings of a node, such as `arkor-ray tokens issue`
#
# ENVIRONMENT_FILES  files of NAME=VALUE lines to read first, separated by spaces; those that are not there are skipped. Default:
#                    arkor.env and node.env in the home directory, where `ray up` puts them
# SERVE_CONFIG       what the head deploys; default: serving/config.yaml beside this script's folder
# RAY_HEAD_IP        of a worker: where the head is
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
role=${1:-}
shift || true
[ ! -d "$HOME/arkor-venv" ] || export PATH="$HOME/arkor-venv/bin:$PATH"

fail() {
  echo "node.sh: $1" >&2
  exit 78 # a mistake in the configuration, says sysexits.h
}

for file in ${ENVIRONMENT_FILES-$HOME/arkor.env $HOME/node.env}; do
  [ -r "$file" ] || continue
  while IFS= read -r line || [ -n "$line" ]; do
    # Not sourced: a password may hold what a shell would act upon. An empty value is the same as none.
    [[ $line =~ ^[A-Za-z_][A-Za-z0-9_]*=. ]] && export "${line?}"
  done <"$file"
done

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
export ARKOR_RAY_CLUSTER=${ARKOR_RAY_CLUSTER:-1} ARKOR_RAY_ANONYMOUS=${ARKOR_RAY_ANONYMOUS:-0}
export ARKOR_RAY_DATA_DIR=${ARKOR_RAY_DATA_DIR:-$HOME/.arkor-ray}
# Nothing to drain: all state is in the database and the storage. Ray would take longer than Docker and systemd wait.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-0}
for name in RAY_AUTH_TOKEN ARKOR_RAY_DATABASE_URL ARKOR_RAY_STORAGE_URL; do
  [ -n "${!name:-}" ] || fail "$name is empty; fill it in as cluster/arkor.env.example says"
done
[ "$role" != exec ] || exec "$@"
[ -n "${ARKOR_RAY_MODELS:-}${ARKOR_RAY_CATALOGUE:-}${ARKOR_RAY_MODELS_ALLOW_LOCAL_PATHS:-}" ] ||
  fail "ARKOR_RAY_MODELS is empty; no job could name a model. Fill it in, or ARKOR_RAY_CATALOGUE, as cluster/arkor.env.example says"
mkdir -p "$ARKOR_RAY_DATA_DIR"
python - <<'PYTHON' || exit 78
import sys

from arkor_ray.errors import ArkorError
from arkor_ray.service import check_reachable
from arkor_ray.settings import Settings

try:
    check_reachable(Settings.load())
except ArkorError as error:
    sys.exit(f"node.sh: {error.message}")
PYTHON

case $role in
head)
  # The dashboard's port has the Jobs API, which the controller may call from another node; it asks for the token as well.
  ray start --head --block --port=6379 --dashboard-host=0.0.0.0 --metrics-export-port=8080 "$@" &
  ;;
worker)
  ray start --block --address="${RAY_HEAD_IP:?set it to the address of the head}:6379" --metrics-export-port=8080 "$@" &
  ;;
*)
  fail "say head, worker or exec"
  ;;
esac
ray=$!
trap 'kill -TERM "$ray" 2>/dev/null' TERM INT

if [ "$role" = head ]; then
  config=${SERVE_CONFIG:-$here/../serving/config.yaml}
  deadline=$((SECONDS + 300))
  until serve deploy "$config" --address http://127.0.0.1:8265; do
    if ! kill -0 "$ray" 2>/dev/null || [ "$SECONDS" -gt "$deadline" ]; then
      kill -TERM "$ray" 2>/dev/null || true
      wait "$ray" || true
      fail "$config could not be deployed"
    fi
    sleep 2
  done
fi

wait "$ray" && status=0 || status=$?
while kill -0 "$ray" 2>/dev/null; do # a signal has ended the wait, but not yet Ray
  wait "$ray" && status=0 || status=$?
done
exit "$status"
