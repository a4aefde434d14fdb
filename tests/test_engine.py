"""Continuous batching against the sampler alone: same seed, same text, whoever else is served, on whatever adapter."""

import threading

import pytest
import torch

from common import chat, lora, model, rollouts
from common.decoder import Decoder
from common.serving import engine
from tests import inputs
from tests.test_gemma import random_gemma

pytestmark = pytest.mark.usefixtures("one_thread")

WAIT = 60
ASKED = {"max_tokens": 128, "temperature": 0.7, "top_p": 0.9, "seed": 0}


@pytest.fixture(scope="module")
def net(tiny_folder):
    found, _ = model.load("tiny", torch.device("cpu"), torch.float32)
    for seed, name in enumerate(("x", "y")):
        inputs.random_adapter(found, name, seed)
    lora.use(found, None)
    return found


@pytest.fixture
def start(net):
    """A function that starts an engine over the base and two adapters of it; all are closed in the end."""
    engines = []

    def make(rows=4, slots=256, waiting=32):
        models = {"base": (net, None), "x": (net, "x"), "y": (net, "y")}
        engines.append(engine.Engine(models, rows, slots, waiting))
        return engines[-1]

    yield make
    for one in engines:
        one.close()


class Inbox:
    """What an engine emits for one request."""

    def __init__(self):
        self.events, self.first, self.end = [], threading.Event(), threading.Event()

    def __call__(self, request, token, finish):
        self.events.append((token, finish))
        self.first.set()
        if finish is not None:
            self.end.set()

    def tokens(self):
        assert self.end.wait(WAIT), "no end"
        assert all(finish is None for _, finish in self.events[:-1]), self.events
        return [token for token, _ in self.events]


def ask(machine, jobs):
    """Submit [(ids, model, settings)] at once -> their inboxes."""
    boxes = [Inbox() for _ in jobs]
    asked = [{"model": name, **ASKED, **more} for _, name, more in jobs]
    machine.submit([engine.Request(job[0], **a, emit=box) for job, a, box in zip(jobs, asked, boxes, strict=True)])
    return boxes


