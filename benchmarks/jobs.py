"""Four nets two at a time beside the same four one after the other: whole sweeps, start-up and compiling included.

Plain and residual, depths 20 and 56, paper width and batch, on 5,000 images of genuine CIFAR-10 (DEGRADE_DATA), in
the order A B B A. Wall time and the largest process's peak of resident memory. Further arguments go to `degrade sweep`.
"""

import statistics
import subprocess
import sys
import tempfile
import time

JOBS = ("1", "2")


def sweep(jobs: str) -> tuple[float, float]:
    """Seconds, and GiB of the largest process."""
    with tempfile.TemporaryDirectory() as folder:
        grid = ["--depths", "20,56", "--steps", "156", "--train-images", "5000", "--test-images", "1000"]
        command = [sys.executable, "-m", "degrade", "sweep", *grid, "--jobs", jobs, "--out", folder, *sys.argv[1:]]
        measured = f"import resource, subprocess; subprocess.run({command!r}, check=True, stdout=subprocess.DEVNULL)\n"
        measured += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)"
        start = time.perf_counter()
        peak = subprocess.run([sys.executable, "-c", measured], check=True, capture_output=True, text=True).stdout
        return time.perf_counter() - start, float(peak)


def main() -> None:
    taken: dict[str, list[tuple[float, float]]] = {jobs: [] for jobs in JOBS}
    for jobs in (*JOBS, *reversed(JOBS)):
        taken[jobs].append(sweep(jobs))
    for jobs, found in taken.items():
        seconds, peaks = zip(*found, strict=True)
        shown = " and ".join(f"{s:.0f}" for s in seconds)
        print(f"--jobs {jobs}: {statistics.mean(seconds):.0f} s ({shown}), peak {max(peaks):.1f} GiB")
    one, two = (statistics.mean(seconds for seconds, _ in taken[jobs]) for jobs in JOBS)
    print(f"side by side is {one / two:.2f}x as fast")


if __name__ == "__main__":
    main()
