#!/usr/bin/env bash
# Sets a machine of `ray up` up: Python, the package with the extras of its role, and the systemd unit that runs node.sh.
#
#   setup_node.sh EXTRAS [PACKAGE...]       setup_node.sh server,train,s3,postgres,otel
#
# uv brings the same Python to every node, whatever its image has, which Ray insists on; constraints.txt brings the same Ray.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=$1
shift

[ -e "$HOME/arkor.env" ] || { echo "setup_node.sh: $HOME/arkor.env is missing" >&2; exit 78; }
chmod 600 "$HOME/arkor.env"

export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -x "$HOME/arkor-venv/bin/python" ] || uv venv --python 3.11 "$HOME/arkor-venv"
uv pip install --python "$HOME/arkor-venv" --constraint "$repository/constraints.txt" "$repository[$extras]" "$@"

sed -e "s|@USER@|$(id -un)|g" -e "s|@HOME@|$HOME|g" "$repository/cluster/arkor-ray.service" |
  sudo tee /etc/systemd/system/arkor-ray.service >/dev/null
sudo systemctl daemon-reload
sudo systemctl enable arkor-ray
