"""`encache-serve` as its clients see it: over a socket, with OpenAI's own client too."""

import base64
import io
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encache.contract.manifest import read_manifest
from encache.runtime.backends import load_scheduler
from encache.runtime.images import METADATA_KEY
from encache.runtime.options import SamplingOptions
from encache.runtime.plan import make_plan
from encache.runtime.planfile import FittedOn, FittedPlan, Measured, read_plans, write_plans
from encache.runtime.schedulers import full_config
from encache.runtime.settings import Policy
from encache.serve.serve_cli import main
from tests.serve.served import IMAGES, TEXT_TO_IMAGE, Served, httpx

TOKEN = "a secret of some length"


@pytest.fixture(scope="module")
def served(engine_folder):
    with Served(engine_folder) as one:
        yield one


def picture_of(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_the_real_client_draws_a_picture(served):
    openai = pytest.importorskip("openai", reason="the client of this test")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list().data
    answer = client.images.generate(
        model=model.id, prompt="hot dog", n=2, size="24x16", extra_body={"seed": 5, "stride": 4}
    )
    pictures = [picture_of(one.b64_json) for one in answer.data]
    facts = [json.loads(one.info[METADATA_KEY]) for one in pictures]
    assert [one.size for one in pictures] == [(24, 16)] * 2
    assert [(one["prompt"], one["seed"], one["stride"]) for one in facts] == [
        ("hot dog", 5, 4),
        ("hot dog", 6, 4),
    ]
    assert answer.encache == {"evaluations": 1, "rows": 2, "decoder_rows": 0}
    with pytest.raises(openai.BadRequestError, match="multiples of 8"):
        client.images.generate(prompt="hot dog", size="20x20")
    with pytest.raises(openai.NotFoundError, match="another"):
        client.images.generate(prompt="hot dog", model="another")


def test_both_routes_draw_the_same(served):
    one = served.post({"prompt": "hot dog", "seed": 3, "negative_prompt": "green"})
    body = {"prompt": "hot dog", "seed": 3, "negative_prompt": "green", "cfg_scale": 7.5}
    body |= {"enable_hr": False, "override_settings": {}, "denoising_strength": 0.7}
    two = served.post(body, TEXT_TO_IMAGE)
    assert one.status_code == two.status_code == 200, one.text + two.text
    first = picture_of(one.json()["data"][0]["b64_json"])
    second = picture_of(two.json()["images"][0])
    assert first.tobytes() == second.tobytes()
    assert json.loads(two.json()["info"])["all_seeds"] == [3]


def test_a_plan_can_be_seen_before(served):
    seen = served.post({"key_calls": [0, 2]}, "/v1/plans").json()
    assert (seen["num_calls"], seen["key_calls"], seen["rows"]) == (4, [0, 2], 4)
    assert served.post({}, "/v1/plans").json() == {**seen, "stride": 2}  # the server's own
    assert served.post({"prompt": "x", "key_calls": [0, 2]}).json()["encache"]["rows"] == 4
    refused = served.post({"key_calls": [1]}, "/v1/plans")
    assert refused.status_code == 400
    assert "start at 0" in refused.json()["error"]["message"]


def test_a_fitted_plan_is_drawn_unless_asked_otherwise(engine_folder, tmp_path):
    manifest = read_manifest(engine_folder)
    scheduler = load_scheduler(engine_folder, manifest)
    plan = make_plan(scheduler, 4, Policy(4))
    config = json.dumps(full_config(scheduler))
    on = FittedOn(manifest.identity.model, config, 4, manifest.guidance_scale, "0" * 64, 1)
    path = tmp_path / "plans.json"
    write_plans(path, [FittedPlan(plan, on, Measured(1, 0.1, (0.0, 1.0), 1.0, 40.0))])
    with Served(engine_folder, sampling=SamplingOptions(plan_file=path)) as served:
        own = served.post({}, "/v1/plans").json()
        same = {"steps": 4, "guidance_scale": manifest.guidance_scale}
        assert served.post(same, "/v1/plans").json() == own
        asked = served.post({"stride": 2}, "/v1/plans").json()
        drawn = picture_of(served.post({"prompt": "x"}).json()["data"][0]["b64_json"])
    assert (own["key_calls"], own["stride"]) == ([0], None)
    assert asked["key_calls"] == [0, 2]  # of the plan's four steps
    assert json.loads(drawn.info[METADATA_KEY])["plan"] == read_plans(path)[0].plan.hash()


def test_the_schema_says_what_is_refused_and_how_much_is_allowed(served):
    schema = served.client.get("/openapi.json").json()
    statuses = {
        path: set(one["responses"])
        for path, operations in schema["paths"].items()
        for one in operations.values()
    }
    assert statuses[IMAGES] == {"200", "400", "404", "413", "429", "500", "504"}
    assert statuses["/readyz"] == {"200", "503"}
    assert not any("422" in each or "401" in each for each in statuses.values())
    for words in ("8 pictures", "32 pixels", "20 steps", "50 characters", "64 pictures may wait"):
        assert words in schema["info"]["description"]
    wrong = served.client.put(IMAGES)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_seeds_are_any_unless_given(served):
    seeds = [served.post({"prompt": "x"}).json()["data"][0]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]


def test_pictures_as_addresses(served):
    body = {"prompt": "x", "seed": 1, "response_format": "url", "output_format": "webp"}
    (found,) = served.post(body).json()["data"]
    answer = served.client.get(found["url"])
    assert answer.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(answer.content)).format == "WEBP"
    assert served.client.get(found["url"] + "x").status_code == 404


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 51}, "50 characters"),
        ({"prompt": "x", "negative_prompt": "x" * 51}, "50 characters"),
        ({"prompt": "\ud800"}, ""),
        ({"prompt": "x", "n": 0}, "n:"),
        ({"prompt": "x", "n": 9}, "8 pictures"),
        ({"prompt": "x", "size": "40x16"}, "32 pixels"),
        ({"prompt": "x", "size": "20x16"}, "multiples of 8"),
        ({"prompt": "x", "size": "large"}, "512x512"),
        ({"prompt": "x", "steps": 21}, "20 at most"),
        ({"prompt": "x", "stride": 5}, "stride"),
        ({"prompt": "x", "key_calls": [1, 2]}, "start at 0"),
        ({"prompt": "x", "blend": "swirl"}, "swirl"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": 2**63}, "seed"),
        ({"prompt": "x", "guidance_scale": "7"}, "guidance_scale"),
        ({"prompt": "x", "style": "vivid"}, "style"),
        ({"prompt": "x", "stream": True}, "stream"),
        ([], "body"),
    ],
)
def test_impossible_requests_are_told_why(served, body, words):
    answer = served.client.post(
        IMAGES, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    assert words.lower() in answer.json()["error"]["message"].lower()


@pytest.mark.parametrize(
    ("content", "status"), [(b"{", 400), (b"\xff", 400), (b"NaN", 400), (b" " * 2**19, 413)]
)
def test_bodies_that_are_no_requests(served, content, status):
    headers = {"content-type": "application/json"}
    answer = served.client.post(IMAGES, content=content, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "extra", [{"enable_hr": True}, {"sampler_name": "Euler a"}, {"cfg_scale": float("inf")}]
)
def test_what_front_ends_want_beyond_it_is_refused(served, extra):
    body = json.dumps({"prompt": "x", **extra})
    answer = served.client.post(
        TEXT_TO_IMAGE, content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
NAMES = ["prompt", "n", "size", "steps", "seed", "stride", "key_calls", "guidance_scale", "width"]


@settings(max_examples=150, deadline=None)
@given(
    body=st.dictionaries(st.sampled_from(NAMES), ANYTHING) | ANYTHING,
    route=st.sampled_from([IMAGES, TEXT_TO_IMAGE, "/v1/models"]),
)
def test_no_request_brings_the_server_down(served, body, route):
    answer = served.client.post(
        route, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (200, 400, 405)
    assert answer.status_code == 200 or answer.json()["error"]["message"]
    assert "Traceback" not in answer.text


def test_health_and_metrics(served):
    served.post({"prompt": "x", "n": 2})
    assert served.client.get("/healthz").status_code == 200
    assert served.client.get("/readyz").json() == {"status": "ready"}
    assert served.client.get("/nothing").status_code == 404
    numbers = served.client.get("/metrics").text
    assert f'encache_requests_total{{route="{IMAGES}",status="200"}}' in numbers
    for name in ("batch_size_count", "evaluations_total", "rows_total", "queue 0.0"):
        assert f"encache_{name}" in numbers
    assert 'route="/nothing"' not in numbers


class _Held:
    """Keeps a server from drawing."""

    def __init__(self, served):
        self.desk = served.app.state.service.desk
        self.may = threading.Event()

    def __enter__(self):
        self.draw = self.desk._draw
        started = threading.Event()

        def hold(orders):
            started.set()
            assert self.may.wait(60)
            return self.draw(orders)

        self.desk._draw = hold
        self.started = started
        return self

    def __exit__(self, *_):
        self.may.set()
        self.desk._draw = self.draw


def wait_until(true):
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_queue_is_bounded_and_clients_that_leave_free_their_places(engine_folder):
    with Served(engine_folder, max_waiting=2, max_images=2) as served, _Held(served) as held:
        answers = []

        def ask(timeout):
            try:
                answers.append(served.post({"prompt": "x", "n": 2}, timeout=timeout).status_code)
            except httpx.TimeoutException:
                answers.append("left")

        first = threading.Thread(target=ask, args=(60,))
        first.start()
        assert held.started.wait(30)
        second = threading.Thread(target=ask, args=(0.5,))
        second.start()
        wait_until(lambda: held.desk.waiting == 2)
        full = served.post({"prompt": "x"})
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        second.join()
        wait_until(lambda: held.desk.waiting == 0)
        held.may.set()
        assert served.post({"prompt": "x"}).status_code == 200
        first.join()
        assert answers == ["left", 200]


def test_a_deadline_ends_a_request(engine_folder):
    with Served(engine_folder, deadline=0.3) as served, _Held(served):
        late = served.post({"prompt": "x"})
        assert late.status_code == 504
        assert "0.3 s" in late.json()["error"]["message"]


def test_a_failure_is_logged_and_not_told(engine_folder, caplog):
    with Served(engine_folder) as served:

        def fail(orders):
            raise RuntimeError("a secret path")

        served.app.state.service.desk._draw = fail
        with caplog.at_level(logging.INFO, logger="encache"):
            answer = served.post({"prompt": "x"})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert "a secret path" in caplog.text
        assert served.client.get("/healthz").status_code == 200


def test_a_token(engine_folder):
    with Served(engine_folder, token=TOKEN) as served:
        assert served.client.get("/healthz").status_code == 200
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": TOKEN}):
            assert served.post({"prompt": "x"}, headers=headers).status_code == 401
        assert served.client.get("/metrics").status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert served.post({"prompt": "x"}, headers=headers).status_code == 200
        paths = served.client.get("/openapi.json", headers=headers).json()["paths"]
        routes = {path: one.popitem()[1] for path, one in paths.items()}
        asks = {path for path, one in routes.items() if "security" in one}
        assert asks == {path for path, one in routes.items() if "401" in one["responses"]}
        assert asks == {*paths} - {"/", "/healthz", "/readyz", "/v1/images/files/{name}"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--host", "0.0.0.0"], 1, "--token-file"),
        (["--host", "0.0.0.0", "--token-file", "short"], 1, "16 characters"),
        (["--max-images", "65"], 2, "--max-waiting"),
        (["--stride", "60"], 1, "stride"),
    ],
)
def test_servers_that_do_not_start(engine_folder, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("password\n")
    result = CliRunner().invoke(main, ["--engine-dir", str(engine_folder), *arguments])
    assert result.exit_code == code, result.output
    assert words in result.stderr


def test_a_port_that_is_taken(engine_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["--engine-dir", str(engine_folder), "--port", port])
    assert result.exit_code == 1
    assert "another --port" in result.stderr


def test_sigterm_lets_what_was_begun_end(engine_folder):
    program = [sys.executable, "-c", "from encache.serve.serve_cli import main; main()"]
    command = [*program, "--engine-dir", engine_folder, "--port", "0", "--steps", "4"]
    command += ["--batch-wait", "2"]  # so that the request still waits when the signal comes
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        url = process.stderr.readline().split()[-1]
        answers = []

        def ask():
            body = {"prompt": "x", "n": 2}
            answers.append(httpx.post(url + IMAGES, json=body, timeout=60).status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: "encache_queue 2.0" in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        asking.join()
        assert answers == [200]
        lines = [json.loads(line) for line in process.stderr]
    drawn = [one for one in lines if one["route"] == IMAGES]
    assert [(one["status"], one["pictures"]) for one in drawn] == [(200, 2)]
