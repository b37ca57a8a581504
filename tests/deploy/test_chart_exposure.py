"""What the chart lets out and in: Services, the Ingress, network policies, what a pod may do, and where secrets are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from arkor_ray.settings import Settings
from tests.deploy.chart import EVERYTHING, INSTALLS, NAMESPACE, YOURS, Pod, Rendered, install, render, with_values

RAY_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, "agent": 52365, "worker": 19000}
API, METRICS, POSTGRESQL, REDIS, OBJECT_STORE = 8000, 8080, 5432, 6379, 7070
ALL_PORTS = {*RAY_PORTS.values(), API, METRICS, POSTGRESQL, REDIS, OBJECT_STORE}
EVERY_INSTALL = pytest.mark.parametrize("name", INSTALLS)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """A LabelSelector, of which the chart uses matchLabels and `In`."""
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def takes_clients(rendered: Rendered, pod: Pod) -> bool:
    """With roles the pods of the control plane; any Ray pod without."""
    has_roles = rendered.ray_pods()[0].environment()["ARKOR_RAY_NODE_ROLES"]["value"] == "1"
    return pod.component == "ray" and (not has_roles or pod.labels["arkor-ray/role"] == "control-plane")


def open_ports(rendered: Rendered, to: Pod, source: dict[str, str], namespace: str = NAMESPACE) -> set[int]:
    """Those of ALL_PORTS at which `to` can be reached by a pod with the labels `source`, as Kubernetes reads the policies."""
    opened: set[int] = set()
    policies = [
        each["spec"]
        for each in rendered.of_kind("NetworkPolicy")
        if "Ingress" in each["spec"]["policyTypes"] and selects(each["spec"]["podSelector"], to.labels)
    ]
    assert policies, f"no policy selects {to.owner}, so that everything reaches it"
    for rule in (rule for policy in policies for rule in policy.get("ingress", [])):
        assert rule.get("from"), "a rule without sources lets everybody in"
        if any(_admits(peer, source, namespace) for peer in rule["from"]):
            opened |= {port["port"] for port in rule["ports"]} if "ports" in rule else ALL_PORTS
    return opened


def _admits(peer: dict[str, Any], labels: dict[str, str], namespace: str) -> bool:
    assert set(peer) <= {"namespaceSelector", "podSelector"} and peer
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}):
            return False
    elif namespace != NAMESPACE:
        return False
    return selects(peer.get("podSelector", {}), labels)


@EVERY_INSTALL
def test_nothing_has_an_address_of_its_own_outside(name):
    rendered = install(name)
    for service in rendered.of_kind("Service"):
        assert service["spec"]["type"] == "ClusterIP"
        assert not {"externalIPs", "loadBalancerIP", "externalName"} & set(service["spec"])
    head = rendered.cluster["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert "enableIngress" not in head
    assert not {"serveService", "headService"} & {*rendered.ray_service["spec"], *head}
    assert not [each["kind"] for each in rendered.objects if re.search("Route|Gateway$", each["kind"])]


@EVERY_INSTALL
def test_the_only_ingress_leads_to_the_apis_port(name):
    rendered = install(name)
    assert len(rendered.of_kind("Ingress")) == INSTALLS[name].get("ingress", {}).get("enabled", False)
    for ingress in rendered.of_kind("Ingress"):
        for rule in ingress["spec"]["rules"]:
            [path] = rule["http"]["paths"]
            backend = path["backend"]["service"]
            service = rendered.the("Service", backend["name"])
            [port] = service["spec"]["ports"]
            assert port["name"] == backend["port"]["name"]
            for pod in rendered.pods():
                if selects({"matchLabels": service["spec"]["selector"]}, pod.labels):
                    [target] = [p for p in pod.spec["containers"][0]["ports"] if p["name"] == port["targetPort"]]
                    assert (pod.component, target["containerPort"]) == ("ray", API)


@EVERY_INSTALL
def test_event_streams_do_not_go_through_pods_that_train_or_answer_where_these_have_pods_of_their_own(name):
    rendered = install(name)
    api = rendered.the("Service", "-api")["spec"]["selector"]
    reached = {pod.owner for pod in rendered.ray_pods() if selects({"matchLabels": api}, pod.labels)}
    if INSTALLS[name].get("nodeRoles", True):
        assert reached == {"RayService/head", "RayService/cpu"}
    else:
        assert reached == {pod.owner for pod in rendered.ray_pods()}


def test_the_ingress_has_both_hosts_with_their_certificates_and_lets_streams_through():
    ingress = install("everything").the("Ingress")
    assert [rule["host"] for rule in ingress["spec"]["rules"]] == ["arkor.example.com", "*.models.example.com"]
    assert {each["secretName"]: each["hosts"] for each in ingress["spec"]["tls"]} == {
        "a": ["arkor.example.com"],
        "b": ["*.models.example.com"],
    }
    nginx = {key.rsplit("/", 1)[1]: value for key, value in ingress["metadata"]["annotations"].items()}
    assert nginx["proxy-buffering"] == "off"
    assert int(nginx["proxy-read-timeout"]) >= 3600 <= int(nginx["proxy-send-timeout"])


@pytest.mark.parametrize("given", [None, 64 * 2**20])
def test_the_ingress_takes_the_bodies_that_the_api_takes(given):
    rendered = render(with_values(EVERYTHING, settings={"max_body_bytes": given} if given else {}))
    size = "nginx.ingress.kubernetes.io/proxy-body-size"
    taken = rendered.the("Ingress")["metadata"]["annotations"][size]
    assert int(taken) == (given or Settings.model_fields["max_body_bytes"].default)
    told = rendered.ray_pods()[0].environment().get("ARKOR_RAY_MAX_BODY_BYTES")
    assert told == (given and {"name": "ARKOR_RAY_MAX_BODY_BYTES", "value": taken})
    own = render(with_values(EVERYTHING, ingress={"annotations": {size: "1g"}})).the("Ingress")
    assert own["metadata"]["annotations"][size] == "1g"


@EVERY_INSTALL
def test_a_stranger_in_the_same_namespace_reaches_no_port_of_any_pod(name):
    rendered = install(name)
    for pod in rendered.pods():
        assert open_ports(rendered, pod, {"app": "stranger"}) == set(), pod.owner
        assert open_ports(rendered, pod, {"app": "stranger"}, "elsewhere") == set(), pod.owner
        forged = {"app.kubernetes.io/instance": "another-release", "app.kubernetes.io/component": "ray"}
        assert open_ports(rendered, pod, forged) == set(), pod.owner


@EVERY_INSTALL
def test_each_neighbour_reaches_what_it_needs_and_no_more(name):
    rendered = install(name)
    pods = {pod.owner: pod for pod in rendered.pods()}
    ray = rendered.ray_pods()
    for pod in pods.values():
        is_ray, is_head = pod in ray, pod.owner == "RayService/head"
        assert open_ports(rendered, pod, {}, "ingress-nginx") == ({API} if takes_clients(rendered, pod) else set())
        assert open_ports(rendered, pod, {}, "kuberay-operator") == (
            {API, RAY_PORTS["dashboard"]} if is_head else set()
        )
        assert open_ports(rendered, pod, {}, "monitoring") == ({METRICS} if is_ray else set())
    for source in ray:
        for target in ray:
            assert open_ports(rendered, target, source.labels) == ALL_PORTS
    ours = {
        "postgresql": (POSTGRESQL, {"ray", "migrate"}),
        "redis": (REDIS, {"ray"}),
        "object-store": (OBJECT_STORE, {"ray", "bucket"}),
    }
    for source in pods.values():
        for target in pods.values():
            if target.component in ours:
                port, callers = ours[target.component]
                assert open_ports(rendered, target, source.labels) == ({port} if source.component in callers else set())
            elif target.component == "ray" and source.component != "ray":
                reaches = source.component == "test" and takes_clients(rendered, target)
                assert open_ports(rendered, target, source.labels) == ({API} if reaches else set())


def test_the_way_out_is_closed_but_for_names_this_release_and_what_is_listed():
    policy = install("everything").the("NetworkPolicy", "egress")["spec"]
    assert all(selects(policy["podSelector"], pod.labels) for pod in install("everything").pods())
    names, own, listed = policy["egress"]
    assert names == {
        "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}],
        "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}],
    }
    assert own == {"to": [{"podSelector": {"matchLabels": {"app.kubernetes.io/instance": "rel"}}}]}
    assert listed == {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}


def test_names_may_be_answered_elsewhere_than_in_kube_system_and_at_another_port():
    openshift = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "openshift-dns"}}}
    dns = {"ports": [5353], "to": [openshift, {"ipBlock": {"cidr": "169.254.20.10/32"}}]}
    rendered = render(with_values(EVERYTHING, networkPolicy={"egress": {"dns": dns}}))
    names = rendered.the("NetworkPolicy", "egress")["spec"]["egress"][0]
    assert names["to"] == dns["to"]
    assert {(port["port"], port["protocol"]) for port in names["ports"]} == {(5353, "UDP"), (5353, "TCP")}


@EVERY_INSTALL
def test_every_pod_fulfils_the_restricted_standard_and_writes_to_volumes_only(name):
    allowed = {"configMap", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    for pod in install(name).pods():
        spec = pod.spec
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(spec), pod.owner
        assert not [volume for volume in spec["volumes"] if not set(volume) - {"name"} <= allowed], pod.owner
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0 < spec["securityContext"]["runAsGroup"]
        for container in spec["containers"] + spec.get("initContainers", []):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, container["name"]
            assert context["runAsNonRoot"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert "privileged" not in context
            assert not [port for port in container.get("ports", []) if "hostPort" in port]
            assert container["resources"]["limits"]["memory"], container["name"]
            volumes = {volume["name"] for volume in spec["volumes"]} | {
                claim["metadata"]["name"] for claim in _claims(install(name), pod)
            }
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def _claims(rendered: Rendered, pod: Pod) -> list[dict[str, Any]]:
    kind, _, name = pod.owner.partition("/")
    if kind != "StatefulSet":
        return []
    return next(
        each["spec"]["volumeClaimTemplates"] for each in rendered.of_kind(kind) if each["metadata"]["name"] == name
    )


@EVERY_INSTALL
def test_only_the_autoscaler_has_a_token_for_kubernetes(name):
    rendered = install(name)
    assert [each["automountServiceAccountToken"] for each in rendered.of_kind("ServiceAccount")] == [False, False]
    assert not [each["kind"] for each in rendered.objects if "Role" in each["kind"]]
    holders = []
    for pod in rendered.pods():
        assert pod.spec["automountServiceAccountToken"] is False, pod.owner
        tokens = {volume["name"] for volume in pod.spec["volumes"] if "projected" in volume}
        holders += [c["name"] for c in pod.spec["containers"] if tokens & {m["name"] for m in c["volumeMounts"]}]
    assert holders == (["autoscaler"] if rendered.cluster["enableInTreeAutoscaling"] else [])


@EVERY_INSTALL
def test_services_of_the_namespace_do_not_become_settings(name):
    """One called arkor-ray would appear as ARKOR_RAY_PORT=tcp://…, which the settings read."""
    assert [pod.owner for pod in install(name).pods() if pod.spec["enableServiceLinks"] is not False] == []


