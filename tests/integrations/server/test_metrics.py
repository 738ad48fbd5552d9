"""The page for Prometheus: its names, its formats, and one registry a server."""

from __future__ import annotations

import prometheus_client
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from rmcore.integrations.server import ServeSettings
from rmcore.integrations.server.service import RewardService

# What dashboards are built on: a name that changes breaks them.
FAMILIES = {
    "rmcore_ready": "gauge",
    "rmcore_http_requests": "counter",
    "rmcore_http_requests_active": "gauge",
    "rmcore_http_request_seconds": "histogram",
    "rmcore_replayed_answers": "counter",
    "rmcore_queue_groups": "gauge",
    "rmcore_batches_in_flight": "gauge",
    "rmcore_batches": "counter",
    "rmcore_groups": "counter",
    "rmcore_responses": "counter",
    "rmcore_unscorable_responses": "counter",
    "rmcore_pairs": "counter",
    "rmcore_batch_groups": "histogram",
    "rmcore_group_wait_seconds": "histogram",
    "rmcore_batch_seconds": "histogram",
    "rmcore_members_waiting": "gauge",
    "rmcore_open_groups": "gauge",
    "rmcore_members": "counter",
    "rmcore_assembled_groups": "counter",
    "rmcore_judge_calls": "counter",
    "rmcore_judge_attempts": "counter",
    "rmcore_judge_cache_hits": "counter",
    "rmcore_judge_seconds": "counter",
    "rmcore_judge_flips": "counter",
    "rmcore_judge_tokens": "counter",
    "rmcore_judge_cost": "counter",
    "rmcore_judge_unpriced_calls": "counter",
    "rmcore_judge_unaccounted_questions": "counter",
}


def samples(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_family_keeps_its_name_and_kind_and_reads_in_both_formats(make_app, talk, judged_engine):
    async def main(client):
        await client.post("/v1/groups", json={"prompt": "p", "responses": ["good", "bad"]})
        return [
            await client.get("/metrics", headers={"accept": accept})
            for accept in ("*/*", "application/openmetrics-text; version=1.0.0, text/plain; q=0.5")
        ]

    plain, open_metrics = talk(make_app(judged_engine), main)
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    for page, parse in ((plain, text_string_to_metric_families), (open_metrics, parse_openmetrics)):
        kinds = {family.name: family.type for family in parse(page.text)}
        assert FAMILIES.items() <= kinds.items(), FAMILIES.items() - kinds.items()
    assert open_metrics.text.endswith("# EOF\n")


@pytest.mark.parametrize("accept", ["", ";;,", "text/plain; version=abc", "application/openmetrics-text; version=-"])
def test_an_accept_header_of_any_kind_gets_a_page(make_app, talk, judged_engine, accept):
    async def main(client):
        return await client.get("/metrics", headers={"accept": accept})

    page = talk(make_app(judged_engine), main)
    assert page.status_code == 200
    assert "rmcore_ready 1.0" in page.text


def test_observations_fall_in_their_buckets(judged_engine):
    metrics = RewardService(judged_engine, ServeSettings()).metrics
    for seconds in (0.005, 0.05, 0.5, 700):
        metrics.request_seconds.labels("/a").observe(seconds)
    found = samples(metrics.page()[0].decode())
    name, path = "rmcore_http_request_seconds", ("path", "/a")
    buckets = {
        le: found[f"{name}_bucket", ("le", le), path] for le in ("0.005", "0.025", "0.05", "0.5", "180.0", "+Inf")
    }
    assert buckets == {"0.005": 1, "0.025": 1, "0.05": 2, "0.5": 3, "180.0": 3, "+Inf": 4}
    assert (found[f"{name}_count", path], found[f"{name}_sum", path]) == (4, pytest.approx(700.555))


def test_two_servers_of_a_process_do_not_mix_and_leave_the_global_registry_alone(judged_engine):
    one, two = (RewardService(judged_engine, ServeSettings()).metrics for _ in range(2))
    one.batch_groups.observe(3)
    counts = [samples(metrics.page()[0].decode())["rmcore_batch_groups_count",] for metrics in (one, two)]
    assert counts == [1, 0]
    assert not [f.name for f in prometheus_client.REGISTRY.collect() if f.name.startswith("rmcore")]
