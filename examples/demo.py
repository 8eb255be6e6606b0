"""What `make demo` runs: the bundled model writes and edits code, drafts in colour, with and without speculation."""

from __future__ import annotations

import resource
import shlex
import subprocess
import sys

from outrider.draft.base import BUNDLED_MODEL
from outrider.draft.registry import default_method

EDIT = """Add a docstring to this function.

```python
def moving_average(values, width):
    total = 0.0
    averages = []
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        if index >= width - 1:
            averages.append(total / width)
    return averages
```"""

COMMANDS = [
    ["explain", "--draft", default_method(BUNDLED_MODEL)],
    ["generate", "--prompt", "def read_json(path):", "--max-tokens", "200", "--compare"],
    ["generate", "--chat", EDIT, "--max-tokens", "200", "--compare"],
]


def main() -> None:
    """Runs each command as a user would type it."""
    for command in COMMANDS:
        print(f"\n\033[1m$ outrider {shlex.join(command)}\033[0m\n", flush=True)
        finished = subprocess.run([sys.executable, "-m", "outrider", *command], check=False)
        if finished.returncode:
            sys.exit(finished.returncode)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"\npeak memory of the largest of these processes: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