@EVERY_INSTALL
def test_ray_asks_for_a_token_and_the_api_for_one_of_its_own(name):
    rendered = install(name)
    assert rendered.cluster["authOptions"]["mode"] == "token"
    assert rendered.cluster["authOptions"]["secretName"]
    anonymous = "1" if INSTALLS[name].get("anonymous") else "0"
    for pod in rendered.ray_pods():
        assert pod.environment()["ARKOR_RAY_ANONYMOUS"]["value"] == anonymous
        assert "RAY_AUTH_MODE" not in pod.environment()


@EVERY_INSTALL
def test_what_runs_for_long_is_probed(name):
    for pod in install(name).pods():
        kind = pod.owner.split("/")[0]
        container = pod.spec["containers"][0]
        expected = {"livenessProbe", "readinessProbe"} if kind in ("RayService", "StatefulSet") else set()
        assert expected <= set(container), pod.owner
    for pod in install(name).ray_pods():
        ready = pod.spec["containers"][0]["readinessProbe"]["httpGet"]
        # A worker that has no proxy must not be sent requests to the API.
        assert ready == (
            {"path": "/api/healthz", "port": 52365}
            if pod.owner.endswith("/head")
            else {"path": "/-/healthz", "port": "serve"}
        )


def texts(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield str(key)
            yield from texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from texts(value)
    else:
        yield str(node)


def secret_values(rendered: Rendered) -> set[str]:
    return {value for each in rendered.of_kind("Secret") for value in each["stringData"].values() if len(value) > 12}


GIVEN = {
    "rayAuth": {"token": "given-ray-token-0001"},
    "postgresql": {"enabled": True, "password": "given-postgres-0001"},
    "redis": {"enabled": True, "password": "given-redis-pw-0001"},
    "objectStore": {"enabled": True, "secretKey": "given-s3-secret-0001"},
}


@pytest.mark.parametrize("values", [*INSTALLS.values(), with_values(EVERYTHING, **GIVEN)])
def test_a_secrets_value_stands_in_its_secret_alone(values):
    rendered = render(values)
    secrets = secret_values(rendered)
    if not values.get("rayAuth", {}).get("existingSecret"):
        assert secrets
    elsewhere = [each for each in rendered.objects if each["kind"] != "Secret"]
    found = [text for text in texts(elsewhere) for value in secrets if value in text]
    assert found == []
    assert not [value for value in secrets if value in rendered.notes]


def test_given_secrets_are_the_ones_that_are_used():
    values = secret_values(render(with_values(EVERYTHING, **GIVEN)))
    assert {"given-ray-token-0001", "given-postgres-0001", "given-redis-pw-0001", "given-s3-secret-0001"} <= values
    [url] = [value for value in values if value.startswith("postgresql://")]
    assert url == "postgresql://arkor:given-postgres-0001@rel-arkor-ray-postgresql:5432/arkor"


@EVERY_INSTALL
def test_variables_with_secrets_refer_to_secrets(name):
    for pod in install(name).pods():
        for variable, each in pod.environment().items():
            if re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|DATABASE_URL|REDISCLI_AUTH", variable):
                assert set(each) == {"name", "valueFrom"} and set(each["valueFrom"]) == {"secretKeyRef"}, variable


@EVERY_INSTALL
def test_every_secret_that_is_referred_to_is_made_here_or_named_in_the_values(name):
    rendered = install(name)
    made = {each["metadata"]["name"]: set(each["stringData"]) for each in rendered.of_kind("Secret")}
    given = set(texts(yaml.safe_load(yaml.safe_dump(INSTALLS[name]))))
    references = [
        rendered.cluster["authOptions"] | {"name": rendered.cluster["authOptions"]["secretName"], "key": "auth_token"}
    ]
    references += [
        each["valueFrom"]["secretKeyRef"]
        for pod in rendered.pods()
        for each in pod.environment().values()
        if "valueFrom" in each
    ]
    options = rendered.cluster.get("gcsFaultToleranceOptions", {})
    references += [
        options[key]["valueFrom"]["secretKeyRef"] for key in ("redisPassword", "redisUsername") if key in options
    ]
    for each in references:
        if each["name"] in made:
            assert each["key"] in made[each["name"]], each
        else:
            assert each["name"] in given, each


def test_a_redis_user_is_taken_from_the_secret_as_well():
    values = with_values(YOURS, gcsFaultTolerance={"existingSecret": {"usernameKey": "user"}})
    options = render(values).cluster["gcsFaultToleranceOptions"]
    assert options["redisUsername"]["valueFrom"]["secretKeyRef"] == {"name": "my-redis", "key": "user"}
