"""Serve a model and its adapters to programs that speak OpenAI's API, and to a browser.

    python serve.py --model M --adapter support=runs/a/best --adapter poems=runs/b/best
    curl localhost:8000/v1/chat/completions -d '{"model": "support", "messages": [{"role": "user", "content": "Hello"}]}'
    a browser at http://localhost:8000/       chat, and a blind comparison of two of them

Many requests share each forward of the model, whatever adapters they ask for (serving/engine.py). Here are the routes and
the command. serving/server.py is the way from a request to its answer. docs/serve.md lists the routes and the fields.

Text becomes ids in one thread of its own, the model has another, and everything else is this thread's event loop.
"""
import argparse
import asyncio
import datetime
import errno
import hmac
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
    import terminal
    terminal.start()

import torch
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response

import data
from errors import UserError
from files import hub, peft_files, weights
from files.json_files import show
from generate import named, recorded_bits
from ledger.hollow import Hollow, hollow_model
from memory import count, human
from serving.engine import Busy, Engine, Late, Stopped
from serving.fields import BadRequest, as_bad_request, below, check_ids, check_vote, options, read_json, whole
from serving.metrics import prometheus
from serving.server import Server, as_error, read_body
from techniques.device import device_of, usable_device
from techniques.few_rows import for_few_rows

PAGE = Path(__file__).resolve().parent / "serving" / "page.html"


# ---------------------------------------------------------------------------------------------- the routes

def is_local(host: str) -> bool:
    return host in ("127.0.0.1", "localhost", "::1", "[::1]")


