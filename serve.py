"""Demo server for any checkpoints: HTTP on the standard library, one decoder for all clients, safe to leave running.

    POST /generate        {"prompt", "max_tokens" = 128, "temperature" = 0.7, "top_p" = 0.9, "seed"?, "model"?}
    POST /batch_generate  {"prompts": [...], the same}           POST /v1/chat/completions, GET /v1/models: OpenAI's
    GET  /health  ok | loading | failed                          GET  /metrics: Prometheus' text
    GET  /        chat page                                      GET  /rate: blind rating page (--human_eval)

Requests of all clients share each step of serving/engine.py; a prompt is one user turn in Gemma's chat format. Left out
compared with vLLM: paged cache, prefix cache, parts of a long prompt between tokens, tools, log-probs. One request a
connection; what an address other than loopback needs is a token. Prompts and answers are never logged.

    python serve.py --checkpoint outputs/RUN/final                                    one run, adapter or whole model
    python serve.py --checkpoint base=google/gemma-3-270m-it sft=outputs/a/final rl=outputs/b/final   over one base
    python serve.py --checkpoint gemma-3-270m.gguf --model.dtype float32 --port 8000
    python serve.py --checkpoint tiny --human_eval outputs/RUN/human_eval.csv         raters open /rate
    GEMMA_ALIGNMENT_TOKEN=... python serve.py --checkpoint DIR --host 0.0.0.0
"""

import asyncio
import contextlib
import functools
import hashlib
import ipaddress
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from common import chat, config, lora, model
from common.human import manifest, ratings
from common.log import UserError, command, say
from common.runtime import base
from common.serving import engine, fields, httpd
from common.serving.httpd import Refused, respond

JOBS = (
    ("--checkpoint", {"nargs": "+", "metavar": "[NAME=]CHECKPOINT", "help": "what to serve, the first by default"}),
    ("--human_eval", {"metavar": "FILE.csv", "type": config.expand_home, "help": "blind file, to be rated at /rate"}),
    ("--host", {"default": "127.0.0.1", "help": "address to listen on; any but loopback needs GEMMA_ALIGNMENT_TOKEN"}),
    ("--port", {"type": int, "default": 5000, "help": "0 takes a free one"}),
)
# >>> edit here: what clients may take (and common/serving/httpd.py: bytes of a request)
CONNECTIONS, READ_SECONDS, GENERATE_SECONDS, DRAIN_SECONDS = 256, 10, 600, 30  # a process has 1,024 files by default
PROMPTS, CHAT_TOKENS = 32, 512  # of a batch; of an answer of /v1/ that names no length
ROWS, QUEUE, CONTEXT = 16, 32, 4096  # requests at a time and in line; tokens of prompt and answer

WEB = Path(__file__).resolve().parent / "web"
PAGES = {"/": "chat.html", "/rate": "rate.html"} | {f"/{n}": n for n in ("style.css", "page.js", "chat.js", "rate.js")}
KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript; charset=utf-8"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


# ---------------------------------------------------------------- one connection, one request


async def connection(app, reader, writer):
    """Read a request within READ_SECONDS, answer it, log one line, close."""
    call = SimpleNamespace(id=secrets.token_hex(4), method="-", path="-", query="", headers={}, status=0, body=None,
                           reader=reader, writer=writer, tokens=0, began=time.monotonic())  # fmt: skip
    writer.transport.set_write_buffer_limits(high=0)
    app.connections += 1
    try:
        async with asyncio.timeout(READ_SECONDS):
            if app.connections > CONNECTIONS:
                raise Refused(503, "too many connections", Retry_After=1)
            await httpd.read_head(reader, call)
            handler = handler_of(app, call)
            if call.method == "POST":
                call.body = fields.parse(await httpd.read_body(reader, writer, call.headers))
        app.active += 1
        try:
            await handler(app, call)
        finally:
            app.active -= 1
    except (ConnectionError, asyncio.CancelledError):
        call.status = call.status or 499  # the client has left
    except Exception as error:
        await fail(call, error)
    finally:
        with contextlib.suppress(OSError):  # the log's disk may be full
            note(app, call)
        await httpd.hang_up(reader, writer, 1 if app.connections <= CONNECTIONS else 0)
        app.connections -= 1


