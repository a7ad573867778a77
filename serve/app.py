"""The HTTP application: OpenAI's images, txt2img, models, health and metrics."""

import asyncio
import base64
import io
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from encache import __version__
from encache.errors import EncacheError
from encache.runtime.generator import Cost, Order
from encache.runtime.images import encode_png
from encache.serve import answers
from encache.serve.asking import Format, Intake, OpenAIImages, Policy, TextToImage
from encache.serve.desk import Desk, FullError
from encache.serve.guard import FACTS, Guard, error_body
from encache.serve.metrics import Metrics

if TYPE_CHECKING:
    from PIL.Image import Image

_PAGE = Path(__file__).with_name("page.html")
_PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; form-action 'none'; frame-ancestors 'none'"
)
#: Pictures that a URL was given for; older ones are forgotten.
MOST_KEPT = 256


class Service:
    """What the routes share.

    Args:
        name: of the model.
        intake: turns requests into orders.
        desk: draws them.
        deadline: seconds after which a request ends.
        keeps: whether pictures are kept for those who ask for their addresses.
    """

    def __init__(
        self, name: str, intake: Intake, desk: Desk, deadline: float, *, keeps: bool = True
    ) -> None:
        self.name = name
        self.intake = intake
        self.desk = desk
        self.deadline = deadline
        self.keeps = keeps
        self.kept: OrderedDict[str, tuple[bytes, str]] = OrderedDict()

    async def draw(self, orders: Sequence[Order], cost: Cost, request: Request) -> "list[Image]":
        """Draw a request's orders.

        Raises:
            HTTPException: its time is over, or its client has gone.
            FullError: too much waits already.
            EncacheError: it cannot be drawn.
        """
        request.scope[FACTS] = {"pictures": len(orders), "rows": cost.rows * len(orders)}
        futures = [asyncio.wrap_future(one) for one in self.desk.order(orders)]
        drawing: asyncio.Future[Any] = asyncio.gather(*futures)
        leaving: asyncio.Future[Any] = asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait(
                {drawing, leaving}, timeout=self.deadline, return_when=asyncio.FIRST_COMPLETED
            )
            if drawing.done():
                return drawing.result()
            if leaving.done():
                raise HTTPException(499, "The client has gone.")
            raise HTTPException(504, f"The picture was not ready after {self.deadline:g} s.")
        finally:
            for one in [leaving, drawing, *futures]:  # what still waits frees its place
                one.cancel()

    def keep(self, picture: bytes, format: Format) -> str:
        """Keep a picture for a while, and return the secret name under which it is fetched."""
        name = f"{secrets.token_urlsafe(24)}.{format}"
        self.kept[name] = picture, f"image/{format}"
        while len(self.kept) > MOST_KEPT:
            self.kept.popitem(last=False)
        return name

    def encode(self, image: "Image", order: Order, format: Format = "png") -> bytes:
        """The picture as a file; PNG files say how it was drawn."""
        if format == "png":
            return encode_png(image, self.intake.generator.describe(order))
        encoded = io.BytesIO()
        image.save(encoded, format=format, quality=95)
        return encoded.getvalue()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _service(request: Request) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(_service)]


