"""What a review asks of the pods in deploy/kubernetes, as functions that list the violations."""

from __future__ import annotations

from typing import Any

from dynamo_worker.host.config.options import BY_NAME

Object = dict[str, Any]

#: What the restricted Pod Security Standard lets a pod mount.
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}
#: What a container that keeps its root file system read-only must be able to write.
WRITABLE = ("/tmp", "/home/worker")


def restricted(pod: Object) -> list[str]:
    """Return what the restricted Pod Security Standard forbids, and what a numeric user and a read-only root lack."""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    found += [f"volume {kind}" for each in pod.get("volumes", []) for kind in set(each) - _VOLUMES - {"name"}]
    everywhere = pod.get("securityContext", {})
    for container in _containers(pod):
        context = {**everywhere, **container.get("securityContext", {})}
        wrong = {
            "runAsNonRoot": context.get("runAsNonRoot") is not True,
            "runAsUser": not isinstance(context.get("runAsUser"), int) or context["runAsUser"] == 0,
            "seccompProfile": context.get("seccompProfile", {}).get("type") != "RuntimeDefault",
            "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is not False,
            "capabilities": context.get("capabilities") != {"drop": ["ALL"]},
            "readOnlyRootFilesystem": context.get("readOnlyRootFilesystem") is not True,
            "privileged": bool(context.get("privileged")),
            "hostPort": any("hostPort" in port for port in container.get("ports", [])),
        }
        found += [f"{container['name']}: {name}" for name, bad in wrong.items() if bad]
    return found


def writable(pod: Object) -> list[str]:
    """Return which directories are not writable, or could be replaced by other users."""
    found = []
    made = {word for container in pod["initContainers"] for word in container["command"] if word.startswith("/")}
    places = {mount["name"]: mount["mountPath"] for each in pod["initContainers"] for mount in each["volumeMounts"]}
    private = ["0700" in container["command"] for container in pod["initContainers"]]
    mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    for path in WRITABLE:
        mount = mounts.get(path, {})
        if f"{places.get(mount.get('name'))}/{mount.get('subPath')}" not in made or not all(private):
            found.append(f"{path} is not a directory of the worker's own")
    return found


def memory(pod: Object) -> list[str]:
    """Return what has no limit, or what the limit of memory does not hold."""
    found = [f"{each['name']}: no limit" for each in _containers(pod) if "memory" not in each["resources"]["limits"]]
    found += [
        f"{each['name']}: no request"
        for each in _containers(pod)
        if set(each["resources"]["requests"]) < {"cpu", "memory"}
    ]
    empty = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume]
    if not all("sizeLimit" in each for each in empty):
        return [*found, "a volume without sizeLimit"]
    shared = sum(_bytes(each["sizeLimit"]) for each in empty if each.get("medium") == "Memory")
    limit = _bytes(pod["containers"][0]["resources"]["limits"].get("memory", "0Gi"))
    # At most half: the engine's processes need the rest.
    return [*found, "shared memory does not fit"] if shared > limit / 2 else found


def times(deployment: Object) -> list[str]:
    """Return which times contradict each other, or the worker's defaults."""
    pod = deployment["spec"]["template"]["spec"]
    container = pod["containers"][0]
    start, live, ready = (container[f"{name}Probe"] for name in ("startup", "liveness", "readiness"))
    starting = start["periodSeconds"] * start["failureThreshold"]
    found = []
    if deployment["spec"].get("progressDeadlineSeconds", 600) <= starting:
        found.append("progressDeadlineSeconds is over before the startup probe")
    if starting <= BY_NAME["discovery_timeout"].default:
        found.append("the startup probe is over before --discovery-timeout")
    if live["periodSeconds"] * live["failureThreshold"] <= BY_NAME["heartbeat_timeout"].default:
        found.append("the liveness probe is over before --heartbeat-timeout")
    if (live["httpGet"]["path"], ready["httpGet"]["path"]) != ("/live", "/health"):
        found.append("paths of the probes")
    ports = {port["name"] for port in container["ports"]}
    if not {probe["httpGet"]["port"] for probe in (start, live, ready)} <= ports:
        found.append("a probe's port does not exist")
    return found + stopping(pod)


def stopping(pod: Object) -> list[str]:
    """Return what of a pod's end does not fit into its grace period."""
    container = pod["containers"][0]
    grace = pod.get("terminationGracePeriodSeconds", 30)
    delay = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    budgets = [
        float(word.split("=")[1]) for word in container["args"] if word.startswith("--termination-grace-period=")
    ]
    streams = environment(container).get("DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS")
    if budgets:
        return [] if budgets[0] + delay == grace else ["--termination-grace-period is not the pod's"]
    return [] if streams and float(streams) + delay < grace else ["streams do not fit into the grace period"]


