"""What loads what."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "modules",
    [
        "dougong",
        "dougong.cli.main",
        "dougong.core.bundle, dougong.core.events, dougong.core.figures",
        "dougong.data.loader, dougong.data.check, dougong.data.sources.easy_vqa, dougong.data.sources.digits",
        "dougong.data.join, dougong.data.alignment, dougong.data.duplicates, dougong.data.leak",
        "dougong.watch.progress, dougong.watch.tensorboard, dougong.watch.dashboard, dougong.watch.mlflow_export",
        "dougong.serve.batcher, dougong.serve.rehearsal, dougong.serve.loadtest",
        "dougong.serve.app, dougong.serve.server, dougong.serve.workers, dougong.serve.grpc_server",
    ],
)
def test_no_tensor_library_is_loaded(modules: str) -> None:
    heavy = "{'torch', 'transformers', 'tensorflow', 'keras'}"
    code = f"import sys, {modules}; found = {heavy} & set(sys.modules); sys.exit(f'loaded {{found}}' if found else 0)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
