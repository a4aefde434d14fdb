"""Demo server for any checkpoints: HTTP on the standard library, one decoder for all clients, safe to leave running.

    POST /generate        {"prompt", "max_tokens" = 128, "temperature" = 0.7, "top_p" = 0.9, "seed"?, "model"?}
    POST /batch_generate  {"prompts": [...], the same}           POST /v1/chat/completions, GET /v1/models: OpenAI's
    GET  /health  ok | loading | failed                          GET  /metrics: Prometheus' text
    GET  /        chat page                                      GET  /rate: blind rating page (--human_eval)

Requests of all clients share each step of serving/engine.py; a prompt is one user turn in Gemma's chat format. Left out
compared with vLLM: paged cache, prefix cache, chunked prefill, tools, log-probs. An address other
than loopback needs a token. Prompts and answers are never logged.

    python serve.py --checkpoint outputs/RUN/final                                    one run, adapter or whole model
    python serve.py --checkpoint base=google/gemma-3-270m-it sft=outputs/a/final rl=outputs/b/final   over one base
    python serve.py --checkpoint gemma-3-270m.gguf --model.dtype float32 --port 8000
    python serve.py --checkpoint tiny --human_eval outputs/RUN/human_eval.csv         raters open /rate
    GEMMA_ALIGNMENT_TOKEN=... python serve.py --checkpoint DIR --host 0.0.0.0
"""

import asyncio
import contextlib
import os
import secrets
import signal
import time
import urllib.parse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common import config

JOBS = (
    ("--checkpoint", {"nargs": "+", "metavar": "[NAME=]CHECKPOINT", "help": "to serve; the first is the default"}),
    ("--human_eval", {"metavar": "FILE.csv", "type": config.expand_home, "help": "blind study, to be rated at /rate"}),
    ("--host", {"default": "127.0.0.1", "help": "address to listen on; any but loopback needs GEMMA_ALIGNMENT_TOKEN"}),
    ("--port", {"type": int, "default": 5000, "help": "port to listen on; 0 takes a free one [default 5000]"}),
    ("--rows", {"type": int, "default": 16, "help": "requests answered at a time on each base [default 16]"}),
    ("--queue", {"type": int, "default": 32, "help": "requests that may wait; more get status 429 [default 32]"}),
    ("--context", {"type": int, "default": 4096, "help": "most tokens of prompt and answer together [default 4096]"}),
)
FLAGS = dict(script="serve.py", description=__doc__, sections=("model",), modes=(), jobs=JOBS)
if __name__ == "__main__":
    config.check_flags(**FLAGS)  # before torch is imported, which takes seconds

from common import model
from common.human import ratings
from common.log import UserError, command, hint, say
from common.runtime import base
from common.serving import fields, httpd
from common.serving.engine import Engine, load, requests_of, texts_of, whole_texts
from common.serving.httpd import Refused

# What clients may take: common/serving/fields.py (prompts), httpd.py (bytes, connections) and engine.py (seconds)
DRAIN_SECONDS = 30  # that a stop waits for answers in flight
STARTED = int(time.time())
WEB = Path(__file__).resolve().parent / "web"
PAGES = {"/": "chat.html", "/rate": "rate.html"} | {f"/{n}": n for n in ("style.css", "page.js", "chat.js", "rate.js")}
KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript; charset=utf-8"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass
class App:
    """What all connections share."""

    sources: dict  # {name of a model: its checkpoint}
    token: str
    names: set  # hosts that are this server
    sheet: ratings.Sheet | None  # what raters see at /rate
    engine: Engine | None = None  # None while loading
    tokenizers: dict = field(default_factory=dict)
    requests: Counter = field(default_factory=Counter)  # {(path, status): how many}
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    connections: int = 0
    active: int = 0  # requests that are being answered
    first_tokens: int = 0
    first_seconds: float = 0.0

    def status(self):
        return "loading" if self.engine is None else "ok" if self.engine.alive else "failed"

    def route_of(self, path):
        """The one of GET and POST that answers a path, "other" where none does."""
        route = "/v1/models" if path.startswith("/v1/models/") else path
        return route if route in GET | POST else "other"

    def handler_of(self, call):
        """The function that answers; Refused where there is none, or this client may not ask."""
        route, health = self.route_of(call.path), call.path == "/health"
        handlers = {method: routes[route] for method, routes in METHODS.items() if route in routes}
        if not self.token and not health:  # no page can make a browser send a token, behind a proxy or a rebound name
            httpd.check_origin(call.headers, self.names)
        if call.method not in ("GET", "HEAD") or call.path not in ("/health", *PAGES):
            httpd.check_token(call.headers, self.token)
        if not handlers:
            raise Refused(404, f"there is no {call.path[:80]}{hint(call.path, GET | POST)}")
        if call.method not in handlers:
            raise Refused(405, f"{call.path} answers {', '.join(handlers)}", Allow=", ".join(handlers))
        if self.stopping.is_set() and not health:
            raise Refused(503, "the server is shutting down", Retry_After=5)
        return handlers[call.method]