def fleet(documents: list[Object]) -> list[str]:
    """Return which Deployments lack what keeps some of their pods alive, or tokens that nothing needs."""
    found = []
    accounts = {each["metadata"]["name"]: each for each in kind(documents, "ServiceAccount")}
    budgets = {
        str(each["spec"]["selector"]["matchLabels"]): each["spec"] for each in kind(documents, "PodDisruptionBudget")
    }
    for deployment in kind(documents, "Deployment"):
        name, spec = deployment["metadata"]["name"], deployment["spec"]
        pod, labels = spec["template"]["spec"], spec["selector"]["matchLabels"]
        if not labels.items() <= spec["template"]["metadata"]["labels"].items():
            found.append(f"{name}: its selector does not match")
        budget = budgets.get(str(labels))
        if budget is None or not 0 < budget.get("maxUnavailable", 0) < spec["replicas"]:
            found.append(f"{name}: no disruption budget")
        spread = {
            each["topologyKey"]: each["labelSelector"]["matchLabels"]
            for each in pod.get("topologySpreadConstraints", [])
        }
        if spread.get("kubernetes.io/hostname") != labels:
            found.append(f"{name}: not spread over nodes")
        account = accounts.get(pod.get("serviceAccountName", ""))
        if account is None or account.get("automountServiceAccountToken") is not False:
            found.append(f"{name}: no service account of its own")
        if pod.get("automountServiceAccountToken") is not False:
            found.append(f"{name}: a token that nothing needs")
    return found


def network(documents: list[Object]) -> list[str]:
    """Return which connections the policies refuse although the ports in the manifests need them."""
    worker, frontend = (deployed(documents, name) for name in ("dynamo-worker", "dynamo-frontend"))
    server = int(environment(worker)["ETCD_ENDPOINTS"].rpartition(":")[2])
    requests, answers = environment(worker)["DYN_TCP_RPC_PORT"], environment(frontend)["DYN_TCP_RESPONSE_STREAM_PORT"]
    status, http = environment(worker)["DYN_SYSTEM_PORT"], frontend["args"][1].rpartition(":")[2]
    needed = {
        ("dynamo-worker", "ingress", "dynamo-frontend", int(requests)),
        ("dynamo-frontend", "egress", "dynamo-worker", int(requests)),
        ("dynamo-worker", "ingress", "dynamo-frontend", 32768),
        ("dynamo-frontend", "egress", "dynamo-worker", 32768),
        ("dynamo-worker", "egress", "dynamo-frontend", int(answers)),
        ("dynamo-frontend", "ingress", "dynamo-worker", int(answers)),
        ("dynamo-worker", "ingress", "monitoring", int(status)),
        ("dynamo-frontend", "ingress", "monitoring", int(http)),
        ("dynamo-frontend", "ingress", "", int(http)),
        ("dynamo", "egress", "etcd", server),
        ("dynamo", "egress", "kube-dns", 53),
    }
    allowed = set()
    for policy in kind(documents, "NetworkPolicy"):
        spec = policy["spec"]
        (subject,) = spec["podSelector"]["matchLabels"].values()
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in spec.get(direction, []):
                for peer in rule[peers]:
                    selector = peer.get("podSelector") or peer.get("namespaceSelector") or {}
                    who = next(iter(selector.get("matchLabels", {}).values()), "")
                    allowed |= {(subject, direction, who, port["port"]) for port in rule["ports"]}
    return [*(f"refused: {each}" for each in needed - allowed), *(f"needless: {each}" for each in allowed - needed)]


def ports(documents: list[Object]) -> list[str]:
    """Return which ports of containers are not those of their variables."""
    found = []
    for name, variables in {
        "dynamo-worker": {"status": "DYN_SYSTEM_PORT", "requests": "DYN_TCP_RPC_PORT"},
        "dynamo-frontend": {"answers": "DYN_TCP_RESPONSE_STREAM_PORT"},
    }.items():
        container = deployed(documents, name)
        given = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
        found += [
            port for port, variable in variables.items() if given.get(port) != environment(container).get(variable)
        ]
    return found


def deployed(documents: list[Object], name: str) -> Object:
    """Return the container of a Deployment."""
    found = next(each for each in kind(documents, "Deployment") if each["metadata"]["name"] == name)
    return found["spec"]["template"]["spec"]["containers"][0]


def kind(documents: list[Object], name: str) -> list[Object]:
    return [each for each in documents if each["kind"] == name]


def environment(container: Object) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}


def _containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]
