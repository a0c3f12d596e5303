"""What Arks' documents promise and Arks does not do, and the tests that prove it here, wherever they are.

Left out: what is not built yet (autoscaling by service levels, prices, the console).
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PROMISES = {
    "an autoscaler can scale an application": [
        "test_kubernetes_own_autoscaler_scales_an_application",
    ],
    "weights follow load": [
        "test_an_engine_under_load_loses_traffic_to_its_idle_twin",
        "test_the_route_is_written_for_shifts_that_matter_and_not_often",
        "test_the_load_policys_weights_reach_extproc_and_dead_engines_lose_theirs",
    ],
    "load balancing knows the model servers": [
        "test_the_least_loaded_engine_is_chosen",
        "test_requests_spread_over_equal_engines",
        "test_engine_that_dies_while_it_streams_is_out_at_once",
    ],
    "models are cached and preloaded": [
        "test_two_models_of_one_volume_load_the_same_weights_once",
        "test_second_model_links_what_the_first_one_loaded",
        "test_a_model_is_copied_onto_each_chosen_node_and_onto_later_ones",
    ],
    "models come from several sources": [
        "test_whole_repository_is_loaded_and_marked_last",
        "test_whole_repository",
        "test_prefix_is_loaded_whole_and_verified",
        "test_files_of_an_artifact",
        "test_whole_weights_are_ready_and_untouched",
    ],
    "Dynamo": [
        "test_a_dynamo_worker_is_ready_only_when_its_endpoint_is",
        "test_dynamo_finds_itself_by_the_users_etcd_the_cluster_or_a_shared_directory",
        "test_the_api_server_accepts_each_object_strictly",
    ],
    "prefill and decode apart, with each runtime": [
        "test_prefill_and_decode_of_every_runtime_serve_behind_their_router",
        "test_nixl_roles_and_side_channel_of_prefill_and_decode",
        "test_dynamo_prefill_and_decode_need_a_discovery_that_spans_pods",
        "test_sglang_prefill_tells_the_router_its_bootstrap_port",
    ],
    "hardware of several kinds": [
        "test_hardware_is_read_from_resources_and_node_selection",
        "test_images_come_from_the_resource_then_the_environment_then_our_default",
    ],
    "rolling updates without an outage": [
        "test_a_change_rolls_without_ever_taking_the_last_replica_down",
        "test_the_last_serving_group_is_never_taken_away_and_the_rollout_ends",
    ],
    "gang scheduling": [
        "test_gang_scheduling_reaches_every_replicas_group_and_follows_the_spec",
        "test_gang_scheduling_lands_on_every_api_or_is_said_to_be_missing",
    ],
    "monitors come with the manifests": [
        "test_every_runtime_is_scraped_where_its_metrics_are",
        "test_the_charts_monitoring_is_the_manifests",
        "test_every_object_is_taken_with_all_of_its_fields",
    ],
    "metrics of errors, tokens left, quota usage and limit are set": [
        "test_defect_15_every_request_is_counted_once_with_its_tokens_and_refusals_are_seen",
        "test_defect_15_the_gauges_of_a_quota_are_set",
        "test_defect_15_what_is_left_of_a_tokens_limits_is_told_where_tokens_are_labels",
    ],
    "domains, certificates and TLS for each tenant, a load balancer outside": [
        "test_each_tenant_has_a_domain_a_certificate_and_only_its_own_models_there",
        "test_the_load_balancer_is_as_the_example_says",
    ],
    "tokens need not stand in the clear": [
        "test_a_token_in_a_secret_follows_the_secret",
        "test_every_way_a_secret_is_held_and_sent",
        "test_secrets_and_bodies_are_nowhere",
    ],
    "rates and quotas": [
        "test_burst_of_200_at_a_limit_of_40_admits_exactly_40",
        "test_quota_that_two_tokens_share_is_one",
        "test_defect_06_counters_taken_away_from_a_running_gateway_are_put_back",
    ],
    "services are discovered": [
        "test_applications_are_found_by_the_model_they_serve",
        "test_defect_12_a_pipeline_is_withdrawn_with_either_half_and_comes_back",
    ],
    "runtimes over several nodes": [
        "test_vllm_over_two_nodes_starts_without_ray_and_only_the_leader_serves",
        "test_defect_09_workers_of_a_group_are_behind_no_service",
    ],
}


@pytest.fixture(scope="module")
def names() -> set[str]:
    """Of every test in the suite."""
    return {
        node.name
        for file in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text(), file.name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@pytest.mark.parametrize("promise", PROMISES)
def test_the_promise_has_tests(names, promise):
    assert PROMISES[promise]
    assert [test for test in PROMISES[promise] if test not in names] == []
