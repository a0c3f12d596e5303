"""Envoy Gateway's own translator takes every manifest, and makes of it the Envoy that `arks up` has."""

from __future__ import annotations

import copy
import subprocess

import pytest
import yaml

from apis.headers import PIN_HEADER
from arks.envoy.settings import METADATA_NAMESPACES, OWNED_HEADERS, OWNED_PREFIXES, GatewaySettings
from tests.harness.envoy_gateway import Translation, translate
from tests.harness.kubernetes import Object
from tests.manifests.translation import GOLDEN, MANIFESTS, bare, decisive, judged, manager

SETTINGS = GatewaySettings(listen="", extproc="", eds_file=MANIFESTS, admin="")


@pytest.fixture(scope="module")
def translation(product: list[Object]) -> Translation:
    return translate(judged(product))


def filters(translation: Translation, part: str) -> Object:
    (found,) = (item for item in manager(translation)["httpFilters"] if part in item["name"])
    config: Object = found["typedConfig"]
    return config


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_every_condition_is_good(translation):
    assert translation.refused == {}


def test_the_xds_is_as_reviewed(translation):
    expected = yaml.safe_load(GOLDEN.read_text())
    assert decisive(translation) == expected, "after a wanted change: python -m tests.manifests.translation"


@pytest.mark.parametrize(
    ("kind", "spoil", "told"),
    [
        ("EnvoyExtensionPolicy", lambda spec: spec["extProc"][0]["backendRefs"][0].update(name="nobody"), "not found"),
        ("HTTPRoute", lambda spec: spec["rules"][0]["filters"][0]["extensionRef"].update(name="nobody"), "nobody"),
        ("ReferenceGrant", lambda spec: spec["to"][0].update(name="nobody"), "arks-system"),
    ],
)
def test_a_reference_to_nobody_is_seen_although_egctl_exits_with_0(product, kind, spoil, told):
    objects = copy.deepcopy(product)
    for item in objects:
        if item["kind"] == kind:
            spoil(item["spec"])
    refused = translate(judged(objects)).refused
    assert any(told in text for texts in refused.values() for text in texts), refused


def test_a_setting_that_envoy_gateway_does_not_know_is_an_error(product):
    objects = copy.deepcopy(product)
    (policy,) = (item for item in objects if item["kind"] == "BackendTrafficPolicy")
    policy["spec"]["loadBalancer"]["type"] = "Best"
    with pytest.raises(subprocess.CalledProcessError) as wrong:
        translate(judged(objects))
    assert "loadBalancer.type" in wrong.value.stderr


# --- the same decisions as in the bootstrap of `arks up` -----------------------------------------------------------


def test_clients_cannot_say_what_is_ours_to_say(translation):
    (extension,) = manager(translation)["earlyHeaderMutationExtensions"]
    removed = extension["typedConfig"]["mutations"]
    assert [item["remove"] for item in removed if "remove" in item] == list(OWNED_HEADERS)
    prefixes = [item["removeOnMatch"]["keyMatcher"]["prefix"] for item in removed if "removeOnMatch" in item]
    assert prefixes == list(OWNED_PREFIXES)


def test_bodies_and_times_are_those_of_the_settings(translation):
    found = manager(translation)
    (listener,) = (item for item in translation.listeners if "ready" not in item["name"])
    assert listener["perConnectionBufferLimitBytes"] == SETTINGS.body_limit_bytes
    assert seconds(found["requestHeadersTimeout"]) == SETTINGS.request_headers_timeout_s
    assert seconds(found["requestTimeout"]) == SETTINGS.request_timeout_s
    assert seconds(found["streamIdleTimeout"]) == SETTINGS.stream_idle_timeout_s
    assert seconds(found["commonHttpProtocolOptions"]["idleTimeout"]) == SETTINGS.downstream_idle_timeout_s
    assert found["preserveExternalRequestId"]
    assert not found["requestIdExtension"]["typedConfig"].get("packTraceReason", True)


def test_nothing_passes_undecided(translation):
    found = filters(translation, "ext_proc")
    assert not found.get("failureModeAllow", False)
    assert found["statusOnError"] == {"code": "ServiceUnavailable"}
    assert found["processingMode"]["requestBodyMode"] == "BUFFERED"
    assert found["processingMode"]["responseBodyMode"] == "STREAMED"
    assert found["allowModeOverride"]
    assert seconds(found["messageTimeout"]) == SETTINGS.message_timeout_s
    assert found["responseAttributes"] == [
        "upstream.address",
        "upstream.request_attempt_count",
        "response.code_details",
    ]
    assert found["metadataOptions"]["receivingNamespaces"]["untyped"] == list(METADATA_NAMESPACES)
    (routes,) = (each["virtualHosts"] for each in translation.routes.values())
    for route in (route for host in routes for route in host["routes"]):
        assert any("ext_proc" in name for name in route["typedPerFilterConfig"]), route["name"]


def test_answers_may_take_as_long_as_they_take(translation):
    (routes,) = (each["virtualHosts"] for each in translation.routes.values())
    forwarding = [route["route"] for host in routes for route in host["routes"] if "route" in route]
    assert len(forwarding) == 2
    for route in forwarding:
        assert route["timeout"] == "0s"
        assert seconds(route["idleTimeout"]) == SETTINGS.stream_idle_timeout_s
        assert route["retryPolicy"]["retryOn"] == "connect-failure,refused-stream,reset"
        assert route["retryPolicy"]["numRetries"] == SETTINGS.retries


def test_engines_get_what_extproc_picked(translation):
    engines = translation.clusters["httproute/team-a/qwen-7b/rule/0"]
    (policy,) = engines["loadBalancingPolicy"]["policies"]
    assert policy["typedExtensionConfig"]["typedConfig"]["overrideHostSources"] == [{"header": PIN_HEADER}]
    options = bare(engines["typedExtensionProtocolOptions"])
    (idle,) = (option["commonHttpProtocolOptions"]["idleTimeout"] for option in options.values())
    assert seconds(idle) == SETTINGS.upstream_idle_timeout_s
    assert seconds(engines["connectTimeout"]) == SETTINGS.connect_timeout_s
    assert engines["perConnectionBufferLimitBytes"] == SETTINGS.connection_buffer_bytes
    assert engines["outlierDetection"]["maxEjectionPercent"] == 50
    for name, cluster in translation.clusters.items():
        if "als" not in name:
            (limits,) = cluster["circuitBreakers"]["thresholds"]
            assert set(limits.values()) == {SETTINGS.requests}, name


def test_extproc_hears_only_of_what_broke_off(translation):
    (log,) = (item for item in manager(translation)["accessLog"] if item["name"].endswith("http_grpc"))
    expression = log["filter"]["extensionFilter"]["typedConfig"]["expression"]
    assert expression == "response.flags != 0"
    assert log["typedConfig"]["commonConfig"]["logName"] == "arks"


def test_more_specific_routes_than_the_reserved_one_come_first(translation):
    (routes,) = (each["virtualHosts"] for each in translation.routes.values())
    names = [route["name"] for host in routes for route in host["routes"]]
    assert [("reserved" in name) for name in names] == [False, False, True]
