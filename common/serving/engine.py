"""Continuous batching: one thread decodes for all requests, which come and go between two tokens.

    token = F^-1(u),  F that of softmax(logits / temperature) cut to top_p,  u uniform of (the request's seed, t)

The rows of all requests share each product with the base's weights, whichever adapter of that base they ask for. A
request's text depends on its own seed and not on its neighbours, up to the rounding of a product of more rows (Yu et
al. 2022, "Orca": scheduling by iteration; draws as in common/rollouts.py).
"""

import contextlib
import threading
from collections import deque
from types import SimpleNamespace

import torch

from common import chat, lora, rollouts
from common.decoder import Decoder

PREFILL = 512  # prompt tokens computed between two tokens of the others, a longer prompt apart
PATIENCE = 3  # steps in a row that may fail before the engine gives up


class Busy(Exception):
    """No room in the queue; its argument: seconds after which to come again, if an answer took one."""


def request(ids, asked, emit=None, stop=chat.STOP_TOKENS):
    """What Engine.submit takes. ids: the prompt; asked: {"model": a name that the engine knows, "max_tokens",
    "temperature": 0 is greedy, "top_p", "seed"}.

    emit(token, finish) is called from the engine's thread for each token, with finish None, "stop" after a stop token
    or "length"; instead emit(None, error) where an exception ended the request.
    """
    return SimpleNamespace(ids=ids, **asked, emit=emit, stop=frozenset(stop), tokens=[], cancelled=False, done=False)


class Engine:
    """Holds a decoder for each base and the requests in flight; `alive` turns False when its thread has died."""

    def __init__(self, models, rows=16, slots=2048, waiting=32):
        """models: {name: (model, its adapter's name or None)}; room for `rows` requests of `slots` tokens at a time on
        each base, and for `waiting` more in line."""
        torch.set_num_threads(torch.get_num_threads())  # a new thread's OpenMP, which oneDNN asks, has not heard of it
        self.groups, self.slots, self.limit = {}, slots, waiting
        self.adapters = {name: adapter for name, (_, adapter) in models.items()}
        for net, names in _by_base(models).values():
            with lora.using(net, None):
                adapters = [self.adapters[name] for name in names if self.adapters[name]]
                decoder = Decoder(net, rows, slots, merge=False, adapters=adapters, row_invariant=True)
            group = SimpleNamespace(decoder=decoder, rows=rows, failures=0)
            group.running, group.entering, group.hidden = [], [], decoder.head[:0]
            self.groups |= dict.fromkeys(names, group)
        self.unique_groups = list({id(group): group for group in self.groups.values()}.values())
        self.queue, self.lock, self.closed, self.alive = deque(), threading.Condition(), False, True
        self.counts = dict.fromkeys(("prompt_tokens", "tokens", "steps", "finished", "cancelled", "failed"), 0)
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.thread.start()

    def submit(self, requests):
        """Take all of these requests or none. Busy if they do not fit into the queue, RuntimeError if nothing runs."""
        for request in requests:
            if len(request.ids) + request.max_tokens > self.slots:
                raise ValueError(f"{len(request.ids)} + {request.max_tokens} tokens, more than {self.slots}")
        with self.lock:
            if not self.alive or self.closed:
                raise RuntimeError("the engine has stopped")
            self.check_room(len(requests))
            self.queue.extend(requests)
            self.lock.notify()

    def check_room(self, count):
        """Busy if `count` requests more would not be taken now."""
        rows, active = sum(group.rows for group in self.unique_groups), self.in_flight()
        if sum(active) + count > self.limit + rows:
            raise Busy(1 + active[1] // rows)

    def cancel(self, requests):
        """Stop these at the next token; nothing is emitted for them any more."""
        with self.lock:
            for request in requests:
                request.cancelled = True
            self.lock.notify()

    def in_flight(self):
        """(requests that decode, requests that wait)"""
        return sum(len(group.running) + len(group.entering) for group in self.unique_groups), len(self.queue)

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
                    while not (self.closed or self.queue or any(group.running for group in self.unique_groups)):
                        self.lock.wait()
                    if self.closed:
                        return
                    for group in self.unique_groups:
                        group.entering = self._next(group)
                for group in self.unique_groups:
                    if group.running or group.entering:
                        self._turn(group)
        finally:
            with self.lock:
                self.alive = False
                left = [
                    *self.queue,
                    *(request for group in self.unique_groups for request in [*group.running, *group.entering]),
                ]
                self.queue, self.unique_groups = deque(), []
            for request in left:
                _emit(request, None, RuntimeError("the engine has stopped"))

    def _next(self, group):
        """Take out of the queue what may enter this group now, in the order of arrival."""
        free, tokens, entering, others = group.rows - len(group.running), 0, [], deque()
        for request in self.queue:
            mine = self.groups[request.model] is group
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
        members = [*group.running, *group.entering]
        try:
            self._advance(group, group.decoder)
            group.failures = 0
        except Exception as error:
            group.failures += 1
            group.decoder.keep([])
            group.running, group.entering, group.hidden = [], [], group.decoder.head[:0]
            for request in members:
                self.counts["failed"] += not request.done
                _emit(request, None, error)
            if group.failures == PATIENCE:
                raise

    def _advance(self, group, decoder):
        if group.entering:
            for request in group.entering:
                request.uniforms = rollouts.uniforms(request.seed, 0, [0], request.max_tokens)[0]
                self.counts["prompt_tokens"] += len(request.ids)
            fresh = [decoder.prefill([request.ids], [1], [self.adapters[request.model]]) for request in group.entering]
            group.hidden = torch.cat([group.hidden, *fresh])
            with self.lock:
                group.running, group.entering = [*group.running, *group.entering], []
        tokens = _draw(decoder.logits(group.hidden), group.running)
        alive = []
        self.counts["tokens"] += len(tokens)
        self.counts["steps"] += 1
        for row, (request, token) in enumerate(zip(group.running, tokens.tolist())):
            request.tokens.append(token)
            finish = (
                "stop" if token in request.stop else "length" if len(request.tokens) == request.max_tokens else None
            )
            if request.cancelled or finish:
                self.counts["cancelled" if request.cancelled else "finished"] += 1
            else:
                alive.append(row)
            _emit(request, token, finish)
        order = decoder.keep(alive)
        group.running = [group.running[row] for row in order]
        group.hidden = decoder.step(tokens[order]) if order else group.hidden[:0]


def _by_base(models):
    """{id of a model: (model, names that run on it)}"""
    bases = {}
    for name, (net, _) in models.items():
        bases.setdefault(id(net), (net, []))[1].append(name)
    return bases


def _emit(request, token, finish):
    """Hand a token or the end over; nothing after the end, and nothing to those who have left."""
    if not request.done and not request.cancelled:
        request.done = finish is not None
        with contextlib.suppress(RuntimeError):  # the server's loop has been closed
            request.emit(token, finish)


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
