"""Clients of others, unchanged: `pip install tritonclient[all]`; they are skipped where they are not installed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import Server, Slow, serving

from dougong.serve.models import Wanted
from dougong.serve.workers import ThreadWorkers


@pytest.fixture(scope="module")
def server(hollow_bundle: Path) -> Iterator[Server]:
    def workers(wanted: Wanted) -> ThreadWorkers:
        return ThreadWorkers(lambda: Slow(name=f"version {wanted.version}"))

    batching = {"slo_seconds": 1.0, "refuse_late": False}
    with serving([Wanted("colours", "1", hollow_bundle)], workers=workers, batching=batching, grpc_port=0) as found:
        yield found


@pytest.mark.filterwarnings("ignore")  # of what the client imports
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritons_clients_are_answered(server: Server, protocol: str) -> None:
    triton = pytest.importorskip(f"tritonclient.{protocol}", exc_type=ImportError)
    port = server.port if protocol == "http" else server.running.grpc_port
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("colours")
        assert client.is_model_ready("colours", "1")
        server_about, about = client.get_server_metadata(), client.get_model_metadata("colours")
        assert (server_about["name"] if protocol == "http" else server_about.name) == "dougong"
        assert (about["name"] if protocol == "http" else about.name) == "colours"

        remark = triton.InferInput("remark", [2], "BYTES")
        remark.set_data_from_numpy(np.array([b"a", b"b"], dtype=object))
        weight = triton.InferInput("weight", [2], "FP64")
        weight.set_data_from_numpy(np.array([1.0, 2.0]))
        found = client.infer("colours", [remark, weight], request_id="7")
        assert found.as_numpy("answer").tolist() == [b"version 1"] * 2
        asked = [triton.InferRequestedOutput("answer")]
        found = client.infer("colours", [remark], model_version="1", outputs=asked)
        assert found.as_numpy("answer").tolist() == [b"version 1"] * 2

        strange = triton.InferInput("smell", [1], "BYTES")
        strange.set_data_from_numpy(np.array([b"a"], dtype=object))
        with pytest.raises(Exception, match="no input is called 'smell'"):
            client.infer("colours", [strange])
        with pytest.raises(Exception, match="no model is called 'none'"):
            client.infer("none", [remark])
        if protocol == "http":
            plain = triton.InferInput("remark", [1], "BYTES")
            plain.set_data_from_numpy(np.array(["a"], dtype=object), binary_data=False)
            asked = [triton.InferRequestedOutput("answer", binary_data=False)]
            assert client.infer("colours", [plain], outputs=asked).as_numpy("answer").tolist() == ["version 1"]
            assert [each["name"] for each in client.get_model_repository_index()] == ["colours"]
    finally:
        client.close()
