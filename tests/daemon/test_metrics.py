"""Scrapes of a real daemon over real HTTP, against what its replies say."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from spilld import Client, Token
from spilld.demo.spawn import Spawned
from spilld.errors import ConfigError, InvalidRequest
from spilld.models.model import Model
from spilld.monitoring import metrics as metrics_module
from spilld.monitoring.metrics import COUNTERS, GAUGES, Metrics

from .harness import column_bytes, daemon, shared, some_tokens, window_bytes

PROMPT = some_tokens(1, 1300)
DASHBOARD = Path(__file__).parents[2] / "systemd" / "grafana.json"

LONG = 2500
"""Tokens of an answer that is not waited for."""

Samples = dict[str, float]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


@pytest.fixture(scope="module")
def running(model: Model) -> Iterator[Spawned]:
    """Most of PROMPT's KV does not fit the host budget."""
    settings = {
        "device_budget": 2 * window_bytes(model),
        "host_budget": 10 * column_bytes(model, "k8v4"),
        "disk_budget": "64MiB",
        "chunk_tokens": 128,
        "metrics": "127.0.0.1:0",
    }
    with daemon(model, **settings) as running:
        yield running


@pytest.fixture
def client(running: Spawned) -> Iterator[Client]:
    """A client of a daemon that is idle before and after."""
    with Client(running.address) as client:
        yield client
        give_up = time.monotonic() + 20
        while client.stats()["requests_running"]:
            assert time.monotonic() < give_up
            time.sleep(0.02)


def url(running: Spawned) -> str:
    said = re.search(r"metrics at (http://127\.0\.0\.1:\d+/metrics)", running.log.read_text())
    assert said is not None
    return said[1]


def fetch(address: str) -> str:
    with urllib.request.urlopen(address, timeout=10) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain")
        return str(reply.read().decode())