def handler_of(app, call):
    """The function that answers; Refused where there is none, or this client may not ask."""
    handlers = ({"GET": page, "HEAD": page} if call.path in PAGES else {}) | ROUTES.get(call.path, {})
    if not app.token:  # no page can make a browser send a token for it, behind a proxy or a rebound name
        httpd.check_origin(call.headers, app.names)
    if handlers.get(call.method) not in (page, health):
        httpd.check_token(call.headers, app.token)
    if not handlers:
        raise Refused(404, f"there is no {call.path[:80]}")
    if call.method not in handlers:
        raise Refused(405, f"{call.path} answers {', '.join(handlers)}", Allow=", ".join(handlers))
    if app.stopping and call.path != "/health":
        raise Refused(503, "the server is shutting down", Retry_After=5)
    return handlers[call.method]


async def fail(call, error):
    """Tell the client what went wrong, without a traceback; into the stream if it has begun."""
    if isinstance(error, engine.Busy):
        error = Refused(429, "too many requests wait", Retry_After=error.args[0])
    if isinstance(error, TimeoutError):
        error = Refused(408, "reading took too long") if call.body is None else Refused(504, "answering took too long")
    if not isinstance(error, Refused):
        with contextlib.suppress(OSError):
            print(f"request {call.id} failed:", file=sys.stderr)
            traceback.print_exception(error)
        error = Refused(500, f"internal error, request {call.id}")
    with contextlib.suppress(OSError):
        if call.status:
            await httpd.send(call, f"data: {json.dumps(error.body)}\n\n".encode())
            call.status = error.status
        else:
            await respond(call, error.status, error.body, headers=error.headers)


def note(app, call):
    """Count a request and write its line, in which nothing that a client sent can end a line or move a cursor."""
    known = call.path if call.path in ROUTES or call.path in PAGES else "other"
    app.requests[known, call.status] = app.requests.get((known, call.status), 0) + 1
    line = f"{call.id} {call.method} {json.dumps(call.path[:100])} {call.status}"
    print(f"{line} {time.monotonic() - call.began:.3f} s {call.tokens} tokens", file=sys.stderr, flush=True)


async def jobs_of(app, dialogues, asked, param):
    """One engine request for each dialogue (a list of turns), tokenised outside the loop; all or none."""
    if status(app) != "ok":
        raise Refused(503, f"the model is {status(app)}", Retry_After=5)
    app.engine.check_room(len(dialogues))  # before the work of tokenising
    tokenizer, longest = app.tokenizers[asked["model"]], app.longest
    names = [param] if len(dialogues) == 1 else [f"{param}[{i}]" for i in range(len(dialogues))]
    for where, turns in zip(names, dialogues):
        size = sum(len(turn["content"]) for turn in turns)
        if size > CONTEXT * longest or len(turns) > CONTEXT:  # hopeless, and tokenising would take its time
            raise Refused(400, f"{where}: {size} characters, {len(turns)} turns, too many for {CONTEXT} tokens", where)
    try:
        prompts = await asyncio.to_thread(lambda: [chat.encode_prompt(tokenizer, turns) for turns in dialogues])
    except ValueError as error:
        raise Refused(400, f"{param}: {str(error)[:200]}", param) from None
    jobs = []
    for where, ids in zip(names, prompts):
        wanted = asked["max_tokens"] or max(1, min(CHAT_TOKENS, CONTEXT - len(ids)))
        if len(ids) + wanted > CONTEXT:
            raise Refused(400, f"{where} has {len(ids)} tokens and max_tokens is {wanted}: together more than the "
                               f"context of {CONTEXT}", where)  # fmt: skip
        jobs.append(engine.request(ids, asked | {"max_tokens": wanted}))
    return jobs


# ---------------------------------------------------------------- generation


