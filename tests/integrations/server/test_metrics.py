"""The page for Prometheus: its names, its formats, and one registry a server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from rmcore._base.version import __version__
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
    "rmcore_build_info": "gauge",
    "rmcore_head_version": "gauge",
    "rmcore_routed_pairs": "counter",
    "rmcore_pair_uncertainty": "histogram",
    "rmcore_recent_uncertainty": "gauge",
    "rmcore_judged_weight": "counter",
    "rmcore_judge_disagreement": "counter",
    "rmcore_judge_disagreement_expected": "counter",
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


def test_the_stream_is_told_of(make_app, talk, judged_engine):
    async def main(client):
        await client.post("/v1/groups", json={"prompt": "p", "responses": ["good", "bad", "clear vague", "stone"]})
        return await client.get("/metrics")

    page = samples(talk(make_app(judged_engine), main).text)
    (info,) = [labels for (name, *labels), value in page.items() if name == "rmcore_build_info" and value == 1]
    assert ("version", __version__) in info
    assert page[("rmcore_head_version",)] == 0
    pairs = sum(value for (name, *_), value in page.items() if name == "rmcore_pairs_total")
    assert page[("rmcore_routed_pairs_total",)] == pairs == 6
    assert page[("rmcore_pair_uncertainty_count",)] == page["rmcore_pair_uncertainty_bucket", ("le", "+Inf")] == 6
    buckets = [value for (name, *_), value in page.items() if name == "rmcore_pair_uncertainty_bucket"]
    assert buckets == sorted(buckets)
    levels = [page["rmcore_recent_uncertainty", ("quantile", level)] for level in ("0.5", "0.9", "0.99")]
    assert 1 <= levels[0] <= levels[1] <= levels[2]
    assert page[("rmcore_pair_uncertainty_sum",)] >= 6
    seen = [page[(f"rmcore_{name}_total",)] for name in ("judged_weight", "judge_disagreement")]
    assert 0 <= seen[1] <= seen[0] <= 6
    assert seen[0] > 0
    assert 0 < page[("rmcore_judge_disagreement_expected_total",)] <= seen[0] / 2


DASHBOARD = json.loads((Path(__file__).parents[3] / "examples" / "grafana-dashboard.json").read_text())


def test_every_metric_that_the_dashboard_queries_exists(make_app, talk, judged_engine):
    """A page of a server that has scored something has all of them: names, and the labels that are grouped by."""

    async def main(client):
        await client.post("/v1/groups", json={"prompt": "p", "responses": ["good", "bad"]})
        return await client.get("/metrics")

    there = {}
    for family in text_string_to_metric_families(talk(make_app(judged_engine), main).text):
        for sample in family.samples:
            there.setdefault(sample.name, set()).update(sample.labels)
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    assert len(queries) > 30
    asked = set()
    for query in queries:
        names = set(re.findall(r"\brmcore_\w+", query))
        assert names, query
        asked |= names
        grouped = {label.strip() for found in re.findall(r"by \(([^)]*)\)", query) for label in found.split(",")}
        assert all(grouped <= there[name] for name in names), (query, grouped)
        assert query.count("(") == query.count(")")
    assert asked <= there.keys(), asked - there.keys()
    variables = {
        name for variable in DASHBOARD["templating"]["list"] for name in re.findall(r"rmcore_\w+", variable["query"])
    }
    assert variables <= there.keys()


def test_the_dashboard_is_whole():
    """Ids differ, panels do not overlap, and a legend names labels that its query keeps."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & own
        cells |= own
    names = {"datasource", "job", "instance"}
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r"\$\{?([a-z]\w*)", text)) <= names
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == names
