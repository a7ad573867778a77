"""The deployment for Ray Serve: in this process what is deployed, and once for real."""

import base64
import io
import json
import os
import random
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import click
import pytest
from PIL import Image

from encache.runtime.images import METADATA_KEY
from encache.serve.ray_serve import app
from tests.serve.served import IMAGES, Served, httpx

pytest.importorskip("ray.serve", reason='needs pip install ".[ray,serve]"')
pytest.importorskip("aiohttp", reason='needs pip install ".[ray,serve]"')


def deployed(arguments):
    """What Ray is asked for."""
    return app(arguments)._bound_deployment


def test_options_are_those_of_the_server(engine_folder):
    asked = {"engine-dir": engine_folder, "replicas": 3, "cores": "2", "batch_size": 5}
    found = deployed({**asked, "prior-noise": False})
    scaling = found._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert scaling.target_ongoing_requests == 10
    assert found.ray_actor_options["num_cpus"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strid": 5}, "strid"),
        ({"stride": 5, "key-calls": "0,5"}, "--key-calls"),
        ({"port": 8000}, "--port"),
        ({"max-images": 65}, "--max-waiting"),
    ],
)
def test_what_is_refused(engine_folder, arguments, words):
    with pytest.raises(click.ClickException, match=words):
        app({"engine-dir": engine_folder, **arguments})


def find_port():
    """A port that is free, and stays so.

    Ray's processes take many that the system chooses for them; it chooses none below its range.
    """
    first_chosen = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(first_chosen * 3 // 4, first_chosen), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


@pytest.fixture
def url(engine_folder, monkeypatch):
    """Where one replica of the tiny model answers."""
    import ray
    from ray import serve

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    port = find_port()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app({"engine-dir": engine_folder, "steps": 4, "stride": 2, "batch-wait": 2}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_a_replica_draws_as_the_server_does(engine_folder, url):
    asked = [{"prompt": "hot dog", "seed": seed} for seed in range(3)]
    with ThreadPoolExecutor(3) as clients:
        answers = [*clients.map(lambda one: httpx.post(url + IMAGES, json=one, timeout=60), asked)]
    assert [one.status_code for one in answers] == [200] * 3
    assert (
        'encache_batch_size_bucket{le="2.0"} 0.0' in httpx.get(f"{url}/metrics").text
    )  # but one of 3
    with Served(engine_folder) as served:
        for one, answer in zip(asked, answers, strict=True):
            ours, theirs = (picture_of(each) for each in (answer, served.post(one)))
            assert json.loads(ours.info[METADATA_KEY]) == json.loads(theirs.info[METADATA_KEY])
            pairs = zip(ours.tobytes(), theirs.tobytes(), strict=True)
            assert max(abs(a - b) for a, b in pairs) <= 1  # other batches
    kept = httpx.post(url + IMAGES, json={"prompt": "x", "response_format": "url"})
    assert kept.status_code == 400
    assert "b64_json" in kept.json()["error"]["message"]


def picture_of(answer):
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
