"""What the routes of serve.py share: the model and its adapters by name, text -> ids, and a request's way to its answer.

A request's fields are checked, its text becomes ids in a thread of its own (a tokenizer serves one thread), the ids wait for
the engine, and the engine's events become the answer.
"""
import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

import data
from errors import UserError
from files import peft_files
from files.json_files import show
from generate import Reply, saved_template
from memory import human
from serving.answers import DONE, Answer, sse
from serving.engine import Busy, Engine, Job, Late, Stopped
from serving.fields import BadRequest, as_bad_request, messages, options, prompts, read_json

MOST_BYTES = 8 * 2**20  # of a request's body


class Server:
    """args: the options of serve.py. base: the name under which the model itself is served."""

    def __init__(self, args, model, tokenizer):
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.engine = Engine(model, args.slots, args.queue)
        self.base = args.model if not Path(args.model).is_dir() else Path(args.model).resolve().name
        self.alone = None  # the name of an adapter that cannot share the model: then the base is not served
        self.templates = {None: data.load_template("auto", tokenizer)}  # of the base, and of adapters that have their own
        self.started, self.reader = int(time.time()), ThreadPoolExecutor(1)  # a tokenizer serves one thread

    def add(self, name: str, folder: str):
        """Load an adapter. For use in the engine's thread, or before it starts. Raises UserError."""
        if name == self.base:
            raise UserError(f"adapter {name} has the name of the base model; give another name")
        template = saved_template({name: folder})
        self.engine.load(name, folder)
        self.templates[name] = template or self.templates[None]

    def only(self, name: str, folder: str):
        """The one adapter of a method that cannot share a model (files/method_files.py). Raises UserError."""
        peft_files.load(self.model, folder)
        self.alone = name
        self.templates[name] = saved_template({name: folder}) or self.templates[None]

    def names(self) -> list[str]:
        return [self.alone] if self.alone else [self.base, *self.engine.adapters]

    def adapter(self, name: str | None):
        """The adapter that a request names; None for the model as it is. Raises BadRequest."""
        as_it_is = {self.alone} if self.alone else {self.base, self.args.model}
        if name is None or name in as_it_is:
            return None
        if name not in self.engine.adapters:
            raise BadRequest(f"the model {show(name)} does not exist; there are {', '.join(self.names())}", "model", 404,
                             "model_not_found")
        return self.engine.adapters[name]

    def template(self, adapter) -> str:
        return self.templates[adapter.name if adapter else self.alone]

    # ------------------------------------------------------------------------------------------ text -> ids

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """As generate.py --raw, but a special token's name in the text becomes this token: so a client can write a whole
        chat itself."""
        t = self.tokenizer
        return ([t.specials[t.bos]] if bos and t.adds_bos else []) + t.encode(text, specials=True)

    async def read(self, function, *args):
        """function(*args) in the tokenizer's thread. Raises BadRequest for a UserError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.reader, function, *args)
        except UserError as e:
            raise as_bad_request(e) from None

    async def ids(self, body: dict, adapter, is_chat: bool) -> tuple[list[list[int]], list[str]]:
        """The prompts of a request as ids, and the text of each, for `echo`. Raises BadRequest."""
        if is_chat:
            return [await self.read(data.prompt_ids, messages(body), self.template(adapter), self.tokenizer)], [""]
        given = prompts(body, self.model.config.vocab_size)
        ids = [await self.read(self.encode, p) if isinstance(p, str) else p for p in given]
        return ids, [p if isinstance(p, str) else await self.read(self.tokenizer.decode, p) for p in given]

    # ------------------------------------------------------------------------------------------ a request for replies

    async def reply(self, request: Request, is_chat: bool) -> Response:
        """/v1/chat/completions and /v1/completions."""
        body = read_json(await read_body(request))
        wanted = options(body, is_chat)
        adapter = self.adapter(wanted.model)
        prompt_ids, texts = await self.ids(body, adapter, is_chat)
        most = self.args.slots + self.args.queue
        if (n := len(prompt_ids) * wanted.n) > most:  # not 429: a client would try again for ever
            raise BadRequest(f"the request asks for {n} replies; this server takes at most {most} at the same time",
                             "n" if is_chat else "prompt")
        events, loop = asyncio.Queue(), asyncio.get_running_loop()

        def emit(number):
            def put(event):
                with contextlib.suppress(RuntimeError):  # the loop has ended before the engine
                    loop.call_soon_threadsafe(events.put_nowait, (number, event))
            return put

        jobs, config, deadline = [], self.model.config, time.monotonic() + self.args.deadline
        if any(i >= config.vocab_size for i in wanted.sampling["logit_bias"]):
            raise BadRequest(f"logit_bias: the model has the token ids 0 to {config.vocab_size - 1}", "logit_bias")
        try:
            for ids in prompt_ids:
                for choice in range(wanted.n):
                    reply = Reply(config, ids, self.tokenizer, wanted.stop, max_new_tokens=config.n_positions
                                  if wanted.max_new_tokens is None else wanted.max_new_tokens,
                                  adapter=adapter and adapter.key, **wanted.of(choice))
                    jobs.append(Job(reply, emit(len(jobs)), adapter, wanted.top, wanted.echo and wanted.top is not None,
                                    deadline))
        except UserError as e:
            raise as_bad_request(e, "messages" if is_chat else "prompt") from None
        said = [text if wanted.echo else "" for text in texts for _ in range(wanted.n)]
        answer = Answer(jobs, wanted, wanted.model or self.names()[0], is_chat, self.tokenizer, said)
        try:
            self.engine.submit(jobs)
        except KeyError:
            self.adapter(wanted.model)  # it was unloaded meanwhile: says so
            raise
        if wanted.stream:
            return StreamingResponse(self.stream(answer, events), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        return await self.whole(answer, events, request)

    async def whole(self, answer: Answer, events: asyncio.Queue, request: Request) -> Response:
        left, looked = len(answer.jobs), time.monotonic()
        try:
            while left:
                if time.monotonic() > looked + 0.5:  # also while tokens come all the time
                    if await request.is_disconnected():
                        return Response(status_code=499)  # nobody reads it
                    looked = time.monotonic()
                try:
                    async with asyncio.timeout(0.5):
                        number, event = await events.get()
                except TimeoutError:
                    continue
                if event.error:
                    raise event.error
                answer.take(number, event)
                left -= event.finish_reason is not None
            return JSONResponse(answer.whole())
        finally:
            self.engine.cancel(answer.jobs)

    async def stream(self, answer: Answer, events: asyncio.Queue):
        left = len(answer.jobs)
        try:
            for chunk in answer.first():
                yield chunk
            while left:
                try:
                    async with asyncio.timeout(self.args.keep_alive):
                        number, event = await events.get()
                except TimeoutError:
                    yield ": keep-alive\n\n"  # a comment: clients skip it, and proxies see that the connection lives
                    continue
                if event.error:
                    yield sse(as_error(event.error).json()) + DONE
                    return
                answer.take(number, event)
                if chunk := answer.piece(number, event):
                    yield chunk
                left -= event.finish_reason is not None
            yield answer.last()
        finally:  # also when the client has gone
            self.engine.cancel(answer.jobs)


async def read_body(request: Request) -> bytes:
    """Raises BadRequest (413) for more than MOST_BYTES. It reads on first, or the client would see a broken connection."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= MOST_BYTES:
            parts.append(part)
        elif size > 64 * MOST_BYTES:
            break
    if size > MOST_BYTES:
        raise BadRequest(f"the body has more than {human(MOST_BYTES)}", status=413, code="request_too_large")
    return b"".join(parts)


def as_error(e: Exception) -> BadRequest:
    """An error of the engine -> the answer."""
    if isinstance(e, BadRequest):
        return e
    if isinstance(e, Busy):
        return BadRequest(str(e), status=429, code="rate_limit_exceeded", kind="rate_limit_error")
    if isinstance(e, Stopped | Late):
        return BadRequest(str(e), status=503, code="unavailable", kind="server_error")
    return BadRequest(str(e) if isinstance(e, UserError | RuntimeError) else "the server failed; its terminal says why",
                      status=500, code="internal_error", kind="server_error")
