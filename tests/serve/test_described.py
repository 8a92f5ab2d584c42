"""The description of the interface, tried out by a program that reads it; skipped where schemathesis is missing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import Slow, serving

from dougong.serve.models import Wanted
from dougong.serve.workers import ThreadWorkers

SCHEMATHESIS = os.environ.get("SCHEMATHESIS") or shutil.which("schemathesis")


@pytest.mark.slow
@pytest.mark.skipif(SCHEMATHESIS is None, reason="needs schemathesis, which SCHEMATHESIS may name")
def test_whatever_is_asked_by_the_description_is_no_failure_of_the_servers(hollow_bundle: Path, tmp_path: Path) -> None:
    assert SCHEMATHESIS is not None
    batching = {"slo_seconds": 2.0, "refuse_late": False}
    wanted = [Wanted("colours", "1", hollow_bundle)]
    with serving(wanted, workers=lambda _: ThreadWorkers(lambda: Slow(seconds=0.0)), batching=batching) as server:
        command = [SCHEMATHESIS, "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error"]
        command += ["--max-examples", "40", "--seed", "1", "--workers", "1"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=500)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert server.ask("POST", "/v1/predict", {"remark": "still here"})[0] == 200
        page = server.ask("GET", "/metrics")[1].decode()
        assert 'dougong_requests_total{route="/v1/predict",status="200"}' in page  # it was really asked
        assert 'route="/v2/models/infer"' in page
