"""Work in a process of its own, for libraries that may crash, print or import too much."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from semantica.errors import ArtifactError


def run_worker(module: str, request: dict[str, Any], place: Path, who: str, what: str) -> dict[str, Any]:
    """Run a module on a request, both JSON; it leaves its result beside the request, under the suffix .result.

    who, what: the library, and what it works on, for messages.

    Raises:
        ArtifactError: in one line, where it crashes or refuses.
    """
    place.write_text(json.dumps(request))
    answer = place.with_suffix(".result")
    # -P: nothing from the folder that the user stands in is imported
    command = [sys.executable, "-P", "-m", module, str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode < 0:
            fault = signal.Signals(-done.returncode).name
            raise ArtifactError(f"{who} crashed on {what} ({fault}); nothing is kept")
        if done.returncode or not answer.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            raise ArtifactError(f"{who} failed on {what}: {last}; nothing is kept")
        made = json.loads(answer.read_text())
    finally:
        place.unlink(missing_ok=True)
    answer.unlink()
    if "error" in made:
        logged = " ".join(done.stdout.split() + done.stderr.split())[:300]
        raise ArtifactError(f"{who} cannot build {what}: {made['error']} {logged}; nothing is kept")
    return made
