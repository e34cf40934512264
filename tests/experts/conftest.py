"""Pools over small expert files, with a disk that can be made to fail."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from support.pool_cases import LAYERS, Disk
from support.tiny_experts import random_experts, write_expert_file

from mlx_mimo.checkpoint.record import expert_files
from mlx_mimo.experts.pool import Pool
from mlx_mimo.experts.reader import ExpertReader


@pytest.fixture(params=["threads", "inline"])
def where_reads_run(request, monkeypatch):
    if request.param == "threads":
        monkeypatch.setattr("mlx_mimo.experts.reader.INLINE_BYTES", 0)


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """(directory of expert files, {layer: {tensor: its values in a slot, for all experts}})"""
    directory = tmp_path_factory.mktemp("experts")
    truth = {}
    for layer in LAYERS:
        tensors = random_experts(seed=layer)
        write_expert_file(directory, layer, tensors)
        truth[layer] = {
            name: np.array(value if value.dtype == mx.uint32 else value.astype(mx.float32))
            for name, value in tensors.items()
        }
    return directory, truth


@pytest.fixture
def make(originals, tmp_path, disk):
    directory, truth = originals
    files = expert_files(shutil.copytree(directory, tmp_path / "experts"))
    readers = []

    def pool(slots, **options) -> Pool:
        readers.append(ExpertReader(files, threads=3, preadv=disk))
        made = Pool(files, slots, readers[-1], widen=True, **options)
        made.truth = truth
        return made

    yield pool
    for reader in readers:
        reader.close()