async def events(app, call, jobs):
    """Yields (number of the job, token, finish) until all are finished; cancels what is left when the client goes."""
    inbox, loop, left = asyncio.Queue(), asyncio.get_running_loop(), len(jobs)
    for i, job in enumerate(jobs):
        job.emit = lambda token, finish, i=i: loop.call_soon_threadsafe(inbox.put_nowait, (i, token, finish))
    try:
        app.engine.submit(jobs)
    except RuntimeError:
        raise Refused(503, "the generation worker has stopped", Retry_After=30) from None

    async def watch():
        with contextlib.suppress(OSError):
            while await call.reader.read(64 * 1024):
                pass  # a second request on this connection is never looked at
        inbox.put_nowait(None)

    watching, end = asyncio.create_task(watch()), time.monotonic() + GENERATE_SECONDS
    try:
        while left:
            event = await asyncio.wait_for(inbox.get(), max(0.0, end - time.monotonic()))
            if event is None:
                raise ConnectionResetError
            if isinstance(event[2], Exception):
                if not app.engine.alive:
                    raise Refused(503, "the generation worker has stopped", Retry_After=30)
                raise event[2]
            if call.tokens == 0:
                app.first[0], app.first[1] = app.first[0] + time.monotonic() - call.began, app.first[1] + 1
            call.tokens += 1
            left -= event[2] is not None
            yield event
    finally:
        app.engine.cancel([job for job in jobs if not job.done])
        watching.cancel()
        await asyncio.wait({watching})


async def texts_of(app, call, jobs, stops=()):
    """Yields (number of the job, new text, finish) as text becomes certain; a stop text ends its request."""
    pushes = [chat.streamer(app.tokenizers[job.model], stops) for job in jobs]
    async with contextlib.aclosing(events(app, call, jobs)) as tokens:
        async for i, token, finish in tokens:
            text, stopped = pushes[i](token, finish is not None)
            if stopped:
                yield i, text, "stop"
                return  # only requests for a single answer have stop texts
            yield i, text, finish


async def whole_texts(app, call, jobs, stops=()):
    texts, ends = [""] * len(jobs), [None] * len(jobs)
    async for i, text, finish in texts_of(app, call, jobs, stops):
        texts[i], ends[i] = texts[i] + text, finish
    return texts, ends


async def generate(app, call):
    fields.check_known(call.body, {"prompt", "model", *fields.NUMBERS})
    turns = [{"role": "user", "content": fields.text_of(call.body.get("prompt"), "prompt")}]
    jobs = await jobs_of(app, [turns], fields.settings(call.body, app.models), "prompt")
    texts, _ = await whole_texts(app, call, jobs)
    await respond(call, 200, {"generated_text": texts[0], "prompt": call.body["prompt"]})


async def batch_generate(app, call):
    fields.check_known(call.body, {"prompts", "model", *fields.NUMBERS})
    prompts = call.body.get("prompts")
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= PROMPTS:
        many = f", not {len(prompts)}" if isinstance(prompts, list) else ""
        raise Refused(400, f"prompts must be a list of 1 to {PROMPTS} texts{many}", "prompts")
    dialogues = [[{"role": "user", "content": fields.text_of(p, f"prompts[{i}]")}] for i, p in enumerate(prompts)]
    jobs = await jobs_of(app, dialogues, fields.settings(call.body, app.models), "prompts")
    texts, _ = await whole_texts(app, call, jobs)
    await respond(call, 200, {"results": [{"prompt": p, "generated_text": t} for p, t in zip(prompts, texts)]})


