"""Continuous batching: one thread decodes for all requests, which come and go between two tokens.

    token = F^-1(u),  F that of softmax(logits / temperature) cut to top_p,  u uniform of (the request's seed, t)

The rows of all requests share each product with the base's weights, whichever adapter of that base they ask for. A
request's text depends on its own seed and not on its neighbours, up to the rounding of a product of more rows (Yu et
al. 2022, "Orca": scheduling by iteration; draws as in common/rollouts.py).
"""

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common import chat, lora, model, rollouts
from common.decoder import Decoder
from common.runtime import base
from common.serving.httpd import Refused

PREFILL = 512  # prompt tokens computed between two tokens of the others, a longer prompt apart
PATIENCE = 3  # steps in a row that fail before the engine gives up
GENERATE_SECONDS = 600  # that an answer may take


class Stopped(Refused):
    """The engine's thread has ended: nothing is decoded any more."""

    def __init__(self):
        super().__init__(503, "the generation worker has stopped", Retry_After=30)


@dataclass(eq=False)
class Request:
    """What Engine.submit takes: ids of a prompt, the name of a model, and how to sample; temperature 0 is greedy.

    The engine's thread calls emit(request, token, finish) for each token, with finish None, "stop" after a stop token
    or "length"; instead emit(request, None, error) where an exception ended the request.
    """

    ids: list[int]
    model: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: Collection[int] = chat.STOP_TOKENS
    emit: Callable | None = None
    tokens: list[int] = field(default_factory=list)
    uniforms: Tensor | None = None
    cancelled: bool = False
    done: bool = False

    def tell(self, token, finish):
        """Nothing comes after the end, and nothing to those who have left."""
        if not self.done and not self.cancelled:
            self.done = finish is not None
            with contextlib.suppress(RuntimeError):  # the server's loop has been closed
                self.emit(self, token, finish)


class Group:
    """The requests to models over one base: those that decode, with their hidden states, and those that enter."""

    def __init__(self, net, rows, slots, adapters):
        with lora.using(net, None):
            self.decoder = Decoder(net, rows, slots, merge=False, adapters=adapters, row_invariant=True)
        self.rows, self.failures = rows, 0
        self.clear()

    def clear(self):
        self.decoder.keep([])
        self.running, self.entering, self.hidden = [], [], self.decoder.head[:0]

    def members(self):
        return [*self.running, *self.entering]


class Engine:
    """Holds a decoder for each base and the requests in flight; `alive` turns False when its thread has died."""

    def __init__(self, models, rows=16, slots=2048, waiting=32):
        """models: {name: (model, its adapter's name or None)}; room for `rows` requests of `slots` tokens at a time on
        each base, and for `waiting` more in line."""
        # OpenMP's number of threads is set per thread: a new thread has the default, not torch's, and oneDNN reads it
        torch.set_num_threads(torch.get_num_threads())
        self.slots, self.limit = slots, waiting
        self.adapters = {name: adapter for name, (_, adapter) in models.items()}
        by_base = {}
        for net, adapter in models.values():
            by_base.setdefault(net, []).extend([adapter] if adapter else [])
        groups = {net: Group(net, rows, slots, adapters) for net, adapters in by_base.items()}
        self.group_of = {name: groups[net] for name, (net, _) in models.items()}
        self.groups = [*groups.values()]
        self.queue, self.lock, self.closed, self.alive = deque(), threading.Condition(), False, True
        self.counts = Counter(prompt_tokens=0, tokens=0, steps=0, finished=0, cancelled=0, failed=0)
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.thread.start()

    def submit(self, requests):
        """Take all of these requests or none. Refused if they do not fit into the queue, Stopped if nothing runs."""
        for request in requests:
            if len(request.ids) + request.max_tokens > self.slots:
                raise ValueError(f"{len(request.ids)} + {request.max_tokens} tokens, more than {self.slots}")
        with self.lock:
            if not self.alive or self.closed:
                raise Stopped
            self.check_room(len(requests))
            self.queue.extend(requests)
            self.lock.notify()

    def check_room(self, count):
        """Refused if `count` requests more would not be taken now."""
        rows, (running, waiting) = sum(group.rows for group in self.groups), self.in_flight()
        if running + waiting + count > self.limit + rows:
            seconds = 1 + waiting // max(1, rows)  # if an answer took one
            raise Refused(429, "too many requests wait", Retry_After=seconds)

    def cancel(self, requests):
        """Stop these at the next token; nothing is emitted for them any more."""
        with self.lock:
            for request in requests:
                request.cancelled = True
            self.lock.notify()

    def in_flight(self):
        """(requests that decode, requests that wait)"""
        return sum(len(group.members()) for group in self.groups), len(self.queue)

    def close(self, seconds=5.0):
        """End the thread after the step at hand; what is in flight gets no further token."""
        with self.lock:
            self.closed = True
            self.lock.notify()
        self.thread.join(seconds)

    def _work(self):
        torch.set_num_threads(torch.get_num_threads())  # as above
        try:
            while True:
                with self.lock:
                    while not (self.closed or self.queue or any(group.running for group in self.groups)):
                        self.lock.wait()
                    if self.closed:
                        return
                    for group in self.groups:
                        group.entering = self._next(group)
                for group in self.groups:
                    if group.members():
                        self._turn(group)
        finally:
            with self.lock:
                self.alive = False
                left = [*self.queue, *(request for group in self.groups for request in group.members())]
                self.queue, self.groups = deque(), []
            for request in left:
                request.tell(None, Stopped())

    def _next(self, group):
        """Take out of the queue what may enter this group now, in the order of arrival."""
        free, tokens, entering, others = group.rows - len(group.running), 0, [], deque()
        for request in self.queue:
            mine = self.group_of[request.model] is group
            if request.cancelled:
                self.counts["cancelled"] += 1
            elif mine and len(entering) < free and (not entering or tokens + len(request.ids) <= PREFILL):
                entering.append(request)
                tokens += len(request.ids)
            else:
                others.append(request)
                free = len(entering) if mine else free  # nobody overtakes
        self.queue = others
        return entering

    def _turn(self, group):
        """One token for every request of a group; an exception ends those requests, and PATIENCE of them the engine."""
        members = group.members()
        try:
            self._advance(group)
            group.failures = 0
        except Exception as error:
            group.failures += 1
            group.clear()
            for request in members:
                self.counts["failed"] += not request.done
                request.tell(None, error)
            if group.failures == PATIENCE:
                raise

    def _advance(self, group):
        decoder = group.decoder
        for request in group.entering:
            request.uniforms = rollouts.uniforms(request.seed, 0, [0], request.max_tokens)[0]
            self.counts["prompt_tokens"] += len(request.ids)
        fresh = [decoder.prefill([request.ids], [1], [self.adapters[request.model]]) for request in group.entering]
        group.hidden = torch.cat([group.hidden, *fresh])
        with self.lock:
            group.running, group.entering = group.members(), []
        tokens = _draw(decoder.logits(group.hidden), group.running)
        alive = []
        self.counts["tokens"] += len(tokens)
        self.counts["steps"] += 1
        for row, (request, token) in enumerate(zip(group.running, tokens.tolist(), strict=True)):
            request.tokens.append(token)
            finish = "length" if len(request.tokens) == request.max_tokens else None
            finish = "stop" if token in request.stop else finish
            if request.cancelled or finish:
                self.counts["cancelled" if request.cancelled else "finished"] += 1
            else:
                alive.append(row)
            request.tell(token, finish)
        order = decoder.keep(alive)
        group.running = [group.running[row] for row in order]
        group.hidden = decoder.step(tokens[order]) if order else group.hidden[:0]


