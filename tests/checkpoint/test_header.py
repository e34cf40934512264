"""Safetensors headers: every file gives a checked header or raises FormatError."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_mimo.checkpoint.header import DTYPE_BITS, parse_header, read_header
from mlx_mimo.errors import FormatError

GOOD = {
    "__metadata__": {"format": "mlx"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]},
}


def file_bytes(header: object, data: int = 29) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def changed(name: str, **fields) -> dict:
    return GOOD | {name: GOOD[name] | fields}


def test_a_good_file_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(GOOD))
    header = read_header(path)
    assert header.metadata == {"format": "mlx"}

    assert header.tensors["b"].offset == header.data_offset + 24
    assert header.file_bytes == path.stat().st_size


def test_a_file_of_mlx_without_metadata_is_read(tmp_path):
    import mlx.core as mx

    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"x": mx.zeros((2, 3))})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {}
    assert header.tensors["x"].shape == (2, 3)


def test_tensors_of_no_bytes_are_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes({"a": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}}, 0))
    assert read_header(path).tensors["a"].nbytes == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes, too short"),
        (b"\0" * 8, "header of 0 bytes"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "header of 1,152"),
        (file_bytes(b"[1, 2]", 0), "a JSON list"),
        (file_bytes(b"{'a': 1}", 0), "not JSON"),
        (file_bytes(b'{"a": \xff}', 0), "not JSON"),
        (file_bytes(b"[" * 100_000, 0), "not JSON"),
        (file_bytes(GOOD, 28), "expected from its header"),
        (file_bytes(GOOD, 30), "expected from its header"),
        (file_bytes(changed("b", data_offsets=[23, 28])), "overlaps"),
        (file_bytes(changed("b", data_offsets=[25, 30])), "leaves a gap"),
        (file_bytes(changed("a", shape=[2, 4])), "takes 32 bytes"),
        (file_bytes(changed("a", shape=[2, -3])), "not a list of sizes"),
        (file_bytes(changed("a", shape=[True, 6])), "not a list of sizes"),
        (file_bytes(changed("a", dtype="F33")), "unknown dtype"),
        (file_bytes(changed("a", dtype=["F32"])), "unknown dtype"),
        (file_bytes(changed("a", data_offsets=[24, 0])), "data_offsets span"),
        (file_bytes(changed("a", data_offsets=[0])), r"not \[begin, end\]"),
        (file_bytes(GOOD | {"__metadata__": {"a": 1}}), "strings to strings"),
        (file_bytes(b'{"a": {}, "a": {}}', 0), "stands twice"),
    ],
)
def test_a_damaged_file_is_refused_by_its_name(tmp_path, content, said):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=said) as caught:
        read_header(path)
    assert str(caught.value).startswith("x.safetensors: ")
    assert "\n" not in str(caught.value)


SIZES = st.integers(-3, 40) | st.sampled_from([2**31, 2**63, 2**64, 10**30, 0.5, True, None, "8"])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BITS, "F7", ""]) | st.none() | st.integers(),
        "shape": st.lists(SIZES, max_size=4) | st.none() | st.text(max_size=3),
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | st.lists(SIZES, max_size=4) | st.text(max_size=3),
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
HEADERS = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRIES | JSON, max_size=4)


def header_or_our_error(path, content: bytes):
    path.write_bytes(content)
    try:
        header = read_header(path)
    except FormatError as error:
        assert str(error).startswith(path.name)  # noqa: PT017 - no error is as good
        return
    end = header.data_offset
    for entry in sorted(header.tensors.values(), key=lambda e: (e.offset, e.nbytes)):
        assert entry.offset == end
        end += entry.nbytes
    assert end == header.file_bytes == len(content)


fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(content=st.binary(max_size=200))
def test_any_bytes_give_a_header_or_a_format_error(tmp_path, content):
    header_or_our_error(tmp_path / "x.safetensors", content)


@fuzz
@given(fields=HEADERS, data=st.integers(0, 64))
def test_any_json_header_gives_a_header_or_a_format_error(tmp_path, fields, data):
    header_or_our_error(tmp_path / "x.safetensors", file_bytes(fields, data))


@fuzz
@given(edits=st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), max_size=4), cut=st.integers(0, 300))
def test_a_file_with_bytes_changed_or_cut_off_gives_a_header_or_a_format_error(tmp_path, edits, cut):
    content = bytearray(file_bytes(GOOD))
    for place, value in edits:
        content[place % len(content)] = value
    header_or_our_error(tmp_path / "x.safetensors", bytes(content[:cut]))


@fuzz
@given(text=st.text(max_size=80))
def test_any_text_as_header_gives_a_header_or_a_format_error(text):
    try:
        parse_header("x.safetensors", text.encode("utf-8", "surrogatepass"), None)
    except FormatError as error:
        assert str(error).startswith("x.safetensors")  # noqa: PT017 - no error is as good


FIRST, SECOND = ('"dtype":"U8","shape":[1],"data_offsets":' + span for span in ("[0,1]", "[1,2]"))


def header_bytes(text: str) -> bytes:
    return text.replace("FIRST", FIRST).replace("SECOND", SECOND).encode()


@pytest.mark.parametrize(
    "text",
    [
        '{"a":{FIRST},"a":{SECOND}}',
        '{"a":{FIRST,"dtype":"U8"}}',
        '{"a":{FIRST},"\\u0061":{SECOND}}',
        '{"a":{"d\\u0074ype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        '{"__metadata__":{"f":"x","f":"y"},"a":{FIRST}}',
        '{"__metadata__":{"f":"x"},"__metadata__":{"f":"y"},"a":{FIRST}}',
        '{"a":{FIRST,"more":1,"more":2}}',
        '{"a" : {FIRST}, "a" : {SECOND}}',
    ],
)
def test_a_duplicate_key_is_refused_however_it_is_escaped(text):
    with pytest.raises(FormatError, match="stands twice"):
        parse_header("model.safetensors", header_bytes(text), None)


@pytest.mark.parametrize("name", ["dtype", "a:b", '\\"a\\":', "shape"])
def test_names_and_values_that_look_like_keys_are_not_taken_for_duplicates(name):
    """The counts of keys differ then, so the parser with the duplicate-key hook decides."""
    text = '{"__metadata__":{"data_offsets":"dtype"},"NAME":{FIRST}}'.replace("NAME", name)
    assert len(parse_header("model.safetensors", header_bytes(text), None).tensors) == 1
