"""`make torture`: everything that was ever found to break xdino, again and with other seeds.

    python tests/torture [--seed N] [--scale SHARE] [KIND ...]

Prints one line a kind with its counts; exit code 1 if anything is counted that must not be. At scale
1 it takes about two hours on two cores; `--scale 0.1` about ten minutes.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable

# kind: (module, function, count at scale 1)
KINDS = {
    "kills": ("runs", "kills", 50),
    "signals": ("runs", "signals", 20),
    "moves": ("runs", "moves", 10),
    "pairs": ("runs", "pairs", 10),
    "flips": ("runs", "flips", 50),
    "disks": ("runs", "disks", 30),
    "configurations": ("configurations", "run", 1_000),
    "command-lines": ("command_lines", "run", 1_000),
    "images": ("images", "run", 10_000),
    "archives": ("archives", "run", 1_000),
    "weights": ("weights", "run", 400),
    "run-files": ("run_files", "run", 400),
}
# What must be zero wherever it is counted.
NEVER = (
    "tracebacks", "hangs", "code ran", "rows doubled", "rows lost", "runs of other bytes",
    "runs of other losses",
    "steps lost beyond the last checkpoint", "slow", "memory", "too large",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full counts")
    told = parser.parse_args()
    unknown = set(told.kinds) - set(KINDS)
    if unknown:
        parser.error(f"no kind is called {', '.join(sorted(unknown))}: {', '.join(KINDS)}")
    failed = False
    for kind in told.kinds or KINDS:
        module, name, full = KINDS[kind]
        run: Callable[[int, int], dict[str, int]] = getattr(importlib.import_module(module), name)
        began = time.monotonic()
        found = dict(run(told.seed, max(2, round(full * told.scale))))
        bad = {name: found[name] for name in NEVER if found.get(name)}
        failed |= bool(bad)
        verdict = "FAILED" if bad else "ok"
        print(f"{kind}: {verdict} {json.dumps(found)} {time.monotonic() - began:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