def create_app(server: Server) -> FastAPI:
    args = server.args

    async def guard(request: Request):
        """Who may ask: a browser only from a page of this server, and everybody with the key. Raises BadRequest.

        A dependency of each route, and no middleware: behind FastAPI's kind of middleware is_disconnected is always false.
        """
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        if origin and origin.partition("://")[2] != host:
            raise BadRequest(f"pages of {show(origin)} may not use this server", status=403, code="forbidden")
        if origin and is_local(args.host) and not args.api_key and not is_local(host.rpartition(":")[0] or host):
            # A page of evil.example whose name now leads to 127.0.0.1 (DNS rebinding): its origin is its host.
            raise BadRequest(f"{show(host)} is not this machine's own name: use localhost, or give --api-key", status=403,
                             code="forbidden")
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")  # the bytes that came
        if args.api_key and request.url.path not in ("/", "/health") and \
                not hmac.compare_digest(given, args.api_key.encode()):
            raise BadRequest("the API key is missing or wrong: send Authorization: Bearer KEY", status=401,
                             code="invalid_api_key", kind="authentication_error")

    app = FastAPI(title="Bytewise", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(guard)])

    async def on_error(request: Request, e: Exception) -> Response:
        error = as_error(e)
        return JSONResponse(error.json(), error.status, {"Retry-After": "2"} if error.status in (429, 503) else None)

    for kind in (BadRequest, Busy, Stopped, Late, UserError, Exception):
        app.add_exception_handler(kind, on_error)

    async def on_status(request: Request, e: Exception) -> Response:
        says = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} does not take {request.method}"}
        return JSONResponse(BadRequest(says.get(e.status_code, str(e.detail)), status=e.status_code).json(), e.status_code)

    for status in (404, 405):
        app.add_exception_handler(status, on_status)

    @app.get("/")
    async def page():
        return FileResponse(PAGE, media_type="text/html")

    @app.get("/health")
    async def health():
        alive = server.engine.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    def card(name: str, root: str, parent: str | None) -> dict:
        return {"id": name, "object": "model", "created": server.started, "owned_by": "bytewise", "root": root,
                "parent": parent, "max_model_len": server.model.config.n_positions}

    def cards() -> list[dict]:
        if server.alone:
            return [card(server.alone, args.model, None)]
        return [card(server.base, args.model, None),
                *(card(a.name, a.folder, server.base) for a in list(server.engine.adapters.values()))]

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": cards()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        server.adapter(name)
        return next((c for c in cards() if c["id"] == name), cards()[0])

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await server.reply(request, is_chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request):
        return await server.reply(request, is_chat=False)

    @app.post("/tokenize")
    async def tokenize(request: Request):
        body = read_json(await read_body(request))
        if isinstance(text := body.get("prompt"), str):
            ids = await server.read(server.encode, whole(text), body.get("add_special_tokens") is not False)
        elif "messages" in body:
            adapter = server.adapter(options({"model": body.get("model")}, is_chat=True).model)
            (ids,), _ = await server.ids(body, adapter, is_chat=True)
        else:
            raise BadRequest("expected prompt, a string, or messages", "prompt")
        return {"tokens": ids, "count": len(ids), "max_model_len": server.model.config.n_positions}

    @app.post("/detokenize")
    async def detokenize(request: Request):
        body = read_json(await read_body(request))
        check_ids("tokens", body.get("tokens"), server.model.config.vocab_size)
        return {"prompt": await server.read(server.tokenizer.decode, body["tokens"])}

    @app.get("/tokenizer_info")
    async def tokenizer_info():
        t = server.tokenizer
        return {"tokenizer_class": type(t).__name__, "vocab_size": t.vocab_size, "bos_token": t.bos, "eos_token": t.eos,
                "pad_token": t.eos, "add_bos_token": t.adds_bos, "model_max_length": server.model.config.n_positions,
                "chat_template": server.template(None)}

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(prometheus(server.engine), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/votes")
    async def votes():
        return {"on": args.votes is not None}

    @app.post("/votes")
    async def vote(request: Request):
        if args.votes is None:
            raise BadRequest("votes are not kept: start serve.py with --votes FILE", status=404)
        row = check_vote(read_json(await read_body(request)), server.names())
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with open(args.votes, "a", encoding="utf-8") as f:
            f.write(json.dumps({"time": now, **row}, ensure_ascii=False) + "\n")
        return Response(status_code=204)

    if args.allow_loading is not None:
        @app.post("/v1/load_lora_adapter")
        async def load_lora_adapter(request: Request):
            body = read_json(await read_body(request))
            name, folder = body.get("lora_name"), body.get("lora_path")
            if not isinstance(name, str) or not isinstance(folder, str):
                raise BadRequest("expected lora_name and lora_path, two strings")
            place = below(Path(args.allow_loading), folder)
            try:
                await asyncio.wrap_future(server.engine.call(lambda: server.add(name, str(place))))
            except UserError as e:
                raise as_bad_request(e, "lora_path") from None
            return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

        @app.post("/v1/unload_lora_adapter")
        async def unload_lora_adapter(request: Request):
            name = read_json(await read_body(request)).get("lora_name")
            try:
                await asyncio.wrap_future(server.engine.call(lambda: server.engine.unload(name)))
            except (KeyError, TypeError):
                raise BadRequest(f"no adapter is named {show(name)}; there are "
                                 f"{', '.join(server.engine.adapters) or 'none'}", "lora_name", 404) from None
            return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return app


# ---------------------------------------------------------------------------------------------- the command

def predicted(name: str, bits: int, device: str, slots: int, length: int) -> tuple[int, int]:
    """(bytes of the weights, bytes of the KV cache), from config.json alone. Raises UserError."""
    config, _, raw = weights.config_of(name)
    compute = torch.float32 if bits == 32 else device_of(device).products
    with Hollow():
        n = count(hollow_model(raw, bits, compute))["bytes"]
    return n, slots * length * 2 * config.n_layer * config.n_kv_head * config.head_dim * compute.itemsize


def load(args, adapters: dict[str, str], bits: int, device: str, length: int) -> Server:
    """The server with its model, its adapters, and room for its KV cache. Raises UserError."""
    model = weights.load(args.model, bits=bits, device=device)
    for_few_rows(model)
    model.config.n_positions = length
    server = Server(args, model, data.load_tokenizer(args.model))
    for name, folder in adapters.items():
        if len(adapters) == 1 and not peft_files.can_share(folder):
            server.only(name, folder)
        else:
            server.add(name, folder)
    server.engine.warm_up()
    return server


def start(load: Callable[[], Server], n_threads: int) -> Server:
    """Load the server in the thread that its engine then has, and that computes on n_threads. Raises what `load` raises."""
    loaded = Future()

    def work():
        torch.set_num_threads(n_threads)
        try:
            server = load()
        except BaseException as e:
            return loaded.set_exception(e)
        server.engine.thread = threading.current_thread()
        loaded.set_result(server)
        server.engine.work()

    threading.Thread(target=work, name="engine", daemon=True).start()
    return loaded.result()


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        s = socket.socket(family, socket.SOCK_STREAM)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(address)
        s.listen(128)
        return s
    except (OSError, OverflowError) as e:
        in_use = isinstance(e, OSError) and e.errno == errno.EADDRINUSE
        what = "is in use; choose another with --port" if in_use else f"cannot be used: {e}"
        raise UserError(f"--host {host} --port {port} {what}") from None


class Uvicorn(uvicorn.Server):
    """At Ctrl-C the engine ends its replies, so streams end with a finish_reason and the process leaves."""

    def __init__(self, config, engine: Engine):
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig, frame):
        threading.Thread(target=self.engine.stop).start()  # the main thread may hold its lock just now
        super().handle_exit(sig, frame)


