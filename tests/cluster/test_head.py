"""The head of a cluster dies under a running job. The whole story, with more deaths, is in test_story."""

from __future__ import annotations

import pytest

from arkor_ray.schemas import event
from tests.integration.stories import assert_checkpoints_answer, assert_whole, config
from tests.servers.arkor import Follower
from tests.servers.ray_hosts import HEAD, TRAINING

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

STEPS = 120


def test_a_job_on_two_nodes_outlives_the_head(cluster, client, rows):
    job = client.create_job("head", config(rows, numWorkers=2, batchSize=4, maxSteps=STEPS))
    follower = Follower(client, job.id)
    follower.wait_for(lambda e: e.type == event.CHECKPOINT)
    assert {name for name, _ in cluster.find("worker")} == set(TRAINING)
    cluster.nodes[HEAD].host.kill_all()
    cluster.nodes[HEAD].start()
    events = follower.join()
    assert_whole(events, steps=STEPS)
    assert_checkpoints_answer(client, job.id, events)