def jobs_of(tokenizer, count, max_tokens=24):
    """Requests of all kinds: three adapters, greedy, the whole distribution, and cut ones."""
    words = ("How do I bake bread?", "hi", "Tell me how to steal a car", "What is a good way to learn to swim? " * 3)
    prompts = [chat.encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in words]
    kinds = [{"temperature": 0}, {"temperature": 1.0, "top_p": 1.0}, {"temperature": 0.7, "top_p": 0.9}]
    names = ("base", "x", "y")
    return [
        (prompts[i % 4], names[i % 3], {**kinds[i // 3 % 3], "seed": i, "max_tokens": max_tokens - i % 5})
        for i in range(count)
    ]


def alone(net, ids, name, max_tokens, seed, temperature=0.7, top_p=0.9):
    """The completion that the sampler of training and evaluation makes of one request."""
    uniforms = rollouts.uniforms(seed, 0, [0], max_tokens)
    how = {"greedy": True} if temperature == 0 else {"temperature": temperature, "top_p": top_p}
    with lora.using(net, None if name == "base" else name):
        return rollouts.sample(net, [ids], 1, max_tokens, uniforms=uniforms, **how)["completions"][0]


def test_a_request_gets_the_sampler_s_text_among_others(net, tokenizer, start):
    """27 requests over 4 rows, three adapters mixed in each step, against the sampler with its merged weights."""
    jobs, machine = jobs_of(tokenizer, 27), start()
    boxes = ask(machine, jobs)
    for box, (ids, name, more) in zip(boxes, jobs):
        assert box.tokens() == alone(net, ids, name, **more)
        last, finish = box.events[-1]
        assert finish == ("stop" if last in chat.STOP_TOKENS else "length")
    counts = machine.counts
    assert counts["finished"] == 27 and counts["tokens"] == sum(len(box.events) for box in boxes)
    assert counts["steps"] < counts["tokens"] / 2, "they did not share their steps"
    assert counts["prompt_tokens"] == sum(len(ids) for ids, *_ in jobs) and machine.in_flight() == (0, 0)


def test_same_seed_same_text_alone_and_under_load(tokenizer, start):
    machine, jobs = start(), jobs_of(tokenizer, 9)
    first = [ask(machine, [job])[0].tokens() for job in jobs]
    crowd = ask(machine, jobs * 3)
    assert [box.tokens() for box in crowd] == first * 3
    sampled = {tuple(ask(machine, [(*jobs[3][:2], jobs[3][2] | {"seed": s})])[0].tokens()) for s in range(5)}
    assert len(sampled) > 1, "the seed changes nothing"


def test_a_longer_limit_continues_the_same_text(tokenizer, start):
    machine, (ids, name, more) = start(), jobs_of(tokenizer, 6)[5]
    short, long = (ask(machine, [(ids, name, more | {"max_tokens": n})])[0].tokens() for n in (5, 30))
    assert long[:5] == short


def test_rows_of_several_adapters_equal_one_decoder_each():
    """Ragged rows across the window; steps, admissions and departures in between; a row of the base stays one."""
    net = random_gemma()
    for seed, name in enumerate(("x", "y")):
        inputs.random_adapter(net, name, seed)
    lora.use(net, None)
    shared = Decoder(net, 6, 64, merge=False, adapters=["x", "y"])
    names, draw = ["x", None, "y", "x"], torch.Generator().manual_seed(0)
    prompts = [torch.randint(300, (n,), generator=draw).tolist() for n in (5, 30, 17, 9)]
    single = []
    for name, prompt in zip(names, prompts):
        with lora.using(net, name):
            single.append(Decoder(net, 1, 64, merge=False))
        single[-1].prefill([prompt], [1])
    hidden = shared.prefill(prompts[:3], [1] * 3, names[:3])
    for step in range(12):
        if step == 4:
            shared.prefill(prompts[3:], [1], names[3:])
        if step == 8:
            assert shared.keep([0, 2, 3]) == [0, 3, 2] and shared.names == ["x", "x", "y"]
            single = [single[0], single[3], single[2]]
        running = single[: len(shared.lengths)]
        fresh = torch.randint(300, (len(running),), generator=draw)
        hidden = shared.step(fresh)
        right = torch.cat([one.step(token[None]) for one, token in zip(running, fresh)])
        assert (hidden - right).abs().max() < 2e-5 * right.abs().max(), step


def test_batches_are_taken_whole_or_not_at_all(tokenizer, start, monkeypatch):
    machine, (ids, name, more) = start(rows=2, waiting=3), jobs_of(tokenizer, 2)[1]
    gate = threading.Event()
    real = engine._draw
    monkeypatch.setattr(engine, "_draw", lambda *both: (gate.wait(WAIT), real(*both))[1])
    job = (ids, name, more)
    boxes = ask(machine, [job] * 2)  # both rows
    while machine.in_flight() != (2, 0):
        assert machine.alive
    boxes += ask(machine, [job] * 2)
    with pytest.raises(engine.Refused, match="too many requests wait"):
        ask(machine, [job] * 2)
    assert machine.in_flight() == (2, 2), "a part was taken"
    boxes += ask(machine, [job])
    with pytest.raises(engine.Refused, match="too many requests wait"):
        ask(machine, [job])
    with pytest.raises(ValueError, match=r"200 \+ 100 tokens, more than 256"):
        ask(machine, [([5] * 200, "base", {"max_tokens": 100})])
    gate.set()
    texts = [box.tokens() for box in boxes]
    assert texts == texts[:1] * 5


def test_cancelled_requests_leave_at_once(net, tokenizer, start):
    machine, (ids, name, more) = start(rows=2), jobs_of(tokenizer, 3)[1]
    boxes = [Inbox() for _ in range(4)]
    made = [engine.Request(ids, name, 230, 1.0, 1.0, 1, stop=(), emit=box) for box in boxes]
    machine.submit(made)
    boxes[0].first.wait(WAIT)
    machine.cancel([made[0], made[3]])  # one that runs and one that waits
    neighbour = ask(machine, [(ids, name, more)])[0]
    assert neighbour.tokens() == alone(net, ids, name, **more)
    assert len(boxes[1].tokens()) == len(boxes[2].tokens()) == 230
    assert len(boxes[0].events) < 230 and not boxes[0].end.is_set() and not boxes[3].events
    assert machine.in_flight() == (0, 0)
    assert machine.counts["cancelled"] == 2 and machine.counts["finished"] == 3


def test_a_failed_step_ends_its_requests_and_no_others(net, tokenizer, start, monkeypatch):
    machine, (ids, name, more) = start(rows=2), jobs_of(tokenizer, 3)[1]
    real, left = engine._draw, [1]

    def fail_once(logits, requests):
        if left:
            left.pop()
            raise FloatingPointError("logits are not finite")
        return real(logits, requests)

    monkeypatch.setattr(engine, "_draw", fail_once)
    boxes = ask(machine, [(ids, name, more)] * 3)
    assert boxes[0].end.wait(WAIT) and isinstance(boxes[0].events[-1][1], FloatingPointError)
    assert boxes[2].tokens() == alone(net, ids, name, **more) and machine.alive
    assert machine.counts["failed"] == 2 and machine.counts["finished"] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_only_fails_gives_up_and_says_so(tokenizer, start, monkeypatch):
    machine, job = start(rows=1), jobs_of(tokenizer, 3)[1]
    monkeypatch.setattr(engine, "_draw", lambda *both: 1 / 0)
    boxes = ask(machine, [job] * 5)
    assert all(box.end.wait(WAIT) for box in boxes)
    ends = [type(box.events[-1][1]) for box in boxes]
    assert ends == [ZeroDivisionError] * engine.PATIENCE + [engine.Stopped] * 2
    machine.thread.join(WAIT)
    assert not machine.alive and machine.in_flight() == (0, 0)
    with pytest.raises(engine.Stopped, match="stopped"):
        ask(machine, [job])


def test_one_that_waits_is_not_overtaken(tokenizer, start, monkeypatch):
    """A long prompt enters before the shorter ones behind it, although these would fit beside the first."""
    machine = start(rows=4, slots=1200)
    order, real = [], Decoder.prefill
    monkeypatch.setattr(
        Decoder,
        "prefill",
        lambda self, prompts, *more: (order.extend(map(len, prompts)), real(self, prompts, *more))[1],
    )
    boxes = ask(machine, [([7] * n, "base", {"max_tokens": 3}) for n in (20, engine.PREFILL + 200, 21, 22)])
    assert all(box.tokens() for box in boxes)
    assert order == [20, engine.PREFILL + 200, 21, 22]


# ---------------------------------------------------------------- text as it comes


@pytest.mark.parametrize(
    "text", ["Plain words, and more.", "naïve café — 東京 🙂🙃 ok", "  two  spaces\n\n\tand tabs ", "🙂"]
)
def test_a_stream_adds_up_to_the_text(tokenizer, text):
    """Characters of several tokens are shown whole; the tiny tokenizer spells what it does not know in bytes."""
    ids = [*chat.encode_text(tokenizer, text), chat.END_OF_TURN]
    push = chat.streamer(tokenizer)
    parts = [push(token, i == len(ids) - 1)[0] for i, token in enumerate(ids)]
    assert "".join(parts) == chat.decode(tokenizer, ids) == text
    assert not any("\ufffd" in part for part in parts)
    assert len(text) < 3 or sum(map(bool, parts)) > 1, "nothing was streamed"


def test_broken_characters_are_shown_in_the_end(tokenizer):
    whole = chat.encode_text(tokenizer, "ab🙂")
    ids = whole[:-1]
    push = chat.streamer(tokenizer)
    parts = [push(token, i == len(ids) - 1)[0] for i, token in enumerate(ids)]
    assert "".join(parts) == chat.decode(tokenizer, ids) and "\ufffd" in parts[-1]


@pytest.mark.parametrize(
    "stops, shown, found",
    [
        (["STOP"], "one ST two S three ", True),
        (["nowhere", "three"], "one ST two S ", True),
        (["four"], None, False),
        (["o", "one"], "", True),
        (["STOP!!"], None, False),
    ],
)
def test_stop_texts_are_never_shown_nor_their_beginnings(tokenizer, stops, shown, found):
    text = "one ST two S three STOP!"
    ids, push, out = chat.encode_text(tokenizer, text), chat.streamer(tokenizer, stops), ""
    for i, token in enumerate(ids):
        part, stopped = push(token, i == len(ids) - 1)
        out += part
        assert text.startswith(out)
        if stopped:
            break
    assert (out, stopped) == (text if shown is None else shown, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_s_bits_do_not_depend_on_its_neighbours(dtype):
    """Alone, and at every place among 20 rows of several lengths and adapters: states and logits, to the last bit."""
    net = random_gemma().to(dtype)
    inputs.random_adapter(net, "x", 0)
    lora.use(net, None)
    prompts = [torch.randint(300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 30, 17)]

    def decoded(which):
        machine, found = Decoder(net, 20, 64, merge=False, adapters=["x"], row_invariant=True), []
        hidden = torch.cat([machine.prefill([prompts[i % 3]], [1], [["x", None][i % 2]]) for i in which])
        for step in range(20):
            found.append(torch.cat([hidden, machine.logits(hidden)], 1))
            hidden = machine.step(torch.tensor([(7 * step + i) % 300 for i in which]))
        return torch.stack(found, 1)

    crowd = decoded([i % 6 for i in range(20)])
    for i in range(6):
        one = decoded([i])
        assert all(torch.equal(one[0], crowd[place]) for place in range(i, 20, 6)), i
