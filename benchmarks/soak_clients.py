"""The long forms of the rows that a server's clients cause, and all that has to be quick; for benchmarks/soak.py."""

import os
import random
import signal
import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from tests import servers as web


def rows(trials=50):
    """[(id, what, function(folder, trials, base) -> (trials that held, remark), trials)]"""
    few = max(1, trials // 5)
    return [
        ("H1", "the worker dies: /health says so within 1 s", deaths, few),
        ("H1", "/health while four generate: 99 of 100 within 0.25 s", busy, few),
        ("H2", "200 dripping connections, 10 s for a request", drips, 1),
        ("H7", "64 requests at once on a queue of 8", crowds, few),
        ("H7", "beyond a full queue: refused within 0.1 s", late, few),
        ("H8", "20 clients leave at random moments", leavers, few),
        ("H9", "SIGTERM: idle within 2 s, a second one while it answers within 1 s", stops, few),
        ("H12", "requests of random seeds: texts as alone, no leak", repeats, 10 * trials),
    ]


def tried(one, folder, trials, tiny):
    """(trials that held, remark) of one row; what it asserts and does not hold is a row that failed."""
    try:
        return one(folder, trials, tiny)
    except AssertionError as error:
        return 0, " ".join(str(error).split())[:200]


def deaths(folder, trials, tiny):
    passed, longest = 0, 0.0
    for number in range(trials):
        sign, change = folder / f"kill-{number}", web.dying(folder / f"kill-{number}")
        with web.serving(folder, "--checkpoint", tiny, change=change) as one, ThreadPoolExecutor(4) as pool:
            held = [pool.submit(web.generate, one, max_tokens=2000, temperature=1.5, top_p=1) for _ in range(4)]
            web.wait_for(lambda: web.number(one, "requests_running") > 0)
            sign.touch()
            began = time.monotonic()
            web.wait_for(lambda: web.ask(one, "GET", "/health").json == {"status": "failed"})
            longest = max(longest, time.monotonic() - began)
            passed += time.monotonic() - began < 1 and {reply.result().status for reply in held} <= {200, 503}
    return passed, f"known after at most {longest:.2f} s"


def busy(folder, trials, tiny):
    passed, slowest = 0, 0.0
    for _ in range(trials):
        with (
            web.serving(folder, "--checkpoint", tiny, *web.LONG, change=web.endless(0)) as one,
            ThreadPoolExecutor(4) as pool,
        ):
            for _ in range(4):
                pool.submit(web.generate, one, max_tokens=10_000)
            web.wait_for(lambda: web.number(one, "requests_running") == 4)
            seconds = []
            while len(seconds) < 200:
                seconds.append(web.ask(one, "GET", "/health").seconds)
                time.sleep(0.01)
            end_now(one)
        slowest = max(slowest, statistics.quantiles(seconds, n=100)[98])
        passed += statistics.quantiles(seconds, n=100)[98] <= 0.25
    return passed, f"99 of 100 within {slowest:.3f} s"


def end_now(one):
    """Two signals: what is in flight is of no interest. Returns the seconds from the second to the exit."""
    os.kill(one.pid, signal.SIGTERM)
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(one.pid, signal.SIGTERM)
    one.killed, one.status = True, web.stopped(one)
    return time.monotonic() - began


def late(folder, trials, tiny):
    passed, slowest, change = 0, 0.0, web.endless(0.01)
    with (
        web.serving(folder, "--checkpoint", tiny, *web.SMALL_QUEUE, change=change) as one,
        ThreadPoolExecutor(12) as pool,
    ):
        for _ in range(trials):
            held = [pool.submit(web.generate, one, max_tokens=120) for _ in range(12)]
            web.wait_for(lambda: web.number(one, "requests_waiting") == 8)
            found = [web.generate(one) for _ in range(11)]
            median = statistics.median(reply.seconds for reply in found)
            slowest = max(slowest, median)
            passed += {reply.status for reply in found} == {429} and median < 0.1
            passed -= {reply.result().status for reply in held} != {200}
    return passed, f"refused in {slowest:.3f} s, the median of 11"


def stops(folder, trials, tiny):
    passed, idle, again = 0, 0.0, 0.0
    for _ in range(trials):
        with web.serving(folder, "--checkpoint", tiny) as one:
            web.generate(one, max_tokens=3)
            with socket.create_connection(("127.0.0.1", one.port)):  # says nothing
                began = time.monotonic()
                os.kill(one.pid, signal.SIGTERM)
                one.status = web.stopped(one)
                seconds = time.monotonic() - began
        with (
            web.serving(folder, "--checkpoint", tiny, *web.LONG, change=web.endless(0.01)) as two,
            ThreadPoolExecutor(1) as pool,
        ):
            pool.submit(web.generate, two, max_tokens=10_000)
            web.wait_for(lambda: web.number(two, "requests_running") == 1)
            second = end_now(two)
        idle, again = max(idle, seconds), max(again, second)
        passed += one.status == 0 and seconds < 2 and two.status == 128 + signal.SIGTERM and second < 1
    return passed, f"idle {idle:.2f} s at most, the second signal {again:.2f} s"


def drips(folder, trials, tiny):
    web.READ_SECONDS = 10
    with web.serving(folder, "--checkpoint", tiny) as one:
        web.generate(one, max_tokens=4)
        before = web.process(one.pid)
        closed, slowest = web.drip(one, 200, 0.5)
        after = web.process(one.pid)
    held = len(closed) == 200 and max(closed) <= 10.5 and slowest <= 2  # 0.5: how often we look
    held = held and after[0] - before[0] < 50e6 and after[1] <= before[1] + 1
    return int(held), (
        f"closed after at most {max(closed):.1f} s, others answered in {slowest:.2f} s, "
        f"{(after[0] - before[0]) / 1e6:+.1f} MB, {after[1] - before[1]:+d} threads"
    )


def crowds(folder, trials, tiny):
    passed, refused, change = 0, 0, web.endless(0.005)
    with (
        web.serving(folder, "--checkpoint", tiny, *web.SMALL_QUEUE, change=change) as one,
        ThreadPoolExecutor(64) as pool,
    ):
        for _ in range(trials):
            before = web.number(one, "engine_finished_total")
            found = list(pool.map(lambda i: web.generate(one, max_tokens=30, seed=i), range(64)))
            good = sum(reply.status == 200 for reply in found)
            late = [reply for reply in found if reply.status == 429 and int(reply.headers["Retry-After"]) >= 1]
            refused += len(late)
            passed += (
                good >= 12 and good + len(late) == 64 and web.number(one, "engine_finished_total") == before + good
            )
    return passed, f"{refused} of {64 * trials} refused with Retry-After, all others answered"


def leavers(folder, trials, tiny):
    passed, longest, dice = 0, 0.0, random.Random(0)
    with web.serving(folder, "--checkpoint", tiny, *web.LONG, change=web.endless(0.002)) as one:
        idle = max(web.generate(one, max_tokens=10).seconds for _ in range(3))
        for _ in range(trials):
            lines = [socket.create_connection(("127.0.0.1", one.port)) for _ in range(20)]
            for i, line in enumerate(lines):
                body = web.json.dumps({"messages": web.USER, "max_tokens": 10_000, "stream": bool(i % 2)}).encode()
                start = "POST /v1/chat/completions HTTP/1.1"
                line.sendall(web.framed(f"Content-Length: {len(body)}", body=body, start=start))
            web.wait_for(lambda: web.number(one, "requests_running") == 16)
            time.sleep(dice.uniform(0, 0.5))
            for line in lines:
                line.close()
            began = time.monotonic()
            web.wait_for(lambda: web.number(one, "requests_running") == web.number(one, "requests_waiting") == 0)
            longest = max(longest, time.monotonic() - began)
            passed += time.monotonic() - began < 1.5 and web.generate(one, max_tokens=10).seconds < idle + 1
    return passed, f"idle again after at most {longest:.2f} s"


def repeats(folder, trials, tiny):
    dice = random.Random(0)
    kinds = [
        {"seed": dice.randrange(2**40), "temperature": dice.choice([0, 0.7, 1.0]), "max_tokens": 16} for _ in range(10)
    ]
    with web.serving(folder, "--checkpoint", tiny) as one, ThreadPoolExecutor(8) as pool:
        right = [web.generate(one, **kind).json["generated_text"] for kind in kinds]
        list(pool.map(lambda i: web.generate(one, **kinds[i % 10]), range(60)))
        before = web.process(one.pid)
        found = list(pool.map(lambda i: web.generate(one, **kinds[i % 10]).json["generated_text"], range(trials)))
        web.wait_for(lambda: web.number(one, "connections") == 1)
        after = web.process(one.pid)
    passed = sum(text == right[i % 10] for i, text in enumerate(found))
    drift, threads, files = after[0] / before[0] - 1, after[1] - before[1], after[2] - before[2]
    assert abs(drift) < 0.05 and threads <= 1 and files <= 2, (drift, threads, files)
    return passed, f"{drift:+.1%} memory, {threads:+d} threads, {files:+d} files"
