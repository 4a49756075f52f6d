"""A spare process: Ray starts one when asked, keeps it, and gives it to an actor that it restarts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from cluster.ray_env import PRELOAD, QUIET, ROOT


def test_a_restarted_actor_takes_the_process_that_was_ready() -> None:
    """The request of Ray's raylets that this uses is private to Ray: a later version may know another."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.actors.spare_probe"],
        cwd=ROOT,
        env=os.environ | QUIET | PRELOAD,  # no processes that Ray starts ahead by itself
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "first": True,  # there was none
        "there": False,  # one is enough
        "taken": True,
        "again": True,  # it is taken, so another one is started
        "unknown": False,
        "had": [False, True],  # our modules: the first process, which had an actor at once, and the spare one
    }