async def chat_completions(app, call):
    body = call.body
    fields.check_known(body, fields.CHAT_FIELDS)
    stream, with_usage, stops = fields.chat_options(body)
    turns, length = fields.turns_of(body.get("messages")), body.get("max_completion_tokens", body.get("max_tokens"))
    body = body if length is None else body | {"max_tokens": length}
    asked = fields.settings(body, app.models, max_tokens=None, temperature=1, top_p=1)
    jobs = await jobs_of(app, [turns], asked, "messages")
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion", "created": int(time.time()),
            "model": asked["model"]}  # fmt: skip
    if stream:
        await stream_chat(app, call, jobs, stops, (head, with_usage))
        return
    texts, ends = await whole_texts(app, call, jobs, stops)
    message = {"role": "assistant", "content": texts[0], "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": ends[0], "logprobs": None}
    await respond(call, 200, head | {"choices": [choice], "usage": usage(jobs[0], call.tokens)})


def usage(job, answer):
    return {"prompt_tokens": len(job.ids), "completion_tokens": answer, "total_tokens": len(job.ids) + answer}


async def stream_chat(app, call, jobs, stops, form):
    """Server-sent events: a chunk whenever text becomes certain, then [DONE]. The status waits for the first token."""
    head, with_usage = form[0] | {"object": "chat.completion.chunk"} | ({"usage": None} if form[1] else {}), form[1]

    async def send(delta, finish=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        await httpd.send(call, f"data: {json.dumps(head | {'choices': [choice]})}\n\n".encode())

    async with contextlib.aclosing(texts_of(app, call, jobs, stops)) as texts:
        async for _, text, finish in texts:
            if not call.status:
                await respond(call, 200, None, "text/event-stream; charset=utf-8")
                await send({"role": "assistant", "content": ""})
            if text:
                await send({"content": text})
            if finish:
                await send({}, finish)
    last = f"data: {json.dumps(head | {'choices': [], 'usage': usage(jobs[0], call.tokens)})}\n\n" if with_usage else ""
    await httpd.send(call, f"{last}data: [DONE]\n\n".encode())


# ---------------------------------------------------------------- the rest: pages, health, models, metrics, ratings


async def page(app, call):
    file = WEB / PAGES[call.path]
    await respond(call, 200, file.read_bytes(), KINDS[file.suffix], [f"Content-Security-Policy: {POLICY}"])


def status(app):
    return "loading" if app.engine is None else "ok" if app.engine.alive else "failed"


async def health(app, call):
    await respond(call, 200 if status(app) == "ok" else 503, {"status": status(app)})


async def models(app, call):
    made = {"object": "model", "created": app.created, "owned_by": "gemma-alignment"}
    await respond(call, 200, {"object": "list", "data": [{"id": name, **made} for name in app.models]})


async def metrics(app, call):
    """Prometheus' text format, version 0.0.4."""
    running, waiting = app.engine.in_flight() if app.engine else (0, 0)
    counts = app.engine.counts if app.engine else {}
    numbers = {"up gauge": int(status(app) == "ok"),
               "requests_running gauge": running, "requests_waiting gauge": waiting,
               "connections gauge": app.connections, "first_token_seconds_sum counter": app.first[0],
               "first_token_seconds_count counter": app.first[1],
               **{f"engine_{name}_total counter": value for name, value in counts.items()}}  # fmt: skip
    lines = ["# TYPE gemma_requests_total counter"]
    lines += [f'gemma_requests_total{{path="{p}",status="{s}"}} {n}' for (p, s), n in sorted(app.requests.items())]
    for name, value in numbers.items():
        lines += [f"# TYPE gemma_{name}", f"gemma_{name.split()[0]} {value}"]
    await respond(call, 200, ("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4; charset=utf-8")


async def rating_items(app, call):
    """What one rater sees: every item of the blind file, its answers in an order of the rater's own."""
    if not app.blind:
        raise Refused(404, "nothing to rate: start serve.py with --human_eval FILE.csv")
    rater = check_rater(urllib.parse.parse_qs(call.query).get("rater", [""])[0])
    items = []
    for name, item in app.items.items():
        order = sorted(item["slots"], key=lambda slot: hashlib.sha256(f"{rater}/{name}/{slot}".encode()).digest())
        shown = {key: item[key] for key in ("task", "prompt", "reference") if key in item}
        items.append({"item_id": name, **shown, "answers": [{"slot": s, "text": item["answers"][s]} for s in order]})
    rated = {row["item_id"]: row for row in app.rated if row["rater_id"] == rater}  # the last of each item
    await respond(call, 200, {"file": app.blind.name, "total": len(items), "items": items, "rated": rated})


async def rate(app, call):
    """Keep a rating: 200 only when it is on the disk."""
    if not app.blind:
        raise Refused(404, "nothing to rate: start serve.py with --human_eval FILE.csv")
    fields.check_flat(call.body)
    row = call.body | {"rater_id": check_rater(call.body.get("rater_id"))}
    try:
        rating = ratings.parse_rating(row, app.items)
    except ratings.ForeignItem as error:  # a page that was open before the server got another blind file
        raise Refused(409, f"{error}: reload the page to rate the items of this study", "item_id") from None
    except ValueError as error:
        raise Refused(400, str(error)[:300], str(error).partition(" ")[0]) from None
    try:
        async with app.writing:
            await asyncio.to_thread(ratings.append, app.ratings, row)
    except OSError as error:
        raise Refused(507, f"the rating was not saved: {error.strerror}") from None
    app.rated.append(shown(rating))
    done = {other["item_id"] for other in app.rated if other["rater_id"] == row["rater_id"]}
    await respond(call, 200, {"saved": True, "rated": len(done), "total": len(app.items)})


def check_rater(name):
    if not isinstance(name, str) or not 0 < len(name.strip()) <= 80 or not name.isprintable():
        raise Refused(400, "rater must be a name of 1 to 80 printable characters", "rater_id")
    return name.strip()


def shown(rating):
    """A rating of parse_rating as the page gets it back."""
    kept = {name: rating[name] for name in ("rater_id", "item_id", *ratings.SCORES, "comment")}
    return kept | {"preferred": "/".join(rating["preferred"]) or "none"}


ROUTES = {
    "/health": {"GET": health},
    "/metrics": {"GET": metrics},
    "/generate": {"POST": generate},
    "/batch_generate": {"POST": batch_generate},
    "/v1/models": {"GET": models},
    "/v1/chat/completions": {"POST": chat_completions},
    "/rate/items": {"GET": rating_items},
    "/rate": {"POST": rate},
}


# ---------------------------------------------------------------- start and stop


def parse_models(arguments):
    """["DIR", "sft=DIR", ...] -> {name: checkpoint}; without a name it is called as its run's folder or file."""
    checkpoints = {}
    for argument in arguments:
        name, source = config.named_checkpoint(argument)
        if not name:
            path = Path(source)
            path = path.absolute().parent if path.name in ("final", "best") else path
            name = path.name.removesuffix(".gguf")
        if not source or checkpoints.setdefault(name, source) != source:
            wrong = f"--checkpoint {argument!r:.80} names nothing, or {name!r} stands twice"
            raise UserError(f"{wrong}: expected NAME=CHECKPOINT; {config.NAME_RULE}")
    return checkpoints


def load(sources, device, dtype, given=None):
    """({name: (model, its adapter's name or None)}, {name: tokenizer}); a base that several share is loaded once.

    And once more in 4 bits where adapters were trained on it so: beside the unquantised base they say something else.
    given: the base of all adapters, in place of those that their files name.
    """
    bases, models, tokenizers = {}, {}, {}
    for name, source in sources.items():
        folder, adapter = base.locate(source, given)
        quantised = adapter is not None and model.trained_quantised(adapter)
        key = folder.resolve(), quantised
        if key not in bases:
            bases[key] = model.load(folder, device, dtype, quantize=quantised)
            lora.wrap(bases[key][0])
        net, tokenizers[name] = bases[key]
        inner = f"adapter{len(models)}" if adapter else None  # a part of a model cannot have a dot in its name
        if adapter:
            model.load_adapter(net, inner, adapter, trainable=False)
        models[name] = (net, inner)
        chat.encode_text(tokenizers[name], "warm")  # sets the tokenizer's options, which later threads only read
    return models, tokenizers


def start_loading(app, device, dtype):
    """Load in a thread of its own, so that /health answers meanwhile -> a future."""
    loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def settle(error):
        if not done.done():
            done.set_exception(error) if error else done.set_result(None)

    def work():
        error = None
        try:
            models, app.tokenizers = load(app.models, device, dtype, app.base_checkpoint)
            app.longest = max(len(word) for tokenizer in app.tokenizers.values() for word in tokenizer.get_vocab())
            app.engine = engine.Engine(models, ROWS, CONTEXT, QUEUE)
        except BaseException as failure:  # a panic of a library in Rust is no Exception
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop may be gone
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=work, name="loading", daemon=True).start()
    return done


async def serve(app, device, dtype):
    """Listen, load, answer until SIGTERM or SIGINT, then finish what is in flight; a second signal ends at once."""
    stop = asyncio.Event()

    def on_signal(number):
        if app.stopping:
            os._exit(128 + number)
        app.stopping = True
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    loop.set_default_executor(ThreadPoolExecutor(2))  # tokenises, and writes ratings
    how = {"limit": httpd.HEAD_BYTES, "backlog": 128}
    try:
        server = await asyncio.start_server(functools.partial(connection, app), app.host, app.port, **how)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if getattr(error, "errno", 0) > 0 else error
        raise UserError(f"--host {app.host} --port {app.port}: {reason}") from error
    host, port = server.sockets[0].getsockname()[:2]
    say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}, loading {', '.join(app.models)}")
    loading, stopped = start_loading(app, device, dtype), asyncio.create_task(stop.wait())
    await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        loading.result()
        say(f"ready: {', '.join(app.models)} at most {CONTEXT} tokens, {ROWS} at a time; Ctrl-C stops")
    await stopped
    server.close()
    end = time.monotonic() + DRAIN_SECONDS
    while app.active and time.monotonic() < end:
        await asyncio.sleep(0.02)
    if not loading.done():
        os._exit(0)  # a thread inside a C++ loader cannot be asked to stop
    app.engine.close()


