"""A job's whole way on a cluster whose nodes fail under it, one after another."""

from __future__ import annotations

import time

import pytest

from arkor_ray.schemas import event
from tests.cluster.watching import Asking, held, stream_long
from tests.integration.stories import assert_checkpoints_answer, assert_whole, config, losses
from tests.servers.arkor import Follower, wait_for
from tests.servers.ray_hosts import HEAD, SERVING, TRAINING

pytestmark = [pytest.mark.integration, pytest.mark.faults, pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS = 300  # some ten seconds' training between the faults
AWAY_S = 5.0
OF_A_JOB = {"JobSupervisor", "Recorder", "TrainController", "RayTrainWorker", "SynchronizationActor"}
CUT_S = 12.0  # longer than Ray waits for a node (tests.servers.ray_hosts.RAY)


def after(follower: Follower, steps: int) -> None:
    """Waits until so many more steps are logged than by now."""
    so_far = max(losses(list(follower.events)), default=0)
    follower.wait_for(lambda e: e.type == event.LOG and e.data["step"] >= so_far + steps)


@pytest.fixture(scope="module")
def job_config(rows):
    return config(rows, numWorkers=2, batchSize=4, maxSteps=STEPS, saveSteps=10)


@pytest.fixture(scope="module")
def undisturbed(client, job_config):
    """Events of the same job when nothing happens."""
    return Follower(client, client.create_job("undisturbed", job_config).id).join()


def test_a_job_survives_a_node_that_is_cut_off_and_the_death_of_the_head(cluster, client, job_config, undisturbed):
    job = client.create_job("story", job_config)
    follower = Follower(client, job.id)
    first = follower.wait_for(lambda e: e.type == event.CHECKPOINT)
    target = {"kind": "checkpoint", "jobId": job.id, "step": first.data["step"]}
    assert {name for name, _ in cluster.find("worker")} == set(TRAINING)
    assert {name for name, _ in cluster.find("replica")} == {SERVING}
    with Asking(client, adapter=target) as asking:
        wait_for(lambda: asking.answers, 60, "the checkpoint does not answer", lambda: str(asking.failures))

        lost = cluster.nodes[TRAINING[0]]
        lost.host.cut()
        time.sleep(CUT_S)
        lost.host.heal()
        lost.start_again_when_ended()
        after(follower, 5)

        began = time.monotonic()
        cluster.nodes[HEAD].host.kill_all()
        time.sleep(AWAY_S)
        cluster.nodes[HEAD].start()
        after(follower, 5)
        ended = time.monotonic()
        events = follower.join()
    print(f"head away for {ended - began:.1f} s: {len(asking.answers)} answers, failures {asking.failures}")
    assert asking.failures == []
    assert asking.longest_gap(began, ended) < AWAY_S
    assert_whole(events, steps=STEPS)
    assert losses(events) == pytest.approx(losses(undisturbed), abs=1e-4)
    assert client.get_job(job.id).status == "completed"
    assert_checkpoints_answer(client, job.id, events)
    assert_nothing_is_left(cluster)


def test_a_new_release_of_the_api_costs_no_event_and_no_request(cluster, client, job_config):
    job = client.create_job("upgrade", job_config)
    follower = Follower(client, job.id)
    follower.wait_for(lambda e: e.type == event.CHECKPOINT)
    before, serving = set(cluster.find("api")), cluster.find("replica")
    with (
        Asking(client, base_model="tiny") as asking,
        cluster.client() as another,
        Asking(another, 0, stream_long, base_model="tiny") as streaming,
    ):
        wait_for(lambda: streaming.answers or streaming.failures, 120, "no long answer")
        deployed_at = time.monotonic()
        cluster.deploy(release="2")
        wait_for(
            lambda: len(now := set(cluster.find("api"))) == len(before) and not now & before,
            180, "the api's replicas were not replaced", lambda: f"{before} {cluster.find('api')}",
        )  # fmt: skip
        replaced_at = time.monotonic()
        after(follower, 5)
    print(f"replaced within {replaced_at - deployed_at:.1f} s; {len(asking.answers)} answers, {streaming.answers} long")
    assert cluster.find("replica") == serving, "a new api must leave the applications of base models alone"
    assert asking.failures == []
    assert streaming.failures == [], "an answer under way ends as it began, at the replica that began it"
    assert sum(deployed_at < at < replaced_at for at, _ in streaming.answers) >= 2
    client.cancel_job(job.id)
    events = follower.join()
    assert [e.id for e in events] == list(range(1, len(events) + 1))
    logged = [e.data["step"] for e in events if e.type == event.LOG]
    assert logged == list(range(1, len(logged) + 1))


def assert_nothing_is_left(cluster):
    """Ray holds what the service needs when it is idle, and nothing of the jobs."""
    seen = {}

    def idle() -> bool:
        seen.update(held(cluster))
        return not OF_A_JOB & set(seen["actors"]) and not seen["placement_groups"] and seen["kept"]["CPU"] < 0.1

    wait_for(idle, 60, "Ray still holds something", lambda: str(seen))
