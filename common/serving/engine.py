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

    emit(token, finish) is called from the engine's thread for each token, with finish None, "stop" behind a stop token
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
                decoder = Decoder(net, rows, slots, merge=False, adapters=adapters, steady=True)
            group = SimpleNamespace(decoder=decoder, rows=rows, failures=0)
            group.running, group.entering, group.hidden = [], [], decoder.head[:0]
            self.groups |= dict.fromkeys(names, group)
        self.each = list({id(group): group for group in self.groups.values()}.values())
        self.queue, self.door, self.closed, self.alive = deque(), threading.Condition(), False, True
        self.counts = dict.fromkeys(("prompt_tokens", "tokens", "steps", "finished", "cancelled", "failed"), 0)
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.thread.start()

    def submit(self, requests):
        """Take all of these requests or none. Busy if they do not fit into the queue, RuntimeError if nothing runs."""
        for one in requests:
            if len(one.ids) + one.max_tokens > self.slots:
                raise ValueError(f"{len(one.ids)} + {one.max_tokens} tokens, more than {self.slots}")
        with self.door:
            if not self.alive or self.closed:
                raise RuntimeError("the engine has stopped")
            self.check_room(len(requests))
            self.queue.extend(requests)
            self.door.notify()

    def check_room(self, count):
        """Busy if `count` requests more would not be taken now."""
        rows, flying = sum(group.rows for group in self.each), self.in_flight()
        if sum(flying) + count > self.limit + rows:
            raise Busy(1 + flying[1] // rows)

    def cancel(self, requests):
        """Stop these at the next token; nothing is emitted for them any more."""
        with self.door:
            for one in requests:
                one.cancelled = True
            self.door.notify()

    def in_flight(self):
        """(requests that decode, requests that wait)"""
        return sum(len(group.running) + len(group.entering) for group in self.each), len(self.queue)

    def close(self, seconds=5.0):
        """End the thread behind the step at hand; what is in flight gets no further token."""
        with self.door:
            self.closed = True
            self.door.notify()
        self.thread.join(seconds)

    def _work(self):
        torch.set_num_threads(torch.get_num_threads())  # as above
        try:
            while True:
                with self.door:
                    while not (self.closed or self.queue or any(group.running for group in self.each)):
                        self.door.wait()
                    if self.closed:
                        return
                    for group in self.each:
                        group.entering = self._next(group)
                for group in self.each:
                    if group.running or group.entering:
                        self._turn(group)
        finally:
            with self.door:
                self.alive = False
                left = [*self.queue, *(one for group in self.each for one in [*group.running, *group.entering])]
                self.queue, self.each = deque(), []
            for one in left:
                _emit(one, None, RuntimeError("the engine has stopped"))

    def _next(self, group):
        """Take out of the queue what may enter this group now, in the order of arrival."""
        free, tokens, entering, others = group.rows - len(group.running), 0, [], deque()
        for one in self.queue:
            mine = self.groups[one.model] is group
            if one.cancelled:
                self.counts["cancelled"] += 1
            elif mine and len(entering) < free and (not entering or tokens + len(one.ids) <= PREFILL):
                entering.append(one)
                tokens += len(one.ids)
            else:
                others.append(one)
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
            group.decoder.select([])
            group.running, group.entering, group.hidden = [], [], group.decoder.head[:0]
            for one in members:
                self.counts["failed"] += not one.done
                _emit(one, None, error)
            if group.failures == PATIENCE:
                raise

    def _advance(self, group, decoder):
        if group.entering:
            for one in group.entering:
                one.uniforms = rollouts.uniforms(one.seed, 0, [0], one.max_tokens)[0]
                self.counts["prompt_tokens"] += len(one.ids)
            fresh = [decoder.admit([one.ids], [1], [self.adapters[one.model]]) for one in group.entering]
            group.hidden = torch.cat([group.hidden, *fresh])
            with self.door:
                group.running, group.entering = [*group.running, *group.entering], []
        tokens = _draw(decoder.scores(group.hidden), group.running)
        alive = []
        self.counts["tokens"] += len(tokens)
        self.counts["steps"] += 1
        for row, (one, token) in enumerate(zip(group.running, tokens.tolist())):
            one.tokens.append(token)
            finish = "stop" if token in one.stop else "length" if len(one.tokens) == one.max_tokens else None
            if one.cancelled or finish:
                self.counts["cancelled" if one.cancelled else "finished"] += 1
            else:
                alive.append(row)
            _emit(one, token, finish)
        order = decoder.select(alive)
        group.running = [group.running[row] for row in order]
        group.hidden = decoder.step(tokens[order]) if order else group.hidden[:0]


def _by_base(models):
    """{id of a model: (model, names that run on it)}"""
    found = {}
    for name, (net, _) in models.items():
        found.setdefault(id(net), (net, []))[1].append(name)
    return found


def _emit(one, token, finish):
    """Hand a token or the end over; nothing behind the end, and nothing to those who have left."""
    if not one.done and not one.cancelled:
        one.done = finish is not None
        with contextlib.suppress(RuntimeError):  # the server's loop has been closed
            one.emit(token, finish)


def _draw(logits, requests):
    """One token a row (rows,), each by its request's own settings and next random number."""
    kinds = [(one.temperature, one.top_p) for one in requests]
    uniforms = torch.stack([one.uniforms[len(one.tokens)] for one in requests]).to(logits.device)
    tokens = torch.empty(len(requests), dtype=torch.long, device=logits.device)
    for kind in dict.fromkeys(kinds):
        temperature, top_p = kind
        rows = torch.tensor([i for i, other in enumerate(kinds) if other == kind], device=logits.device)
        some = logits if len(rows) == len(kinds) else logits[rows]
        how = {"temperature": temperature, "top_p": top_p} if temperature else {"greedy": True}
        tokens[rows], _ = rollouts.draw(some, uniforms[rows], **how)
    return tokens