def _draw(logits, requests):
    """One token per row (rows,), each by its request's own settings and next random number."""
    kinds = [(request.temperature, request.top_p) for request in requests]
    uniforms = torch.stack([request.uniforms[len(request.tokens)] for request in requests]).to(logits.device)
    tokens = torch.empty(len(requests), dtype=torch.long, device=logits.device)
    for kind in dict.fromkeys(kinds):
        temperature, top_p = kind
        rows = torch.tensor([i for i, other in enumerate(kinds) if other == kind], device=logits.device)
        own_logits = logits if len(rows) == len(kinds) else logits[rows]
        how = {"temperature": temperature, "top_p": top_p} if temperature else {"greedy": True}
        tokens[rows], _ = rollouts.draw(own_logits, uniforms[rows], **how)
    return tokens


# ---------------------------------------------------------------- requests of serve.py, whose App is `app`


async def requests_of(app, dialogues, asked):
    """One engine request for each of {name of a field: the turns in it}, tokenised outside the loop; all or none."""
    if app.status() != "ok":
        raise Refused(503, f"the model is {app.status()}", Retry_After=5)
    app.engine.check_room(len(dialogues))  # before the work of tokenising
    tokenizer, context, requests = app.tokenizers[asked["model"]], app.engine.slots, []
    for name, turns in dialogues.items():
        try:
            ids = await asyncio.to_thread(chat.encode_prompt, tokenizer, turns)
        except ValueError as error:
            raise Refused(400, f"{name}: {str(error)[:200]}", name) from None
        wanted = asked["max_tokens"] or max(1, context - len(ids))
        if len(ids) + wanted > context:
            numbers = f"{name} has {len(ids)} tokens and max_tokens is {wanted}"
            message = f"{numbers}: together more than the context of {context}"
            raise Refused(400, message, name, "context_length_exceeded")
        requests.append(Request(ids, **asked | {"max_tokens": wanted}))
    return requests


async def texts_of(app, call, requests, stops=()):
    """Yields (request, new text, finish) as text becomes certain, until all are finished, a stop text came or the
    client has left; what is left then is cancelled. Only a single request may have stop texts."""
    pushes = {request: chat.streamer(app.tokenizers[request.model], stops) for request in requests}
    inbox, loop, left = asyncio.Queue(), asyncio.get_running_loop(), len(requests)

    def emit(*event):
        loop.call_soon_threadsafe(inbox.put_nowait, event)

    for request in requests:
        request.emit = emit
    app.engine.submit(requests)
    watching = asyncio.create_task(call.left())
    watching.add_done_callback(lambda _: inbox.put_nowait((None, None, ConnectionResetError())))
    try:
        while left:
            seconds = max(0.0, call.began + GENERATE_SECONDS - time.monotonic())
            request, token, finish = await asyncio.wait_for(inbox.get(), seconds)
            if isinstance(finish, Exception):
                raise finish
            if call.tokens == 0:
                app.first_seconds += time.monotonic() - call.began
                app.first_tokens += 1
            call.tokens += 1
            text, stopped = pushes[request](token, finish is not None)
            left -= stopped or finish is not None
            yield request, text, "stop" if stopped else finish
    finally:
        app.engine.cancel([request for request in requests if not request.done])
        watching.cancel()
        await asyncio.wait({watching})


async def whole_texts(app, call, requests, stops=()):
    """(the whole text of each request, why the last one to end has ended)"""
    texts, finish = dict.fromkeys(requests, ""), None
    async for request, text, finish in texts_of(app, call, requests, stops):  # noqa: B007 - the last one is returned
        texts[request] += text
    return list(texts.values()), finish


# ---------------------------------------------------------------- models


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