# ---------------------------------------------------------------- generation


async def answers_to(app, call, prompts):
    """The texts that answer {name of a field: its prompt}, each one user turn, by the settings beside them."""
    dialogues = {name: [{"role": "user", "content": fields.text_of(text, name)}] for name, text in prompts.items()}
    requests = await requests_of(app, dialogues, fields.settings(call.body, app.sources))
    texts, _ = await whole_texts(app, call, requests)
    return texts


async def generate(app, call):
    fields.check_known(call.body, {"prompt", "model", *fields.NUMBERS})
    prompt = call.body.get("prompt")
    (text,) = await answers_to(app, call, {"prompt": prompt})
    await call.respond(200, {"generated_text": text, "prompt": prompt})


async def batch_generate(app, call):
    fields.check_known(call.body, {"prompts", "model", *fields.NUMBERS})
    prompts = fields.prompts_of(call.body)
    texts = await answers_to(app, call, {f"prompts[{i}]": prompt for i, prompt in enumerate(prompts)})
    results = [{"prompt": prompt, "generated_text": text} for prompt, text in zip(prompts, texts, strict=True)]
    await call.respond(200, {"results": results})


async def chat_completions(app, call):
    body = call.body
    fields.check_known(body, fields.CHAT_FIELDS)
    stream, with_usage, stops = fields.chat_options(body)
    turns = fields.turns_of(body.get("messages"))
    asked = fields.chat_settings(body, app.sources)
    requests = await requests_of(app, {"messages": turns}, asked)
    name, now = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
    head = {"id": name, "object": "chat.completion" + ".chunk" * stream, "created": now, "model": asked["model"]}
    if stream:
        await stream_chat(app, call, requests, stops, head, with_usage)
        return
    (text,), finish = await whole_texts(app, call, requests, stops)
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    await call.respond(200, head | {"choices": [choice], "usage": usage(requests[0], call)})


def usage(request, call):
    prompt, answer = len(request.ids), call.tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


async def stream_chat(app, call, requests, stops, head, with_usage):
    """Server-sent events: a chunk whenever text becomes certain, then [DONE]. The status waits for the first token."""
    head = head | ({"usage": None} if with_usage else {})

    async def send(delta, finish=None):
        await call.send_event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    async with contextlib.aclosing(texts_of(app, call, requests, stops)) as texts:
        async for _, text, finish in texts:
            if not call.status:
                await call.begin_stream("text/event-stream; charset=utf-8")
                await send({"role": "assistant", "content": ""})
            if text:
                await send({"content": text})
            if finish:
                await send({}, finish)
    if with_usage:
        await call.send_event(head | {"choices": [], "usage": usage(requests[0], call)})
    await call.send_part(b"data: [DONE]\n\n")
    await call.send_part(b"")


# ---------------------------------------------------------------- the rest: pages, health, models, metrics


async def page(app, call):
    file = WEB / PAGES[call.path]
    data = file.read_bytes()
    if app.sheet:
        data = data.replace(b'<a href="/rate" hidden>', b'<a href="/rate">')
    await call.respond(200, data, KINDS[file.suffix], {"Content-Security-Policy": POLICY})


async def health(app, call):
    await call.respond(200 if app.status() == "ok" else 503, {"status": app.status()})


async def models(app, call):
    """All of them, or the one whose name ends the path."""
    wanted = urllib.parse.unquote(call.path.removeprefix("/v1/models").removeprefix("/"))
    facts = {"object": "model", "created": STARTED, "owned_by": "gemma-alignment"}
    entries = [{"id": name, **facts} for name in app.sources if wanted in ("", name)]
    if not entries:
        raise fields.no_model(app.sources)
    await call.respond(200, entries[0] if wanted else {"object": "list", "data": entries})