def make_app(service: Service, metrics: Metrics, token: str | None) -> FastAPI:
    """The application; its desk works while it is up.

    Args:
        service: what its routes share.
        metrics: see `Guard`.
        token: see `Guard`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        metrics.watch_queue(lambda: service.desk.waiting)
        with service.desk:
            yield

    app = FastAPI(
        title="encache",
        version=__version__,
        description=answers.describe(service.intake.limits, service.deadline, service.desk.limits),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Guard, metrics=metrics, token=token)
    for kind in (EncacheError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _refuse)
    _add_routes(app, metrics)
    schema = answers.document(app, token is not None)
    app.openapi = lambda: schema  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, metrics: Metrics) -> None:
    app.add_api_route(
        "/v1/images/generations",
        generate_images,
        methods=["POST"],
        responses=answers.NAMED,
        response_model_exclude_none=True,
    )
    app.add_api_route("/sdapi/v1/txt2img", text_to_image, methods=["POST"], responses=answers.DRAWN)
    app.add_api_route("/v1/plans", show_plan, methods=["POST"], responses=answers.ASKED)
    app.add_api_route(
        "/v1/images/files/{name}",
        fetch_image,
        response_class=Response,
        responses=answers.FILES,
    )
    app.add_api_route("/v1/models", list_models)
    app.add_api_route("/", show_page, response_class=HTMLResponse)
    app.add_api_route("/healthz", health)
    app.add_api_route("/readyz", readiness, responses=answers.READY)
    app.add_api_route(
        "/metrics",
        lambda: PlainTextResponse(metrics.to_text()),
        name="metrics",
        response_class=PlainTextResponse,
    )


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    """One sentence for every error that a client can repair."""
    if isinstance(error, FullError):
        headers = {"Retry-After": str(error.seconds)}
        return JSONResponse(error_body(str(error), "full"), 429, headers)
    if isinstance(error, HTTPException):
        body = error_body(str(error.detail), "refused")
        return JSONResponse(body, error.status_code, error.headers)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(error_body(f"{where or 'The body'}: {first['msg']}.", "invalid"), 400)
    return JSONResponse(error_body(str(error), "refused"), 400)


async def generate_images(asked: OpenAIImages, request: Request, service: Served) -> answers.Images:
    """Draw pictures, as OpenAI's client asks for them."""
    if asked.model not in (None, service.name):
        raise HTTPException(404, f"There is no model {asked.model!r} here, but {service.name!r}.")
    if asked.response_format == "url" and not service.keeps:
        raise HTTPException(400, "Pictures are not kept here: ask for b64_json.")
    orders, cost = await asyncio.to_thread(
        service.intake.take, asked.prompt, asked, asked.n, *asked.sides
    )
    pictures = await service.draw(orders, cost, request)
    format = asked.output_format or "png"
    data = []
    for order, picture in zip(orders, pictures, strict=True):
        encoded = await asyncio.to_thread(service.encode, picture, order, format)
        one = answers.Picture(seed=order.job.seed)
        if asked.response_format == "url":
            name = service.keep(encoded, format)
            one.url = str(request.url_for("fetch_image", name=name))
        else:
            one.b64_json = base64.b64encode(encoded).decode()
        data.append(one)
    job = orders[0].job
    return answers.Images(
        created=int(time.time()),
        data=data,
        output_format=format,
        size=f"{job.width}x{job.height}",
        encache=cost,
    )


async def fetch_image(name: str, service: Served) -> Response:
    """A picture that was answered as a URL."""
    if name not in service.kept:
        raise HTTPException(404, f"The picture is not kept: only the last {MOST_KEPT} are.")
    content, media_type = service.kept[name]
    return Response(content, media_type=media_type)


async def list_models(service: Served) -> answers.Models:
    """The one model that is served."""
    return answers.Models(data=[answers.Model(id=service.name)])


async def show_plan(asked: Policy, service: Served) -> answers.Outline:
    """Which calls a policy runs, and what a picture costs, without drawing one."""
    outline = await asyncio.to_thread(service.intake.outline, asked)
    return answers.Outline(model=service.name, **outline)


async def text_to_image(
    asked: TextToImage, request: Request, service: Served
) -> answers.TextToImageAnswer:
    """Draw pictures, as web front ends of Stable Diffusion ask for them."""
    count = asked.batch_size * asked.n_iter
    orders, cost = await asyncio.to_thread(
        service.intake.take, asked.prompt, asked.policy(), count, asked.height, asked.width
    )
    pictures = await service.draw(orders, cost, request)
    files = [
        await asyncio.to_thread(service.encode, picture, order)
        for order, picture in zip(orders, pictures, strict=True)
    ]
    seeds = [order.job.seed for order in orders]
    info = {"prompt": asked.prompt, "seed": seeds[0], "all_seeds": seeds, "encache": vars(cost)}
    return answers.TextToImageAnswer(
        images=[base64.b64encode(one).decode() for one in files],
        parameters=asked.model_dump(),
        info=json.dumps(info),
    )


async def show_page() -> HTMLResponse:
    """A page to draw with; it is one file, and loads nothing from elsewhere."""
    page = await asyncio.to_thread(_PAGE.read_text, encoding="utf-8")
    return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})


async def health() -> answers.Status:
    """Whether the process lives."""
    return answers.Status(status="ok")


async def readiness(service: Served, response: Response) -> answers.Status:
    """Whether it draws."""
    ready = service.desk.alive
    response.status_code = 200 if ready else 503
    return answers.Status(status="ready" if ready else "not ready")