def main(argv=None):
    p = argparse.ArgumentParser(prog="serve.py", description="Serve a model and its adapters: OpenAI's API, and a page.")
    p.add_argument("--model", default="gpt2-nano", help="short name, hub repository or folder (default: %(default)s)")
    p.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR", help="folder of an adapter, served as "
                   "NAME (default: the folder's name); may be given several times")
    p.add_argument("--host", default="127.0.0.1", help="the address (default: %(default)s, this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    p.add_argument("--api-key", default=os.environ.get("BYTEWISE_API_KEY"), help="requests must have Authorization: Bearer "
                   "KEY (default: the environment's BYTEWISE_API_KEY, else none)")
    p.add_argument("--slots", type=int, default=8, help="replies at the same time (default: %(default)s)")
    p.add_argument("--queue", type=int, default=128, help="how many more may wait (default: %(default)s)")
    p.add_argument("--max-length", type=int, help="positions of a slot, for prompt and reply (default: the model's, at most "
                   "2048)")
    p.add_argument("--deadline", type=float, default=600, help="seconds for a request: one that waits gets an error, one "
                   "that runs ends with what it has (default: %(default)g)")
    p.add_argument("--keep-alive", type=float, default=10, help="seconds after which a stream that waits gets a comment "
                   "(default: %(default)g)")
    p.add_argument("--votes", metavar="FILE", help="the page's blind votes are added to this .jsonl file (see compare.py)")
    p.add_argument("--allow-loading", metavar="FOLDER", help="clients may load and unload adapters below this folder")
    p.add_argument("--bits", type=int, choices=(32, 16, 8, 4), help="bits of each weight in memory (default: 8 or 4 if "
                   "the checkpoint is stored so or the adapter was trained so, else 32)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    p.add_argument("--dry-run", action="store_true", help="print the memory that it will need, and stop")
    a = p.parse_args(argv)
    for name, low in (("slots", 1), ("queue", 0), ("max_length", 2), ("deadline", 1e-3), ("keep_alive", 1e-3), ("port", 0)):
        if (value := getattr(a, name)) is not None and not low <= value < 2**31:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {low:g}")
    if a.port > 65535:  # getaddrinfo would take it modulo 65536
        raise UserError(f"--port {a.port} must be at most 65535")
    adapters = named(a.adapter) if len(a.adapter) != 1 or "=" in a.adapter[0] else {}
    if not adapters and a.adapter:
        adapters = {Path(a.adapter[0]).resolve().name: a.adapter[0]}
    if a.allow_loading is not None and not Path(a.allow_loading).is_dir():
        raise UserError(f"--allow-loading {a.allow_loading}: there is no such folder")
    a.allow_loading = a.allow_loading and str(Path(a.allow_loading).resolve())
    if a.votes is not None and (Path(a.votes).is_dir() or not Path(a.votes).resolve().parent.is_dir()):
        raise UserError(f"--votes {a.votes} must be a file in a folder that exists")
    device, config = usable_device(a.device), weights.config_of(a.model)[0]
    length = min(config.n_positions, a.max_length or 2048)
    about = hub.config_file(a.model) if a.dry_run else weights.find(a.model) / "config.json"
    bits = a.bits or (weights.stored_bits(about.parent) if about else None) or recorded_bits(adapters) or 32
    # OpenMP gives each thread that computes its own helpers. If all of them are more than the cores, it lets them sleep
    # between two products, and waking takes as long as a small one. So this one computes alone, the engine's on all cores.
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    n_weights, n_cache = predicted(a.model, bits, device, a.slots, length)
    print(f"{a.model}: weights {human(n_weights)}, KV cache {human(n_cache)} ({a.slots} slots of {length} positions), "
          f"together {human(n_weights + n_cache)}")
    if a.dry_run:
        return
    if not is_local(a.host) and not a.api_key:
        print(f"warning: --host {a.host} lets other machines in, and nobody needs a key: add --api-key", file=sys.stderr)
    listening = bound(a.host, a.port)  # before the slow part
    server = start(lambda: load(a, adapters, bits, device, length), n_threads)
    port = listening.getsockname()[1]
    host = "localhost" if a.host == "127.0.0.1" else f"[{a.host}]" if ":" in a.host else a.host
    print(f"serving {', '.join(server.names())} at http://{host}:{port}/  "
          f"(KV cache {human(server.engine.cache.nbytes)}; Ctrl-C stops)", flush=True)
    config = uvicorn.Config(create_app(server), log_level="warning", timeout_graceful_shutdown=1, lifespan="off")
    Uvicorn(config, server.engine).run(sockets=[listening])


if __name__ == "__main__":
    terminal.run(main)