def parse(text: str) -> Samples:
    """By name and labels, as in `spilld_requests_total{outcome="eos"}`."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def scrape(running: Spawned) -> Samples:
    return parse(fetch(url(running)))


def grown(before: Samples, after: Samples, name: str) -> float:
    return after[name] - before.get(name, 0)


def test_a_scrape_says_what_the_reply_says(running: Spawned, client: Client) -> None:
    before, began = scrape(running), time.monotonic()
    generation = client.generate(PROMPT, max_tokens=20, ignore_eos=True)
    generation.text()
    took, after, usage = time.monotonic() - began, scrape(running), generation.result.usage
    counted = {
        "spilld_prompt_tokens_total": usage.prompt_tokens,
        "spilld_cached_tokens_total": usage.cached_tokens,
        "spilld_generated_tokens_total": usage.generated_tokens,
        "spilld_computed_tokens_total": len(PROMPT) + 19,
        "spilld_step_rows_sum": len(PROMPT) + 19,
        "spilld_prefix_misses_total": 1,
        "spilld_prefix_hits_total": 0,
        'spilld_requests_total{outcome="length"}': 1,
        'spilld_requests_total{outcome="failed"}': 0,
        "spilld_queue_seconds_count": 1,
        "spilld_time_to_first_token_seconds_count": 1,
        "spilld_inter_token_seconds_count": 19,
        **{f'spilld_attended_bytes_total{{tier="{tier}"}}': n for tier, n in usage.read_bytes.items()},
    }
    assert {name: grown(before, after, name) for name in counted} == counted
    assert usage.read_bytes["disk"] > 0
    assert usage.queue_ms == pytest.approx(1e3 * grown(before, after, "spilld_queue_seconds_sum"))
    for name, extents in (("hits", usage.prefetch_hits), ("stalls", usage.prefetch_stalls)):
        assert grown(before, after, f"spilld_prefetch_{name}_total") == extents
    waits = ("time_to_first_token", "inter_token")
    told = sum(grown(before, after, f"spilld_{name}_seconds_sum") for name in waits)
    computed = (usage.prefill_ms + usage.decode_ms) / 1e3
    assert computed < told < took
    assert grown(before, after, "spilld_step_seconds_sum") == pytest.approx(computed)


def test_the_disk_tier_is_timed(running: Spawned, client: Client) -> None:
    before = scrape(running)
    generation = client.generate(some_tokens(2, 1300), max_tokens=20, ignore_eos=True)
    generation.text()
    after = scrape(running)

    def more(name: str) -> float:
        return grown(before, after, f"spilld_{name}")

    assert more("disk_read_bytes_total") >= generation.result.usage.disk_read_bytes > 0
    assert more("disk_read_seconds_count") == more("disk_reads_total") > 0
    assert 0 < more("disk_read_seconds_sum") < 60
    assert more("disk_write_seconds_count") > 0 < more("disk_written_bytes_total")
    assert more("prefetch_hits_total") + more("prefetch_stalls_total") > 0
    assert more("prefetch_stall_seconds_total") * 1e3 >= generation.result.usage.stall_ms
    assert [after[f"spilld_{name}"] for name in ("disk_failed", "recomputations_total")] == [0, 0]


def test_while_a_request_runs(running: Spawned, client: Client, model: Model) -> None:
    with client.generate("hello", max_tokens=LONG, ignore_eos=True) as generation:
        while not isinstance(next(generation), Token):
            pass
        during = scrape(running)
        assert during["spilld_requests_running"] == 1
        assert during["spilld_requests_waiting"] == 0
        assert during['spilld_tier_used_bytes{tier="device"}'] == window_bytes(model)
        assert during["spilld_reserved_blocks"] > 0
        client.generate("hello", max_tokens=1).text()
        assert during["spilld_step_seconds_count"] < scrape(running)["spilld_step_seconds_count"]


def test_errors_are_counted_by_their_code(running: Spawned, client: Client, model: Model) -> None:
    before = scrape(running)
    with pytest.raises(InvalidRequest):
        client.generate([model.geometry.vocab]).text()
    generation = client.generate("hello", max_tokens=LONG, ignore_eos=True)
    while not isinstance(next(generation), Token):
        pass
    generation.close()
    give_up = time.monotonic() + 10
    name = 'spilld_requests_total{outcome="cancelled"}'
    while not grown(before, after := scrape(running), name):
        assert time.monotonic() < give_up
    assert grown(before, after, name) == 1
    assert grown(before, after, 'spilld_errors_total{code="invalid_request"}') == 1


def test_everything_that_stats_know_is_exported(running: Spawned, client: Client, model: Model) -> None:
    samples, welcome = scrape(running), client.hello()
    wanted = {f"spilld_{name}" for name, *_ in GAUGES} | {f"spilld_{name}_total" for name, *_ in COUNTERS}
    missing = wanted - {sample.split("{")[0] for sample in samples}
    assert missing == {
        f"spilld_disk_{n}" for n in ("write_budget_bytes", "write_left_bytes", "writes_refused_total")
    }
    assert samples['spilld_tier_capacity_bytes{tier="device"}'] == 2 * window_bytes(model)
    assert samples['spilld_tier_capacity_bytes{tier="host"}'] == 10 * column_bytes(model, "k8v4")
    assert samples['spilld_tier_capacity_bytes{tier="disk"}'] == 64 << 20
    labels = f'dtype="float32",format="k8v4",model="{model.folder}",version="{welcome.version}"'
    assert samples[f"spilld_info{{{labels}}}"] == 1
    assert samples["process_resident_memory_bytes"] > 100 << 20


def test_the_dashboard_asks_for_what_is_exported(running: Spawned, client: Client, model: Model) -> None:
    with pytest.raises(InvalidRequest):
        client.generate([model.geometry.vocab]).text()
    families = list(text_string_to_metric_families(fetch(url(running))))
    samples = [sample for family in families for sample in family.samples]
    exported, labels = {s.name for s in samples}, {"instance"}.union(*(s.labels for s in samples))
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    for query in asked:
        names = set(re.findall(r"(?:spilld|process)_\w+", query))
        assert names
        assert names <= exported, query
        grouped = {name for group in re.findall(r"by \((.*?)\)", query) for name in group.split(", ")}
        assert grouped <= labels, query
        assert ("histogram_quantile" in query) == ("by (le)" in query) == ("_bucket" in query)


def test_the_dashboard_is_whole() -> None:
    """What Grafana asks of a file: ids, places that do not overlap, a data source that is chosen there."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert (dashboard["title"], dashboard["uid"]) == ("spilld", "spilld")
    assert dashboard["schemaVersion"] >= 36
    assert dashboard.get("id") is None
    panels, source = dashboard["panels"], {"type": "prometheus", "uid": "${datasource}"}
    assert dashboard["templating"]["list"][0]["name"] == "datasource"
    assert sorted(panel["id"] for panel in panels) == list(range(1, len(panels) + 1))
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24
    for panel in panels:
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0
        assert all(target["datasource"] == source for target in (panel, *panel["targets"]))
        assert panel["fieldConfig"]["defaults"]["unit"]


def test_two_daemons_in_a_process_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    with one.served("127.0.0.1:0") as first, other.served("[::1]:0") as second:
        one.failed("overloaded")
        name = 'spilld_errors_total{code="overloaded"}'
        assert parse(fetch(first))[name] == 1
        assert name not in parse(fetch(second))


def test_it_ends_at_once_whoever_is_connected() -> None:
    metrics, took = Metrics(), []
    for _ in range(5):
        with metrics.served("127.0.0.1:0") as address:
            here = ("127.0.0.1", int(address.split(":")[2].removesuffix("/metrics")))
            idle = socket.create_connection(here)
            idle.sendall(b"GET /metrics HTTP/1.1\r\n")
            assert "spilld_queue_seconds_bucket" in fetch(address)
            with pytest.raises(ConfigError, match="in use"), metrics.served(f"127.0.0.1:{here[1]}"):
                pass
            began = time.monotonic()
        took.append(time.monotonic() - began)
        with metrics.served(f"127.0.0.1:{here[1]}") as address:
            assert "spilld_queue_seconds_bucket" in fetch(address)
        idle.close()
    assert min(took) < 0.3, "the others may have waited for a core"


def test_who_asks_nothing_does_not_stay(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics_module._Scrape, "timeout", 0.05)
    with Metrics().served("127.0.0.1:0") as address:
        here = ("127.0.0.1", int(address.split(":")[2].removesuffix("/metrics")))
        for said in (b"", b"GET /metrics"):
            with socket.create_connection(here, timeout=20) as idle:
                idle.sendall(said)
                assert idle.recv(1) == b""
    assert capfd.readouterr().err == ""


def test_nothing_is_served_unless_asked() -> None:
    with Metrics().served(None) as address:
        assert address == ""
