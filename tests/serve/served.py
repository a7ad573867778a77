"""A real server of the tiny model."""

import threading
import time

import click
import pytest

from encache.export.options import EngineOptions, ModelOptions, SizeOptions
from encache.runtime.opening import Opening, resolve_run
from encache.runtime.options import SamplingOptions
from encache.serve.building import LimitOptions, Offer, build_app

httpx = pytest.importorskip("httpx2", reason="the client of these tests")
uvicorn = pytest.importorskip("uvicorn", reason='needs pip install ".[serve]"')
pytest.importorskip("fastapi", reason='needs pip install ".[serve]"')
pytest.importorskip("prometheus_client", reason='needs pip install ".[serve]"')

IMAGES, TEXT_TO_IMAGE = "/v1/images/generations", "/sdapi/v1/txt2img"


class Served:
    """A server of the tiny model, in a thread."""

    def __init__(self, folder, token=None, sampling=None, **limits):
        opening = Opening.of(folder, ModelOptions(), EngineOptions(), "onnxruntime", folder)
        sampling = sampling or SamplingOptions(steps=4, stride=2)
        with click.Context(click.Command("none")):
            run = resolve_run(opening, sampling, SizeOptions(), range(4), 4, None)
        options = LimitOptions(**{"max_steps": 20, "max_prompt": 50, "max_side": 32, **limits})
        self.app = build_app(Offer(opening, run, sampling, options), token)
        config = uvicorn.Config(self.app, port=0, log_config=None, access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)
        return self

    def __exit__(self, *_):
        self.client.close()
        self._server.should_exit = True
        self._thread.join()

    def post(self, body, route=IMAGES, **options):
        return self.client.post(route, json=body, **options)
