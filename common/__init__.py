"""What the scripts share. Imported before torch, since OpenMP reads this setting when torch loads it."""

import os

# OpenMP's threads sleep while they wait for each other and do not spin. A spinning one loses its turn to any other
# program: with one busy neighbour a step of the real 270M takes 1.4 times as long by this, 3.1 times without it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
