"""The verb `serve`: one packed model, a decoder or an encoder, behind HTTP until Ctrl-C."""

import gc
import re
import socket
from dataclasses import dataclass, fields
from pathlib import Path

import uvicorn

from gossamer.engine import Encoder, GenerationOptions, OpenModel, Scheduler
from gossamer.engine.encoder_scheduler import EncoderScheduler
from gossamer.engine.heads import cannot
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, quiet
from gossamer.packed.cache import open_packed
from gossamer.server.app import Api
from gossamer.server.encoder_app import EncoderApi, asked_by
from gossamer.server.served import Served
from gossamer.server.worker import Worker

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#A-Z]+|null")
OF_DECODERS = ("max_batch", "max_tokens", "kv_cache_dtype", "generation_config")
GRACE_S = 5  # how long open answers may go on after Ctrl-C


@dataclass(frozen=True)
class Serve(GenerationOptions):
    """Serve a model over HTTP: a decoder with the OpenAI API, an encoder's vectors, labels and ranks."""

    model: str = option(
        help="a .goss file, or a directory or org/name[@revision] of the hub (packed once into a cache)",
        positional=True,
    )
    host: str = option("127.0.0.1", help="address to listen on; 0.0.0.0 lets the whole network in")
    port: int = option(8000, help="port to listen on; 0 takes a free one")
    name: str = option("", help="the model's name in the API (default: the file's or directory's)")
    max_batch: int = option(16, help="requests that a decoder decodes together")
    max_queue: int = option(256, help="requests under way or waiting; more are refused")
    max_tokens: int | None = option(
        None, help="tokens of a chat answer that sets no limit (default: the context)"
    )
    allowed_origins: tuple[str, ...] = option(
        (), help="web pages whose scripts may ask, such as http://localhost:3000; '*': all (default: none)"
    )


@dataclass(frozen=True)
class ServeResult(Result):
    """Where the server was."""

    url: str
    name: str


def serve(job: Serve, progress: Progress = quiet) -> ServeResult:
    """Serve until Ctrl-C (raised as KeyboardInterrupt once connections are closed) or SIGTERM.

    `progress` gets an event when the port accepts connections, with `url` and `name` as metrics.
    """
    _check(job)
    name = job.name or Path(job.model).resolve().name.removesuffix(".goss")
    packed = open_packed(job.model, progress, offline=job.offline)
    open_api = _open_encoder if packed.architecture.is_encoder else _open_decoder
    worker, api = open_api(job, packed.path, name, progress)
    with _listen(job.host, job.port) as listener:
        port = listener.getsockname()[1]
        url = f"http://{f'[{job.host}]' if ':' in job.host else job.host}:{port}"
        ready = Event("serve", "ready, Ctrl-C ends it", 1, 1, metrics={"url": url, "name": name})
        server = uvicorn.Server(
            uvicorn.Config(
                api.app(on_ready=lambda: progress(ready)),
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        gc.collect()
        gc.freeze()  # else what stays for good is looked through again and again: a sixth of a request
        worker.start(on_end=lambda: setattr(server, "should_exit", True))
        try:
            server.run(sockets=[listener])
        finally:
            gc.unfreeze()
            worker.stop()
    return ServeResult(url, name)


def _open_decoder(job: Serve, path: Path, name: str, progress: Progress) -> tuple[Worker, Served]:
    model = OpenModel.open(path, job.threads, progress, job.kv_cache_dtype)
    worker = Worker(Scheduler(model.native, job.max_batch), job.max_queue)
    defaults = model.sampling_defaults(job.generation_config, "serve", progress)
    return worker, Api(model, worker, name, job.max_tokens, defaults, job.allowed_origins)


def _open_encoder(job: Serve, path: Path, name: str, progress: Progress) -> tuple[Worker, Served]:
    own = {field.name: field.default for field in fields(Serve) if field.name in OF_DECODERS}
    if given := [it for it, default in own.items() if getattr(job, it) != default]:
        flag = given[0].replace("_", "-")
        raise ConfigError(f"--{flag} is for decoders; found {job.model}, an encoder: leave it out")
    encoder = Encoder(path, job.threads, progress=progress)
    if not asked_by(encoder):
        raise cannot("be served: no route asks for that", encoder.architecture, job.model)
    worker = Worker(EncoderScheduler(encoder), job.max_queue)
    return worker, EncoderApi(encoder, worker, name, job.allowed_origins)


def _check(job: Serve) -> None:
    if not 0 <= job.port <= 65535:
        raise ConfigError(f"port is {job.port}; expected 0 to 65535.")
    for option_name in ("max_batch", "max_queue", "max_tokens"):
        value = getattr(job, option_name)
        if value is not None and value < 1:
            raise ConfigError(f"{option_name} is {value}; expected at least 1.")
    for origin in job.allowed_origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"allowed_origins has {origin!r}; expected '*' or an origin as browsers send it: in lower "
                "case, without a path or a slash at its end, such as http://localhost:3000."
            )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise OSError(error.errno, reason) from error
