"""On which nodes of a cluster each part runs, and the names that its parts find each other by.

Without `Settings.node_roles` anywhere, so every node needs every extra of the package. With it each part stays on the nodes
whose Ray label `arkor-ray/role` names it, and a node needs what its own role imports.
"""

from __future__ import annotations

from typing import Literal

from arkor_ray.settings import Settings

# What a process reserves that needs no core for itself. Not 0: that Ray would also place on a node without CPUs, which is how
# the head of a cluster is started so that nothing is lost with it.
HARDLY_A_CPU = 0.01

NAMESPACE = "arkor"  # of all our actors
CONTROLLER = "arkor-controller"

Role = Literal["control-plane", "training", "serving"]
ROLE_LABEL = "arkor-ray/role"


def nodes_for(settings: Settings, role: Role) -> dict[str, str]:
    """The label selector, as Ray takes it, of the nodes that a part may run on; empty: all of them."""
    return {ROLE_LABEL: role} if settings.node_roles else {}