@command
def main(argv=None):
    cfg, job = config.parse_args("serve.py", __doc__, ("model",), (), argv, JOBS)
    if job.checkpoint is None and cfg.model.adapter:
        job.checkpoint = [cfg.model.adapter]
    sources = parse_models(job.checkpoint or [cfg.model.base_checkpoint])
    token = os.environ.get("GEMMA_ALIGNMENT_TOKEN", "")
    local = job.host == "localhost" or (httpd.is_address(job.host) and ipaddress.ip_address(job.host).is_loopback)
    if not local and not token:
        raise UserError(f"--host {job.host} is open to others: set GEMMA_ALIGNMENT_TOKEN to a secret of 16 characters")
    if token and (len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token):
        raise UserError("GEMMA_ALIGNMENT_TOKEN: 16 or more printable ASCII characters without spaces are needed")
    app = SimpleNamespace(
        host=job.host, port=job.port, token=token, models=sources, tokenizers={}, engine=None, created=int(time.time()),
        names={"localhost", job.host.lower(), socket.gethostname().lower()}, stopping=False, active=0,
        connections=0, requests={}, first=[0.0, 0], blind=None, items={}, rated=[],
        base_checkpoint=job.flags.get("model.base_checkpoint"),
    )  # fmt: skip
    if job.human_eval:
        app.blind, app.items = Path(job.human_eval), manifest.read_manifest(job.human_eval)
        if app.blind.suffix == ".csv" and os.access(manifest.key_path(app.blind), os.R_OK):
            manifest.check_pair(app.blind, app.items)
        app.ratings, app.writing = app.blind.with_suffix(".ratings.jsonl"), asyncio.Lock()
        app.rated = [shown(row) for row in ratings.reopen(app.ratings, app.items)]
        say(f"{len(app.items)} items to rate at /rate, {len(app.rated)} ratings in {app.ratings}")
    device = model.pick_device(cfg.device)
    asyncio.run(serve(app, device, model.pick_dtype(cfg.model.dtype, device)))


if __name__ == "__main__":
    main()
