"""`python -m tests.fuzz`: rounds of the harnesses, and what came of them."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: rounds run beside each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.fuzz import damage, disks, kills, lines
from tests.fuzz.rounds import FAULT, Harness, faults, run_rounds, table
from tests.fuzz.world import prepared

HARNESSES: dict[str, Harness] = {each.HARNESS.name: each.HARNESS for each in (lines, kills, damage, disks)}


def main() -> int:
    """Run what was asked for; 1 if there was a fault."""
    about = "; ".join(f"{each.name}: {each.about}" for each in HARNESSES.values())
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=f"Fuzzing. {about}.")
    parser.add_argument("harness", choices=[*HARNESSES, "all"], help="what to run")
    parser.add_argument("--seed", type=int, default=0, help="of all rounds")
    parser.add_argument("--rounds", type=int, help="how many; by default those of a full run")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the rounds to do, in place of all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="rounds at once")
    parser.add_argument("--world", type=Path, help="folder to keep the inputs in for another run; by default none")
    asked = parser.parse_args()
    chosen = list(HARNESSES.values()) if asked.harness == "all" else [HARNESSES[asked.harness]]
    failed = False
    with tempfile.TemporaryDirectory(prefix="glp-lens-fuzz-") as temporary:
        print("making the inputs: a minute", flush=True)
        with prepared((asked.world or Path(temporary)).absolute()) as world:
            for harness in chosen:
                numbers = asked.only or range(asked.rounds or harness.rounds)
                outcomes = run_rounds(harness, world, numbers, seed=asked.seed, jobs=asked.jobs, progress=10)
                print(f"\n{harness.about}, {len(outcomes)} rounds, seed {asked.seed}\n\n{table(outcomes)}\n")
                for outcome in outcomes if asked.only else ():
                    print(f"{outcome.kind}: {outcome.what}\n  {outcome.said}")
                print(faults(harness, outcomes, asked.seed), flush=True)
                failed |= any(outcome.kind == FAULT for outcome in outcomes)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
