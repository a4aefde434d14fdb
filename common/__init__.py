"""What the scripts share. It is imported before torch: OpenMP reads its settings when torch is loaded."""

import os
import sys
import time

STAT = "/proc/stat"


def choose_spin(arguments: list[str]) -> str:
    """GOMP_SPINCOUNT: how often a thread of OpenMP looks for new work before it sleeps.

    A thread that spins loses its turn to any other program: with one busy neighbour a step of the real 270M takes 3.1
    times as long, and 1.4 times where threads sleep at once, which costs nothing alone. The tiny base of --debug has
    products so short that waking up takes up to a third of its time: it spins, by OpenMP's custom, if nobody is near.
    """
    return "300000" if "--debug" in arguments and not has_neighbour() else "0"


def has_neighbour(seconds: float = 0.1) -> bool:
    """Do other programs use at least half a processor now? True where the system does not tell."""
    try:
        before = processor_times()
        time.sleep(seconds)
        spent = [after - start for after, start in zip(processor_times(), before, strict=True)]
    except (OSError, ValueError):
        return True
    idle = spent[3] + spent[4]
    return (sum(spent) - idle) * (os.cpu_count() or 1) >= 0.5 * sum(spent)


def processor_times() -> list[int]:
    """Ticks of all processors together since the start: user, nice, system, idle, waiting for a disk, and others."""
    with open(STAT) as file:
        return [int(word) for word in file.readline().split()[1:]]


if "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
    os.environ["GOMP_SPINCOUNT"] = choose_spin(sys.argv)
