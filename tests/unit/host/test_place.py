"""Where a worker registers: what Dynamo's operator adds to the namespace and the component."""

from __future__ import annotations

import pytest

from dynamo_worker.errors import UsageError
from dynamo_worker.host.config.settings import load

SUFFIX = {"DYN_NAMESPACE_WORKER_SUFFIX": "abc"}


@pytest.mark.parametrize(
    ("flags", "environ", "namespace", "origin"),
    [
        ({}, {}, "dynamo-abc", "default with environment DYN_NAMESPACE_WORKER_SUFFIX"),
        (
            {},
            {"DYN_NAMESPACE": "k8s-graph"},
            "k8s-graph-abc",
            "environment DYN_NAMESPACE with environment DYN_NAMESPACE_WORKER_SUFFIX",
        ),
        ({"namespace": "n"}, {}, "n-abc", "flag --namespace with environment DYN_NAMESPACE_WORKER_SUFFIX"),
        ({"namespace": "n-abc"}, {}, "n-abc", "flag --namespace"),
        ({"endpoint": "dyn://n.c.e"}, {}, "n", "flag --endpoint"),
        ({"namespace": "abc"}, {}, "abc-abc", "flag --namespace with environment DYN_NAMESPACE_WORKER_SUFFIX"),
    ],
)
def test_the_suffix_of_a_rollout(flags, environ, namespace, origin):
    settings = load(flags, environ | SUFFIX)
    assert (settings.namespace, str(settings.origin("namespace"))) == (namespace, origin)


def test_no_suffix():
    assert load({}, {"DYN_NAMESPACE_WORKER_SUFFIX": ""}).namespace == "dynamo"


def test_a_suffix_that_no_namespace_can_have():
    with pytest.raises(UsageError, match=r"DYN_NAMESPACE_WORKER_SUFFIX=a\.b: expected letters, digits"):
        load({}, {"DYN_NAMESPACE_WORKER_SUFFIX": "a.b"})


@pytest.mark.parametrize("kind", ["worker", "prefill", "decode"])
def test_a_kind_of_pod_is_no_component(kind):
    settings = load({}, {"DYN_COMPONENT": kind})
    assert (settings.component, str(settings.origin("component"))) == ("backend", "default")
    assert settings.for_role("prefill").component == "prefill"
    assert settings.for_role("aggregated").component == settings.for_role(None).component == "backend"
    assert load({"component": kind}, {}).for_role("prefill").component == kind
