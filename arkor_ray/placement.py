"""Where Ray puts the processes that keep the service up."""

from __future__ import annotations

# What a process reserves that needs no core for itself. Not 0: that Ray would also place on a node without CPUs, which is how
# the head of a cluster is started so that nothing is lost with it.
HARDLY_A_CPU = 0.01
