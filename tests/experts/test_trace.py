"""Traces are read as they were written; errors name a file that is not a trace."""

import numpy as np
import pytest

from mlx_mimo.errors import MimoError
from mlx_mimo.experts.trace import MAGIC, TraceWriter, read_trace


def write(path, num_experts=256, calls=20, layers=(1, 3, 7), top_k=8):
    rng = np.random.default_rng(0)
    writer = TraceWriter(path, layers, num_experts, top_k, "abc", 4608)
    written = []
    for call in range(calls):
        layer, tokens = layers[call % len(layers)], (1, 5, 300)[call % 3]
        chosen = rng.integers(0, num_experts, (tokens, top_k))
        writer(layer, chosen)
        written.append((layer, chosen))
    writer.close()
    return written


@pytest.mark.parametrize("num_experts", [16, 256, 384])
def test_a_trace_is_read_as_it_was_written(tmp_path, num_experts):
    written = write(tmp_path / "t", num_experts)
    trace = read_trace(tmp_path / "t")
    assert (trace.layers, trace.num_experts, trace.top_k) == ((1, 3, 7), num_experts, 8)
    assert (trace.model, trace.slot_bytes) == ("abc", 4608)
    assert len(trace.calls) == len(written)
    for call, (layer, chosen) in zip(trace.calls, written):
        assert call.layer == layer
        np.testing.assert_array_equal(call.chosen, chosen)
    assert trace.routed == sum(chosen.size for _, chosen in written)


def test_a_decoded_token_of_the_full_model_takes_658_bytes(tmp_path):
    sizes = []
    for tokens in (1, 2):
        writer = TraceWriter(tmp_path / "t", range(1, 48), 256, 8)
        for _ in range(tokens):
            for layer in range(1, 48):
                writer(layer, np.zeros((1, 8), dtype=np.int32))
        writer.close()
        sizes.append((tmp_path / "t").stat().st_size)
    assert sizes[1] - sizes[0] == 658


def test_a_last_call_cut_short_is_left_out(tmp_path):
    written = write(tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    for cut in (1, 5, 20):
        (tmp_path / "t").write_bytes(data[:-cut])
        assert len(read_trace(tmp_path / "t").calls) == len(written) - 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a routing trace"),
        (b"not a trace at all", "not a routing trace"),
        (MAGIC + (5).to_bytes(4, "little") + b"{bad}", "damaged trace header"),
        (MAGIC + (2).to_bytes(4, "little") + b"{}", "damaged trace header"),
        (MAGIC + (2).to_bytes(4, "little") + b"[]", "damaged trace header"),
        (MAGIC + (99).to_bytes(4, "little") + b"{}", "damaged trace header"),
    ],
)
def test_a_file_that_is_not_a_trace_is_rejected(tmp_path, data, message):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(MimoError, match=f"^t: {message}"):
        read_trace(tmp_path / "t")


def test_numbers_out_of_range_are_rejected(tmp_path):
    write(tmp_path / "t", num_experts=16, calls=1)
    data = bytearray((tmp_path / "t").read_bytes())
    data[-1] = 16
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(MimoError, match="expert 16 of 16"):
        read_trace(tmp_path / "t")
    data[-1], data[-14] = 0, 3
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(MimoError, match="layer position 3 of 3"):
        read_trace(tmp_path / "t")


def test_errors_name_a_missing_file_and_a_missing_folder(tmp_path):
    with pytest.raises(MimoError, match="nowhere: trace cannot be read"):
        read_trace(tmp_path / "nowhere")
    with pytest.raises(MimoError, match="trace cannot be written"):
        TraceWriter(tmp_path / "no" / "t", (1,), 4, 2)