async def metrics(app, call):
    """Prometheus' text format, version 0.0.4."""
    running, waiting = app.engine.in_flight() if app.engine else (0, 0)
    numbers = {
        "up gauge": int(app.status() == "ok"),
        "requests_running gauge": running,
        "requests_waiting gauge": waiting,
        "connections gauge": app.connections,
        "first_token_seconds_sum counter": app.first_seconds,
        "first_token_seconds_count counter": app.first_tokens,
    }
    if app.engine:
        numbers |= {f"engine_{name}_total counter": value for name, value in app.engine.counts.items()}
    lines = ["# TYPE gemma_requests_total counter"]
    lines += [f'gemma_requests_total{{path="{p}",status="{s}"}} {n}' for (p, s), n in sorted(app.requests.items())]
    for name, value in numbers.items():
        lines += [f"# TYPE gemma_{name}", f"gemma_{name.split()[0]} {value}"]
    await call.respond(200, ("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4; charset=utf-8")


# ---------------------------------------------------------------- ratings


def sheet_of(app):
    if not app.sheet:
        raise Refused(404, "nothing to rate: start serve.py with --human_eval FILE.csv")
    return app.sheet


async def rating_items(app, call):
    rater = fields.rater_of(urllib.parse.parse_qs(call.query).get("rater", [""])[0])
    await call.respond(200, sheet_of(app).shown_to(rater))


async def rate(app, call):
    """Keep a rating: 200 only when it is on the disk."""
    sheet = sheet_of(app)
    row = fields.rating_of(call.body)
    try:
        rating = ratings.parse_rating(row, sheet.items)
        await asyncio.to_thread(ratings.append, sheet.file, row)
    except ratings.ForeignItem as error:  # a page that was open before the server got another blind file
        raise Refused(409, f"{error}: reload the page to rate the items of this study", "item_id") from None
    except ValueError as error:
        raise Refused(400, str(error)[:300], str(error).partition(" ")[0]) from None
    except OSError as error:
        raise Refused(507, f"the rating was not saved: {error.strerror}") from None
    done = sheet.add(rating)
    await call.respond(200, {"saved": True, "rated": done, "total": len(sheet.items)})


GET = dict.fromkeys(PAGES, page) | {"/health": health, "/metrics": metrics}
GET |= {"/v1/models": models, "/rate/items": rating_items}
POST = {"/generate": generate, "/batch_generate": batch_generate, "/v1/chat/completions": chat_completions}
POST |= {"/rate": rate}
METHODS = {"GET": GET, "HEAD": GET, "POST": POST}


# ---------------------------------------------------------------- start and stop


def parse_models(arguments):
    """["DIR", "sft=DIR", ...] -> {name: checkpoint}; without a name it is called as its run's folder or file."""
    checkpoints = {}
    for argument in arguments:
        name, source = config.named_checkpoint(argument)
        name = name or base.name_of(source)
        if not source or checkpoints.setdefault(name, source) != source:
            wrong = f"--checkpoint {argument!r:.80} names nothing, or {name!r} stands twice"
            raise UserError(f"{wrong}: expected NAME=CHECKPOINT; {config.NAME_RULE}")
    return checkpoints


async def serve(app, job, device, dtype):
    """Listen, load, answer until SIGTERM or SIGINT, then finish what is in flight; a second signal ends at once."""
    loop = asyncio.get_running_loop()

    def on_signal(number, _):
        if app.stopping.is_set():
            os._exit(128 + number)
        loop.call_soon_threadsafe(app.stopping.set)

    def start():
        models, app.tokenizers = load(app.sources, device, dtype, job.flags.get("model.base_checkpoint"))
        app.engine = Engine(models, job.rows, job.context, job.queue)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)  # Windows has no loop.add_signal_handler
    loop.set_default_executor(ThreadPoolExecutor(2))  # loads, tokenises, and writes ratings
    server = await httpd.listen(app, job.host, job.port)
    host, port = server.sockets[0].getsockname()[:2]
    say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}, loading {', '.join(app.sources)}")
    loading, stopped = loop.run_in_executor(None, start), asyncio.create_task(app.stopping.wait())
    await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        loading.result()
        sizes = f"at most {job.context} tokens per request, {job.rows} requests at a time"
        say(f"ready: {', '.join(app.sources)}; {sizes}; Ctrl-C stops")
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
    cfg, job = config.parse_args(**FLAGS, argv=argv)
    for flag, least in (("rows", 1), ("queue", 0), ("context", 64)):
        if getattr(job, flag) < least:
            raise UserError(f"--{flag} {getattr(job, flag)}: at least {least}")
    if job.checkpoint and "model.adapter" in job.flags:
        raise UserError("--model.adapter is not read beside --checkpoint: name it there, as NAME=ADAPTER")
    sources = parse_models(job.checkpoint or [cfg.model.adapter or cfg.model.base_checkpoint])
    sheet = ratings.Sheet(job.human_eval) if job.human_eval else None
    app = App(sources, httpd.token_for(job.host), httpd.names_of(job.host), sheet)
    device = model.pick_device(cfg.device)
    asyncio.run(serve(app, job, device, model.pick_dtype(cfg.model.dtype, device)))


if __name__ == "__main__":
    main()
