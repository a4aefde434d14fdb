"""Libraries with known holes are refused before a model is opened (SECURITY.md)."""

import torch
from torch.torch_version import TorchVersion

from common.log import UserError

# below these, a file that is merely read can run code or corrupt memory
OLDEST = {"torch": ("2.10", "CVE-2025-32434, CVE-2026-24747"), "transformers": ("5.3", "CVE-2026-4372, CVE-2026-1839")}


def check() -> None:
    """UserError for a torch or transformers with known holes; every way to a model passes here before it opens one."""
    import transformers

    for library in (torch, transformers):
        oldest, holes = OLDEST[library.__name__]
        if TorchVersion(library.__version__) < oldest:  # orders the versions of any library, pre-releases too
            raise UserError(
                f"{library.__name__} {library.__version__} is refused, {oldest} is the oldest allowed: a checkpoint "
                f"could run code or corrupt memory ({holes}; SECURITY.md); run pip install -r requirements.txt"
            )
